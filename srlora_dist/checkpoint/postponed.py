"""Keeps in memory what a full disk refuses, so that the run can go on, and writes it once there is room."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from safetensors import SafetensorError

from srlora_dist.checkpoint.files import Files, fill_folder

logger = logging.getLogger(__name__)


class Postponed:
    """Writes lines and files of one process.

    Args:
        goes_on: Whether to keep what cannot be written and log a warning; otherwise the error is raised.
    """

    def __init__(self, goes_on: bool) -> None:
        self.goes_on = goes_on
        self._lines: dict[Path, str] = {}
        self._files: dict[Path, Files] = {}

    def append(self, path: Path, line: str) -> None:
        """Append a line to a file, after the lines that are still to be written.

        Raises:
            OSError: The line cannot be written, and the run does not go on without it.
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

        They replace files that still wait for the same folder.

        Raises:
            OSError: The files cannot be written, and the run does not go on without them. None of them is written.
            SafetensorError: The same; safetensors reports a full disk in this way.
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
        """Try to write everything that waits."""
        for path in list(self._lines):
            self.append(path, "")
        for folder, files in list(self._files.items()):
            self.put(folder, files)

    def waits_for(self, folder: Path) -> bool:
        """Whether files for this folder wait to be written."""
        return folder in self._files

    def require_written(self) -> None:
        """Write everything that waits.

        Raises:
            ValueError: Something still cannot be written. The message names the files.
        """
        self.retry()
        missing = [str(path) for path in (*self._files, *self._lines)]
        if missing:
            raise ValueError(
                f"the disk is full, so {', '.join(missing)} cannot be written and what is there is older: make room; "
                "the same command goes on from the last checkpoint"
            )


def _append(path: Path, text: str) -> None:
    """Append to a file. On failure the file stays as it was."""
    with path.open("ab", buffering=0) as file:
        size, content = file.tell(), text.encode()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), size)
            raise
