"""Files that are there whole or not at all, and folders of them that are listed with checksums."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

MANIFEST = "manifest.json"
BESIDE, REPLACED = ".srlora_tmp", ".srlora_old"
"""Endings of a hidden folder that is being written or removed, and of one that is being replaced."""
PART, ALIVE = ".srlora_part", "alive"
"""Ending of a hidden folder in which single files are written, and a file in it that its process holds locked."""
SECONDS_TO_LOCK, SECONDS_WITHOUT_LOCKS = 60.0, 86400.0
"""Age of a folder of parts that was left behind by a killed process: without such a file, and where none can be locked.
"""
KINDS = (".safetensors", ".json")
"""Endings of the files that a folder may hold: none of them can run code when it is read."""


Files = dict[str, Callable[[Path], None]]
"""For the name of each file what writes a new one at the path that it is given."""
Put = Callable[[Path, Files], None]
"""Puts such files into a folder: :func:`fill_folder`, or what a run does that goes on where a disk is full."""


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside its place, sync it and rename it.

    Args:
        path: Where it will be.
        write: Writes a new file at the path that it is given.

    Raises:
        OSError: It could not be written; what was at the place before is still there.
    """
    write_files(path.parent, {path.name: write})


def write_files(folder: Path, files: Files) -> None:
    """Write files that belong together beside their places, and rename them once all of them are written.

    What a killed process left of its own files in this folder is removed.

    Args:
        folder: Where they will be.
        files: If there are several, nobody can use the others without the last one: a kill between two renames leaves
            a folder without it.

    Raises:
        OSError: One could not be written; what was there before still is.
    """
    remove_abandoned(folder)
    with _workplace(folder, next(iter(files))) as place:
        for name, write in files.items():
            write(place / name)
            _sync(place / name)
        *others, last = files
        if others:
            (folder / last).unlink(missing_ok=True)
        for name in files:
            (place / name).replace(folder / name)
    _sync(folder)


def fill_folder(folder: Path, files: Files) -> None:
    """Make a folder if it is not there yet, and write files into it as :func:`write_files` does."""
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, files)


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left behind in a folder while they wrote single files; others are left alone."""
    for part in folder.glob(f".*{PART}"):
        with contextlib.suppress(OSError):
            if _is_abandoned(part):
                shutil.rmtree(part, ignore_errors=True)


def write_folder(
    folder: Path, fill: Callable[[Path], dict[str, dict[str, object]] | None], about: dict[str, object]
) -> None:
    """Write a folder beside its place, list its files in a manifest, sync everything and rename it.

    Args:
        folder: Where it will be; one that is there already is replaced.
        fill: Writes ``.safetensors`` and ``.json`` files into the folder that it is given. It may return what
            :func:`describe` gives for some of them, by their paths in the folder, where it knows that already.
        about: Kept in the manifest beside the list: which format it is, above all.

    Raises:
        OSError: It could not be written; what was at the place before is still there.
    """
    temporary, old = (folder.with_name(f".{folder.name}{ending}") for ending in (BESIDE, REPLACED))
    if old.exists() and not folder.exists():
        old.rename(folder)
    for stale in (temporary, old):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        known = fill(temporary) or {}
        paths = {path.relative_to(temporary).as_posix(): path for path in temporary.rglob("*") if path.is_file()}
        files = {name: known.get(name) or describe(paths[name]) for name in sorted(paths)}
        (temporary / MANIFEST).write_text(json.dumps({**about, "files": files}, indent=1) + "\n")
        for path in (
            *paths.values(),
            temporary / MANIFEST,
            *(p for p in temporary.rglob("*") if p.is_dir()),
            temporary,
        ):
            _sync(path)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, object]:
    """The manifest of a folder.

    Raises:
        ValueError: There is none, or it is not one of :func:`write_folder`.
    """
    path = folder / MANIFEST
    try:
        _require_regular(folder, MANIFEST)
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{path} is no manifest: it has no list of files")
    return manifest


def require_unharmed(folder: Path, manifest: dict[str, object]) -> None:
    """Compare every file of a folder with its manifest.

    Raises:
        ValueError: One is missing, has another size or checksum, is a link, lies elsewhere or is of another kind.
    """
    for name, listed in manifest["files"].items():
        path = _require_regular(folder, name)
        found = describe(path)
        if not isinstance(listed, dict) or found["bytes"] != listed.get("bytes"):
            expected = listed.get("bytes") if isinstance(listed, dict) else "none"
            raise ValueError(f"{path} has {found['bytes']} bytes, and its manifest says {expected}: it was cut")
        if found["sha256"] != listed.get("sha256"):
            raise ValueError(f"{path} has another checksum than its manifest says: it is damaged")


def describe(path: Path) -> dict[str, object]:
    """Size in bytes and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that is never changed in place a second name, or copy it where the file system refuses that.

    Raises:
        OSError: It can neither be linked nor be copied.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def folders_with_manifest(parent: Path) -> Iterator[Path]:
    """The folders in a folder that hold a manifest; those still being written are hidden and left out."""
    if parent.is_dir():
        for path in sorted(parent.iterdir()):
            if path.is_dir() and not path.name.startswith(".") and (path / MANIFEST).exists():
                yield path


def clean_up(parent: Path) -> None:
    """Remove what a killed :func:`write_folder` left in a folder, and put back what it was about to replace.

    Only for the one who writes there: another one's unfinished folder would go as well.
    """
    remove_abandoned(parent)
    for old in parent.glob(f".*{REPLACED}"):
        place = parent / old.name[1:].removesuffix(REPLACED)
        if place.exists():
            shutil.rmtree(old)
        else:
            old.rename(place)
    for temporary in parent.glob(f".*{BESIDE}"):
        shutil.rmtree(temporary)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a crash leaves it there, or nothing that is taken for it."""
    temporary = folder.with_name(f".{folder.name}{BESIDE}")
    folder.rename(temporary)
    shutil.rmtree(temporary)


@contextlib.contextmanager
def _workplace(folder: Path, name: str) -> Iterator[Path]:
    """A hidden folder in a folder, removed at the end; others see by its lock whether this process is alive.

    Of its own, because libraries write beside a file too before they rename it.
    """
    place = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=PART, dir=folder))
    try:
        with (place / ALIVE).open("w") as alive:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _is_abandoned(part: Path) -> bool:
    try:
        with (part / ALIVE).open("r+") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return time.time() - part.stat().st_mtime > SECONDS_TO_LOCK
    except OSError:  # a file system without locks
        return time.time() - part.stat().st_mtime > SECONDS_WITHOUT_LOCKS
    return True


def _require_regular(folder: Path, name: str) -> Path:
    """The path of a listed file, which has to be a regular one below the folder, reached without a link."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise ValueError(f"the manifest of {folder} lists {name!r}, which is outside of the folder")
    if PurePosixPath(name).suffix not in KINDS:
        raise ValueError(f"the manifest of {folder} lists {name!r}, which is not one of {', '.join(KINDS)}")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise ValueError(f"{path} is a symbolic link: copy the file itself")
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    return path


def _sync(path: Path) -> None:
    """Make a file or the entries of a folder outlast a crash of the machine."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
