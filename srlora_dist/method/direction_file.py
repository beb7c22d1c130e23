"""Writes and reads the file of directions; reads go to a copy that nobody can remove or change during the run."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from srlora_dist.checkpoint.files import remove_abandoned, write_whole
from srlora_dist.layers.digest import combine, digest_span

logger = logging.getLogger(__name__)

PARTS = ("Ut", "S", "Vt")
"""Parts of each site, one direction per row: left vectors (k, m), singular values (k,), right vectors (k, n)."""


class DirectionFile:
    """The directions of all sites, as a file in a cache that many runs share and that may be emptied at any time.

    Rank 0 alone uses it. A run reads from an unnamed copy, which takes no memory and disappears with the process,
    however that ends. The copy lies in the folder of temporary files (``TMPDIR``), or beside the file if there is no
    room. If there is no room in either, the directions stay in memory.

    Args:
        path: Path of the file in the cache.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()  # the process may change its folder
        self._copy: IO[bytes] | None = None
        self._in_memory: dict[str, Tensor] | None = None

    def open(self) -> bool:
        """Take a copy of the file, and tell whether its content matches the digest that it holds.

        Raises:
            OSError: There is no such file, or it cannot be read.
        """
        remove_abandoned(self.path.parent)
        self._copy = self._copied()
        try:
            if self._copy is None:
                # Clones, for a tensor that is read may be the file itself, mapped into memory.
                self._in_memory = {name: tensor.clone() for name, tensor in load_file(self.path).items()}
            with self._opened() as file:
                names = sorted(file.keys())
                digest = combine(*(digest_span(file.get_tensor(name)) for name in names))
                return file.metadata().get("digest") == str(digest)
        except (SafetensorError, AttributeError):
            return False

    def write(self, tensors: dict[str, Tensor], method: str) -> None:
        """Put the file into the cache, whole or not at all, and open it.

        Args:
            tensors: The directions by name, ``{site}.{part}``.
            method: Name of the method that computed them.

        Raises:
            OSError: It could not be written, or does not hold what was written.
        """
        digest = combine(*(digest_span(tensors[name]) for name in sorted(tensors)))
        metadata = {"method": method, "digest": str(digest)}
        write_whole(self.path, lambda path: save_file(tensors, path, metadata=metadata))
        if not self.open():
            raise OSError(f"{self.path} does not hold what was written: look at the disk, or choose another folder")

    def rows(self, site: str, numbers: list[int]) -> list[Tensor]:
        """The given directions of a site, one tensor for each of ``PARTS``.

        Raises:
            OSError: They cannot be read.
        """
        if self._in_memory is not None:
            return [self._in_memory[f"{site}.{part}"][numbers] for part in PARTS]
        try:
            with self._opened() as file:
                slices = [file.get_slice(f"{site}.{part}") for part in PARTS]
                return [torch.cat([each[number : number + 1] for number in numbers]) for each in slices]
        except SafetensorError as error:
            raise OSError(str(error)) from error

    def singular_values(self, site: str) -> list[float]:
        """All singular values of a site, falling."""
        return self._tensor(f"{site}.S").tolist()

    def _tensor(self, name: str) -> Tensor:
        if self._in_memory is not None:
            return self._in_memory[name]
        with self._opened() as file:
            return file.get_tensor(name)

    def _opened(self) -> safe_open:
        return safe_open(self.path if self._copy is None else f"/dev/fd/{self._copy.fileno()}", "pt")

    def _copied(self) -> IO[bytes] | None:
        """A copy without a name; None where there is no room for one."""
        with self.path.open("rb") as source:
            for folder in (tempfile.gettempdir(), self.path.parent):
                with contextlib.suppress(OSError):
                    copy = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as the run)
                    source.seek(0)
                    shutil.copyfileobj(source, copy, 1 << 20)
                    copy.flush()
                    return copy
        size = self.path.stat().st_size / 2**20
        logger.warning("there is no room for a copy of %s, so %.1f MiB of it stay in memory", self.path, size)
        return None
