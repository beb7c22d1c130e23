"""A user's files: text, read line by line, and the folder of a model, looked at before anything is made of it."""

from __future__ import annotations

from pathlib import Path

SPLITS = ("train", "validation")


def split_files(data_dir: str, ending: str, content: str) -> list[Path]:
    """The files of both splits in ``task.data_dir``.

    Args:
        data_dir: The folder.
        ending: Ending of their names, ``txt`` or ``jsonl``.
        content: What is in them, for the message.

    Raises:
        ValueError: One is missing.
    """
    files = [Path(data_dir).expanduser() / f"{split}.{ending}" for split in SPLITS]
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"task.data_dir is {data_dir!r}, but there is no file {file}: give a folder with train.{ending} and "
                f"validation.{ending}, {content}"
            )
    return files


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, with or without a byte-order mark; only a line feed ends one.

    Raises:
        ValueError: The file cannot be read or is not text; the message says where.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}: fetch it again, or convert it") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): fetch it again") from error
    for number, line in enumerate(lines, start=1):
        if "\0" in line:  # what a disk that was full leaves behind, or UTF-16
            raise ValueError(f"{path} has a NUL byte in line {number}: fetch it again, or convert it to UTF-8")
    return lines
