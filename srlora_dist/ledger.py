"""The append-only record of every fused pair and every direction taken, on disk at each switch.

``W`` of a site with scale ``s`` is its pretrained weight plus the ledger's pairs: ``W = W0 + s left @ right``. The
pairs are kept as they were added, so that adding them again, entry by entry, gives the same bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from srlora_dist.cache import require_writable
from srlora_dist.safefiles import write_whole

FORMAT = "srlora-ledger-2"


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

    Args:
        folder: Where to append; None keeps the entries in memory. Only rank 0 has a ledger.
        start_from: Files of entries to go on from, in place of those in ``folder``; they are copied.

    Raises:
        ValueError: The folder cannot be written, holds the ledger of a run and there is nothing to go on from, or is
            the one to go on from.
    """

    def __init__(self, folder: str | Path | None, start_from: list[Path] | None = None) -> None:
        self.folder = Path(folder) if folder is not None else None
        self._entries: list[dict[str, Tensor]] = []
        self._metadata: list[dict[str, str]] = []
        self._pending: dict[str, Tensor] = {}
        if self.folder is not None:
            require_writable(self.folder, "srlora.ledger_dir")
            if any(path.parent.resolve() == self.folder.resolve() for path in start_from or []):
                raise ValueError(f"srlora.ledger_dir {self.folder} is that of the checkpoint: choose another folder")
            present = entry_paths(self.folder)
            if present and start_from is None:
                raise ValueError(
                    f"srlora.ledger_dir {self.folder} holds the ledger of another run: choose a new folder"
                )
            for path in present:
                path.unlink()
        if start_from is not None and self.folder is None:
            self._entries = list(read_entries(start_from))
            self._metadata = [read_metadata(path) for path in start_from]
        elif start_from is not None:
            for path in start_from:
                shutil.copyfile(path, self.folder / path.name)

    def add(self, site: str, left: Tensor, right: Tensor) -> None:
        """Note that ``s left @ right``, (m, k) times (k, n), is added to a site's W by the switch under way."""
        self._pending[f"{site}.left"] = left.cpu().contiguous()
        self._pending[f"{site}.right"] = right.cpu().contiguous()

    def forget_switch(self) -> None:
        """Drop what was noted of a switch that is undone."""
        self._pending = {}

    def close_switch(self, report: SwitchReport) -> None:
        """Append the switch, whole or not at all."""
        entry, self._pending = self._pending, {}
        metadata = {"format": FORMAT, "report": json.dumps(asdict(report))}
        if self.folder is None:
            self._entries.append(entry)
            self._metadata.append(metadata)
            return
        write_whole(self.folder / _name(report.switch), lambda path: save_file(entry, path, metadata=metadata))

    def copy_to(self, folder: Path) -> None:
        """Write all entries into a new folder."""
        folder.mkdir()
        for number, (entry, metadata) in enumerate(zip(self._entries, self._metadata, strict=True)):
            save_file(entry, folder / _name(number), metadata=metadata)
        for path in entry_paths(self.folder) if self.folder is not None else []:
            shutil.copyfile(path, folder / path.name)

    def entries(self) -> Iterator[dict[str, Tensor]]:
        """The switches in order, each as ``{site.left, site.right}``."""
        yield from self._entries
        if self.folder is not None:
            yield from read_entries(entry_paths(self.folder))

    def factors(self, sites: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """For each site all that was added to W0, scale excluded: columns (m, R) and rows (R, n) in float32.

        Raises:
            ValueError: There is no entry for a site.
        """
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


def read_entries(paths: list[Path]) -> Iterator[dict[str, Tensor]]:
    """The entries in the files of a ledger, each as ``{site.left, site.right}``.

    Raises:
        ValueError: A file is not one of a ledger.
    """
    for path in paths:
        try:
            yield load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no ledger entry ({error})") from error


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
