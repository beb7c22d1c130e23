"""The append-only record of every fused pair and every direction taken, on disk at each switch.

``W`` of a site with scale ``s`` is its pretrained weight plus the ledger's pairs: ``W = W0 + s left @ right``. The
pairs are kept as they were added, so that adding them again, entry by entry, gives the same bits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from srlora_dist.checkpoint.files import describe, link_or_copy, remove_abandoned, write_whole
from srlora_dist.checkpoint.folder_lock import FolderLock
from srlora_dist.config.paths import require_writable

logger = logging.getLogger(__name__)

FORMAT = "srlora-ledger-2"


@dataclass
class _Entry:
    """An entry in memory."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def save(self, path: Path) -> None:
        save_file(self.tensors, path, metadata=self.metadata)


@dataclass
class _Written:
    """An entry on disk: what :func:`describe` said of it, and when the file was changed last."""

    path: Path
    about: dict[str, object]
    changed: int

    @classmethod
    def of(cls, path: Path, about: dict[str, object]) -> _Written:
        return cls(path, about, path.stat().st_mtime_ns)

    def require_unchanged(self) -> None:
        """Raise unless the file is as it was written; it is read only if its date or size says that it is not."""
        try:
            state = self.path.stat()
            same = (state.st_mtime_ns, state.st_size) == (self.changed, self.about["bytes"])
            same = same or describe(self.path) == self.about
        except OSError as error:
            raise ValueError(f"the ledger {self.path.parent} lacks {self.path.name}: was it removed?") from error
        if not same:
            raise ValueError(f"the entry {self.path} of the ledger was changed since this run wrote it")


@dataclass
class SiteSwitch:
    """What one switch did at one site.

    Args:
        site: Name of the site.
        slots: Slots that were fused and restarted.
        directions: The directions that the fused pairs had been started along.
        new_directions: The directions that took their place.
        scores: All pair scores of the site, before the switch.
    """

    site: str
    slots: list[int]
    directions: list[int]
    new_directions: list[int]
    scores: list[float]

    def as_dict(self) -> dict:
        """As one line of ``switches.jsonl``."""
        return asdict(self)


@dataclass
class SwitchReport:
    """What one switch did.

    Args:
        step: Optimizer step that it followed.
        switch: Its number; 0 is the initialisation.
        sites: Each site's part.
        relative_output_change: Of the model on the last training batch, where it was measured.
        undone: Whether that was too much, so that the switch was taken back.
        findings: Signs of failure, see ``diagnostics.py``.
    """

    step: int
    switch: int
    sites: list[SiteSwitch]
    relative_output_change: float | None = None
    undone: bool = False
    findings: list = field(default_factory=list)


