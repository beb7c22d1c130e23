"""The append-only record of every fused pair and every direction taken, written to disk at each switch.

``W`` of a site with scale ``s`` is its pretrained weight plus the ledger's pairs: ``W = W0 + s left @ right``. The
pairs are kept exactly as they were added, so adding them again, entry by entry, gives the same bits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from srlora_dist.checkpoint.files import link_or_copy, remove_abandoned
from srlora_dist.checkpoint.folder_lock import FolderLock
from srlora_dist.checkpoint.ledger_files import Entry, EntryFile, entry_name, entry_paths, load_entry
from srlora_dist.config.paths import require_writable

logger = logging.getLogger(__name__)

FORMAT = "srlora-ledger-2"


@dataclass
class SiteSwitch:
    """What one switch did at one site.

    Args:
        site: Name of the site.
        slots: Slots whose pairs were fused and restarted.
        directions: Directions along which the fused pairs had been started.
        new_directions: Directions that took their place.
        scores: Scores of all pairs of the site before the switch.
    """

    site: str
    slots: list[int]
    directions: list[int]
    new_directions: list[int]
    scores: list[float]

    def as_dict(self) -> dict:
        """Make one line of ``switches.jsonl`` of it."""
        return asdict(self)


@dataclass
class SwitchReport:
    """What one switch did.

    Args:
        step: Optimizer step that the switch followed.
        switch: Number of the switch; 0 is the initialisation.
        sites: What the switch did at each site.
        relative_output_change: Change of the model's outputs on the last training batch; None where it was not
            measured.
        undone: Whether that change was too large, so that the switch was taken back.
        findings: Signs of failure, see ``method/diagnostics.py``.
    """

    step: int
    switch: int
    sites: list[SiteSwitch]
    relative_output_change: float | None = None
    undone: bool = False
    findings: list = field(default_factory=list)


class Ledger:
    """One entry per switch: the columns and rows that were added to the W of each site, signs included.

    The first entries are files and the later ones are in memory. Without a folder, all are in memory; with one, only
    those that could not be written yet. Files are never changed in place, so checkpoints may hard-link them.

    Args:
        folder: Where to append; None keeps the entries in memory. Only rank 0 has a ledger.
        start_from: Files of the entries to go on from, instead of those in ``folder``. Each comes with its size and
            checksum from the manifest.
        if_disk_full: ``stop`` raises; ``go_on`` keeps the entry in memory until it can be written.

    Raises:
        ValueError: The folder cannot be written; another process writes there; it holds the ledger of another run; or
            it is the folder of ``start_from`` itself.
    """

    def __init__(
        self,
        folder: str | Path | None,
        start_from: Mapping[Path, dict[str, object]] | None = None,
        if_disk_full: str = "stop",
    ) -> None:
        self.folder = Path(folder).absolute() if folder is not None else None  # the process may change its folder
        self.if_disk_full = if_disk_full
        self._on_disk: list[EntryFile] = []
        self._in_memory: list[Entry] = []
        self._pending: dict[str, Tensor] = {}
        if self.folder is not None:
            self._take_folder(start_from)
        for path, about in (start_from or {}).items():
            if not self._take_file(path, about):
                self._in_memory.append(Entry.load(path))

    def _take_folder(self, start_from: Mapping[Path, dict[str, object]] | None) -> None:
        """Lock the folder for this run, and empty it if the run goes on from other files."""
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
        """Add the file of an entry to the folder; tells whether that worked, else the entry belongs in memory."""
        if self.folder is None or self._in_memory:
            return False
        place = self.folder / entry_name(len(self._on_disk))
        try:
            link_or_copy(path, place)
        except OSError:
            place.unlink(missing_ok=True)  # half a copy
            if self.if_disk_full == "stop":
                raise
            return False
        self._on_disk.append(EntryFile.of(place, about))
        return True

    def release(self) -> None:
        """Unlock the folder, so that another process can use it."""
        if self.folder is not None:
            self._lock.release()

    def add(self, site: str, left: Tensor, right: Tensor) -> None:
        """Note that the current switch adds ``s left @ right``, (m, k) times (k, n), to a site's W."""
        self._pending[f"{site}.left"] = left.cpu().contiguous()
        self._pending[f"{site}.right"] = right.cpu().contiguous()

    def forget_switch(self) -> None:
        """Drop the notes of a switch that is undone."""
        self._pending = {}

    def close_switch(self, report: SwitchReport) -> None:
        """Append the switch as one entry. If it cannot be written, it stays in memory.

        Raises:
            OSError: It could not be written, and ``if_disk_full`` is ``stop``.
            SafetensorError: The same; safetensors reports a full disk in this way.
        """
        entry, self._pending = self._pending, {}
        self._in_memory.append(Entry(entry, {"format": FORMAT, "report": json.dumps(asdict(report))}))
        self.write_rest(self.if_disk_full == "stop")

    def write_rest(self, must: bool = False) -> None:
        """Write the entries in memory to the folder, in order. Does nothing without a folder.

        Args:
            must: Whether to raise if an entry cannot be written; otherwise a warning says so.

        Raises:
            OSError: An entry cannot be written.
            SafetensorError: The same; safetensors reports a full disk in this way.
        """
        try:
            while self.folder is not None and self._in_memory:
                path = self.folder / entry_name(len(self._on_disk))
                self._on_disk.append(EntryFile.write(self._in_memory[0], path))
                del self._in_memory[0]
        except (OSError, SafetensorError) as error:
            if must:
                raise
            logger.warning(
                "going on with %d entries of the ledger in memory until %s can be written: %s",
                len(self._in_memory),
                self.folder,
                error,
            )

    def leave_out(self, sites: list[str]) -> None:
        """Remove sites from switch 0, which was undone there. It must be the only switch so far."""
        first = Entry.load(self._on_disk.pop().path) if self._on_disk else self._in_memory.pop()
        self._pending = {name: t for name, t in first.tensors.items() if name.rpartition(".")[0] not in sites}
        report = SwitchReport(**json.loads(first.metadata["report"]))
        report.sites = [SiteSwitch(**part) for part in report.sites if part["site"] not in sites]
        self.close_switch(report)

    def copy_to(self, folder: Path) -> dict[str, dict[str, object]]:
        """Put all entries into a new folder. Files are hard-linked where the file system allows it.

        Returns:
            Size and checksum, by name, of the entries that were files already.

        Raises:
            ValueError: A file was changed or removed since it was written.
        """
        self.write_rest()
        folder.mkdir()
        for written in self._on_disk:
            written.require_unchanged()
            link_or_copy(written.path, folder / written.path.name)
        for number, entry in enumerate(self._in_memory, len(self._on_disk)):
            entry.save(folder / entry_name(number))
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
        """All that was added to W0 of each site, without the scale: columns (m, R) and rows (R, n) in float32.

        Raises:
            ValueError: A site has no entry, or a file was changed or removed since it was written.
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
