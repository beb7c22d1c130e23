"""Where computed and fetched files are kept between runs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """Return the project's cache folder, made if it is not there yet.

    Returns:
        ``$SRLORA_CACHE``, or else ``srlora_dist`` in ``$XDG_CACHE_HOME``, or else in ``~/.cache``.

    Raises:
        ValueError: The folder cannot be made.
    """
    own, users = os.environ.get("SRLORA_CACHE"), Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    parent = users if users.is_absolute() else Path.home() / ".cache"
    folder = Path(own).expanduser() if own else parent / "srlora_dist"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the cache folder {folder} cannot be made ({error.strerror}): set SRLORA_CACHE to a writable folder"
        ) from error
    return folder


def require_writable(folder: Path, option: str) -> None:
    """Make a folder and try to write in it, before what belongs there has taken long to compute.

    Raises:
        ValueError: It cannot be; the message names the option that chose it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option} {folder} cannot be written ({error.strerror}): choose another folder") from error