class Ledger:
    """One entry a switch: for each site the columns and rows that were added to its W, signs included.

    The first entries are files, the others are in memory: all of them without a folder, else those that could not be
    written yet. A file is never changed in place, so that checkpoints may give it a second name.

    Args:
        folder: Where to append; None keeps the entries in memory. Only rank 0 has a ledger.
        start_from: Files of entries to go on from, in place of those in ``folder``, with what their manifest says of
            each.
        if_disk_full: ``stop``, or ``go_on`` with the entry in memory until it can be written.

    Raises:
        ValueError: The folder cannot be written, another process writes there, it holds the ledger of a run and there
            is nothing to go on from, or is the one to go on from.
    """

    def __init__(
        self,
        folder: str | Path | None,
        start_from: Mapping[Path, dict[str, object]] | None = None,
        if_disk_full: str = "stop",
    ) -> None:
        self.folder = Path(folder).absolute() if folder is not None else None  # the process may change its folder
        self.if_disk_full = if_disk_full
        self._on_disk: list[_Written] = []
        self._in_memory: list[_Entry] = []
        self._pending: dict[str, Tensor] = {}
        if self.folder is not None:
            self._take_folder(start_from)
        for path, about in (start_from or {}).items():
            if not self._take_file(path, about):
                self._in_memory.append(_Entry(load_entry(path), read_metadata(path)))

    def _take_folder(self, start_from: Mapping[Path, dict[str, object]] | None) -> None:
        """Make the folder this run's alone, and empty it if the run goes on from elsewhere."""
        require_writable(self.folder, "srlora.ledger_dir")
        if any(path.parent.resolve() == self.folder.resolve() for path in start_from or ()):
            raise ValueError(f"srlora.ledger_dir {self.folder} is that of the checkpoint: choose another folder")
        self._lock = FolderLock(self.folder, "srlora.ledger_dir", "choose another srlora.ledger_dir")
        remove_abandoned(self.folder)
        present = entry_paths(self.folder)
        if present and start_from is None:
            raise ValueError(f"srlora.ledger_dir {self.folder} holds the ledger of another run: choose a new folder")
        for path in present:
            path.unlink()

    def _take_file(self, path: Path, about: dict[str, object]) -> bool:
        """Put the file of an entry after those in the folder, if that can be."""
        if self.folder is None or self._in_memory:
            return False
        place = self.folder / _name(len(self._on_disk))
        try:
            link_or_copy(path, place)
        except OSError:
            place.unlink(missing_ok=True)  # half a copy
            if self.if_disk_full == "stop":
                raise
            return False
        self._on_disk.append(_Written.of(place, about))
        return True

    def release(self) -> None:
        """Let other processes have the folder."""
        if self.folder is not None:
            self._lock.release()

    def add(self, site: str, left: Tensor, right: Tensor) -> None:
        """Note that ``s left @ right``, (m, k) times (k, n), is added to a site's W by the switch under way."""
        self._pending[f"{site}.left"] = left.cpu().contiguous()
        self._pending[f"{site}.right"] = right.cpu().contiguous()

    def forget_switch(self) -> None:
        """Drop what was noted of a switch that is undone."""
        self._pending = {}

    def close_switch(self, report: SwitchReport) -> None:
        """Append the switch, whole or not at all; an entry that cannot be written stays in memory in any case.

        Raises:
            Exception: It could not be written, and ``if_disk_full`` is ``stop``.
        """
        entry, self._pending = self._pending, {}
        self._in_memory.append(_Entry(entry, {"format": FORMAT, "report": json.dumps(asdict(report))}))
        self.write_rest(self.if_disk_full == "stop")

    def write_rest(self, must: bool = False) -> None:
        """Write to the folder what is in memory, in order; without a folder it stays there.

        Args:
            must: Raise where that cannot be; else it is said.

        Raises:
            OSError: It cannot be written.
            SafetensorError: Likewise: it reports a full disk in its own way.
        """
        try:
            while self.folder is not None and self._in_memory:
                path = self.folder / _name(len(self._on_disk))
                write_whole(path, self._in_memory[0].save)
                self._on_disk.append(_Written.of(path, describe(path)))
                del self._in_memory[0]
        except (OSError, SafetensorError) as error:
            if must:
                raise
            logger.warning(
                "going on with %d entries of the ledger in memory until %s can be written: %s",
                *(len(self._in_memory), self.folder, error),
            )

    def leave_out(self, sites: list[str]) -> None:
        """Take sites out of switch 0, which was undone there; it is the only switch so far."""
        if self._on_disk:
            path = self._on_disk.pop().path
            first = _Entry(load_entry(path), read_metadata(path))
        else:
            first = self._in_memory.pop()
        self._pending = {name: t for name, t in first.tensors.items() if name.rpartition(".")[0] not in sites}
        report = SwitchReport(**json.loads(first.metadata["report"]))
        report.sites = [SiteSwitch(**part) for part in report.sites if part["site"] not in sites]
        self.close_switch(report)

    def copy_to(self, folder: Path) -> dict[str, dict[str, object]]:
        """Put all entries into a new folder: those that are files by a second name, where the file system allows that.

        Returns:
            Of these their size and checksum when they were written.

        Raises:
            ValueError: A file was changed or removed since.
        """
        self.write_rest()
        folder.mkdir()
        for written in self._on_disk:
            written.require_unchanged()
            link_or_copy(written.path, folder / written.path.name)
        for number, entry in enumerate(self._in_memory, len(self._on_disk)):
            entry.save(folder / _name(number))
        return {written.path.name: written.about for written in self._on_disk}

    def entries(self) -> Iterator[dict[str, Tensor]]:
        """The switches in order, each as ``{site.left, site.right}``.

        Raises:
            ValueError: A file was changed or removed since it was written.
        """
        for written in self._on_disk:
            written.require_unchanged()
            yield load_entry(written.path)
        yield from (entry.tensors for entry in self._in_memory)

    def factors(self, sites: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """For each site all that was added to W0, scale excluded: columns (m, R) and rows (R, n) in float32.

        Raises:
            ValueError: There is no entry for a site.
        """
        self.write_rest()
        gone = [written.path.name for written in self._on_disk if not written.path.exists()]
        if gone:
            raise ValueError(f"the ledger {self.folder} has no entry for {sites[0]} in {gone[0]}: was it removed?")
        lefts: dict[str, list[Tensor]] = {site: [] for site in sites}
        rights: dict[str, list[Tensor]] = {site: [] for site in sites}
        for entry in self.entries():
            for site in sites:
                if f"{site}.left" in entry:
                    lefts[site].append(entry[f"{site}.left"].float())
                    rights[site].append(entry[f"{site}.right"].float())
        missing = [site for site in sites if not lefts[site]]
        if missing:
            raise ValueError(f"the ledger {self.folder or 'in memory'} has no entry for {missing[0]}: was it removed?")
        return {site: (torch.cat(lefts[site], 1), torch.cat(rights[site], 0)) for site in sites}


def load_entry(path: Path) -> dict[str, Tensor]:
    """One entry of a ledger, in memory.

    Raises:
        ValueError: The file is not one of a ledger, or is gone.
    """
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no ledger entry ({error})") from error


def read_entries(paths: list[Path]) -> Iterator[dict[str, Tensor]]:
    """The entries in the files of a ledger, each as ``{site.left, site.right}``.

    Raises:
        ValueError: A file is not one of a ledger.
    """
    yield from map(load_entry, paths)


def read_metadata(path: Path) -> dict[str, str]:
    """What an entry says of its switch: ``report`` is a :class:`SwitchReport` in JSON."""
    with safe_open(path, "pt") as entry:
        return entry.metadata() or {}


def require_entries(paths: list[Path], num_switches: int) -> None:
    """Raise unless a saved ledger has one entry for each switch of its run."""
    if [path.name for path in paths] != [_name(number) for number in range(num_switches)]:
        names = ", ".join(path.name for path in paths) or "nothing"
        raise ValueError(f"the ledger of the checkpoint has {names}, and the run had made {num_switches} switches")


def _name(switch: int) -> str:
    return f"switch-{switch:05d}.safetensors"


def entry_paths(folder: Path) -> list[Path]:
    """The files of a ledger's folder in order."""
    return sorted(folder.glob(_name(0).replace("00000", "*")))
