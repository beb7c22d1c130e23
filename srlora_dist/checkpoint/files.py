"""Writes files and folders whole or not at all, and checks them by a manifest with checksums."""

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
"""Endings of hidden folders: of one that is being written or removed, and of one that is being replaced."""
PART, ALIVE = ".srlora_part", "alive"
"""Ending of a hidden folder in which single files are written, and a file in it that the writing process locks."""
SECONDS_TO_LOCK, SECONDS_WITHOUT_LOCKS = 60.0, 86400.0
"""Age at which a hidden folder counts as left by a killed process: without a lock file, and where locks do not work."""
KINDS = (".safetensors", ".json")
"""Endings of the files that a folder may hold. Reading such files cannot run code."""


Files = dict[str, Callable[[Path], None]]
"""For the name of each file, a function that writes a new file at the given path."""
Put = Callable[[Path, Files], None]
"""Puts such files into a folder: :func:`fill_folder`, or :meth:`Postponed.put` of a run that survives a full disk."""


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file in a hidden folder beside its path, sync it and rename it.

    Args:
        path: Final path of the file.
        write: Writes a new file at the given path.

    Raises:
        OSError: The file could not be written. An earlier file at the path is still there.
    """
    write_files(path.parent, {path.name: write})


def write_files(folder: Path, files: Files) -> None:
    """Write files that belong together in a hidden folder, and rename them once all of them are written.

    Also removes what killed processes have left in the folder.

    Args:
        folder: Final folder of the files.
        files: The files. If there are several, the last one must be the one without which the others are unusable: a
            kill between two renames leaves the folder without it.

    Raises:
        OSError: A file could not be written. Earlier files in the folder are still there.
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
    """Make a folder if it does not exist yet, and write files into it as :func:`write_files` does."""
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, files)


def remove_abandoned(folder: Path) -> None:
    """Remove the hidden folders of killed processes from a folder. Those of living processes stay."""
    for part in folder.glob(f".*{PART}"):
        with contextlib.suppress(OSError):
            if _is_abandoned(part):
                shutil.rmtree(part, ignore_errors=True)


def write_folder(
    folder: Path, fill: Callable[[Path], dict[str, dict[str, object]] | None], about: dict[str, object]
) -> None:
    """Write a folder beside its final path, list its files in a manifest, sync everything and rename it.

    Args:
        folder: Final path of the folder. An earlier folder there is replaced.
        fill: Writes ``.safetensors`` and ``.json`` files into the given folder. It may return the size and checksum
            (see :func:`describe`) of files for which it knows them, by their paths in the folder.
        about: Further entries of the manifest, above all the format.

    Raises:
        OSError: The folder could not be written. An earlier folder there is still there.
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
        ValueError: There is no manifest, or :func:`write_folder` has not written it.
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
        ValueError: A file is missing, is a link, lies outside of the folder, or has another ending, size or checksum.
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
    """Hard-link a file that is never changed in place, or copy it where the file system refuses links.

    Raises:
        OSError: The file can be neither linked nor copied.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def folders_with_manifest(parent: Path) -> Iterator[Path]:
    """The subfolders that hold a manifest, without the hidden ones that are still being written."""
    if parent.is_dir():
        for path in sorted(parent.iterdir()):
            if path.is_dir() and not path.name.startswith(".") and (path / MANIFEST).exists():
                yield path


def clean_up(parent: Path) -> None:
    """Remove what a killed :func:`write_folder` has left in a folder, and put back what it was about to replace.

    Only the process that writes there may call this: it also removes folders that another process is writing.
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
    """Remove a folder; a crash leaves either all of it or a hidden rest, which nobody takes for the folder."""
    temporary = folder.with_name(f".{folder.name}{BESIDE}")
    folder.rename(temporary)
    shutil.rmtree(temporary)


@contextlib.contextmanager
def _workplace(folder: Path, name: str) -> Iterator[Path]:
    """A hidden folder to write in, removed at the end. Its lock shows other processes whether this one is alive.

    It is a folder, because libraries write temporary files of their own beside the given path.
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
    """The path of a listed file. It must be a regular file in the folder, reached without a symbolic link."""
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
    """Write a file, or the entries of a folder, through to the disk, so that they outlast a crash of the machine."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
