"""The files of a ledger: one per switch. How they are named, written, checked and read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from srlora_dist.checkpoint.files import describe, write_whole


@dataclass
class Entry:
    """An entry in memory.

    Args:
        tensors: What was added to each site's W, as ``{site.left, site.right}``.
        metadata: ``format``, and ``report`` with a :class:`~srlora_dist.checkpoint.ledger.SwitchReport` in JSON.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @classmethod
    def load(cls, path: Path) -> Entry:
        """Read the file of an entry.

        Raises:
            ValueError: The file is missing, or is not an entry of a ledger.
        """
        return cls(load_entry(path), read_metadata(path))

    def save(self, path: Path) -> None:
        """Write the entry as a new file."""
        save_file(self.tensors, path, metadata=self.metadata)


@dataclass
class EntryFile:
    """An entry on disk.

    Args:
        path: Its file.
        about: Size and checksum when it was written; see :func:`~srlora_dist.checkpoint.files.describe`.
        changed: Time of the last change of the file then, in ns.
    """

    path: Path
    about: dict[str, object]
    changed: int

    @classmethod
    def write(cls, entry: Entry, path: Path) -> EntryFile:
        """Write an entry, whole or not at all.

        Raises:
            OSError: It cannot be written.
            SafetensorError: The same; safetensors reports a full disk in this way.
        """
        write_whole(path, entry.save)
        return cls.of(path, describe(path))

    @classmethod
    def of(cls, path: Path, about: dict[str, object]) -> EntryFile:
        """A file that was written just now; ``about`` is its size and checksum."""
        return cls(path, about, path.stat().st_mtime_ns)

    def require_unchanged(self) -> None:
        """Check that the file is still as it was written. It is hashed only if its date or size has changed.

        Raises:
            ValueError: The file was changed or removed.
        """
        try:
            state = self.path.stat()
            same = (state.st_mtime_ns, state.st_size) == (self.changed, self.about["bytes"])
            same = same or describe(self.path) == self.about
        except OSError as error:
            raise ValueError(f"the ledger {self.path.parent} lacks {self.path.name}: was it removed?") from error
        if not same:
            raise ValueError(f"the entry {self.path} of the ledger was changed since this run wrote it")


def entry_name(switch: int) -> str:
    """Name of the file of a switch."""
    return f"switch-{switch:05d}.safetensors"


def entry_paths(folder: Path) -> list[Path]:
    """The files of a ledger's folder in order."""
    return sorted(folder.glob(entry_name(0).replace("00000", "*")))


def load_entry(path: Path) -> dict[str, Tensor]:
    """The tensors of one entry, copied into memory.

    Raises:
        ValueError: The file is missing, or is not an entry of a ledger.
    """
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no ledger entry ({error})") from error


def read_entries(paths: list[Path]) -> Iterator[dict[str, Tensor]]:
    """The tensors of several entries, each as ``{site.left, site.right}``.

    Raises:
        ValueError: A file is missing, or is not an entry of a ledger.
    """
    yield from map(load_entry, paths)


def read_metadata(path: Path) -> dict[str, str]:
    """What an entry says about its switch; see :class:`Entry`."""
    with safe_open(path, "pt") as entry:
        return entry.metadata() or {}


def require_entries(paths: list[Path], num_switches: int) -> None:
    """Check that a saved ledger has one entry for each switch of its run.

    Raises:
        ValueError: An entry is missing, or there are too many.
    """
    if [path.name for path in paths] != [entry_name(number) for number in range(num_switches)]:
        names = ", ".join(path.name for path in paths) or "nothing"
        raise ValueError(f"the ledger of the checkpoint has {names}, and the run had made {num_switches} switches")
