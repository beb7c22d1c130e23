"""What a full disk refuses and a run goes on without: kept in memory, and written once there is room."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from safetensors import SafetensorError

from srlora_dist.checkpoint.files import Files, fill_folder

logger = logging.getLogger(__name__)


class Postponed:
    """Writes lines and files; for one process.

    Args:
        goes_on: Whether what cannot be written is kept and said; else it raises.
    """

    def __init__(self, goes_on: bool) -> None:
        self.goes_on = goes_on
        self._lines: dict[Path, str] = {}
        self._files: dict[Path, Files] = {}

    def append(self, path: Path, line: str) -> None:
        """Append a line to a file, after those that it lacks.

        Raises:
            OSError: It cannot be written, and the run does not go on without.
        """
        text = self._lines.pop(path, "") + line
        try:
            _append(path, text)
        except OSError as error:
            if not self.goes_on:
                raise
            self._lines[path] = text
            count = self._lines[path].count("\n")
            logger.warning("going on with %d lines of %s in memory until they can be written: %s", count, path, error)

    def put(self, folder: Path, files: Files) -> None:
        """Write files that belong together, as :func:`~srlora_dist.checkpoint.files.fill_folder` does.

        Those that wait for the same folder are given up: these take their place.

        Raises:
            OSError: They cannot be written, and the run does not go on without; nothing of them is there then.
            SafetensorError: Likewise: it reports a full disk in its own way.
        """
        self._files.pop(folder, None)
        try:
            fill_folder(folder, files)
        except (OSError, SafetensorError) as error:
            if not self.goes_on:
                raise
            self._files[folder] = files
            logger.warning("going on with the files of %s in memory until they can be written: %s", folder, error)

    def retry(self) -> None:
        """Write what waits, as far as that can be."""
        for path in list(self._lines):
            self.append(path, "")
        for folder, files in list(self._files.items()):
            self.put(folder, files)

    def waits_for(self, folder: Path) -> bool:
        """Whether files for this folder wait."""
        return folder in self._files

    def require_written(self) -> None:
        """Write what waits.

        Raises:
            ValueError: Something still cannot be written; the message names it.
        """
        self.retry()
        missing = [str(path) for path in (*self._files, *self._lines)]
        if missing:
            raise ValueError(
                f"the disk is full, so {', '.join(missing)} cannot be written and what is there is older: make room; "
                "the same command goes on from the last checkpoint"
            )


def _append(path: Path, text: str) -> None:
    """Append to a file; if that fails, the file is as it was."""
    with path.open("ab", buffering=0) as file:
        size, content = file.tell(), text.encode()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), size)
            raise
