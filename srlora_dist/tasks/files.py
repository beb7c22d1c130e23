"""A user's files: text, read line by line, and the folder of a model, looked at before anything is made of it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

SPLITS = ("train", "validation")


def split_files(data_dir: str, ending: str, content: str) -> list[Path]:
    """The files of both splits in ``task.data_dir``.

    Args:
        data_dir: The folder.
        ending: Of their names, ``txt`` or ``jsonl``.
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


def check_model_folder(name: str) -> None:
    """Look at a local model's configuration and at the headers of its weights, which takes no time.

    Under ZeRO-3 the ranks load a model together, so that a file which one of them cannot read has to be found before.

    Args:
        name: ``model.name_or_path``; what looks like a name on the hub is let pass.

    Raises:
        ValueError: There is no such folder, or a file in it is missing or broken.
    """
    folder, this = Path(name), f"model.name_or_path is {name!r}"
    if not folder.is_dir():
        if folder.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise ValueError(f"{this}, which is no folder: give that of a model, or a name on the hub")
        return
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{this}, whose config.json cannot be read ({error}): fetch it again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{this}, whose config.json is not a JSON object: fetch it again")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{this}, which has no weights in safetensors files; pickles, such as pytorch_model.bin, are not opened "
            "because they can run code: convert them with save_pretrained"
        )
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{this}, whose {file.name} is broken or no safetensors file ({error}): fetch it again"
            ) from error
