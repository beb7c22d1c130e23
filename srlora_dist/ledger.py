"""The append-only record of every fused pair and every direction taken, on disk at each switch.

``W`` of a site is its pretrained weight plus the ledger's pairs: ``W = W0 + left @ right``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "srlora-ledger-1"


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
    """What one switch did: ``step`` it followed, its number (0 is the initialisation), and each site's part."""

    step: int
    switch: int
    sites: list[SiteSwitch]


class Ledger:
    """One entry a switch: for each site the columns and rows that were added to its W, signs and scale included.

    Args:
        folder: Where to append; None keeps the entries in memory. Only rank 0 has a ledger.

    Raises:
        ValueError: The folder already holds the ledger of a run.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = Path(folder) if folder is not None else None
        self._entries: list[dict[str, Tensor]] = []
        self._pending: dict[str, Tensor] = {}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.glob("switch-*.safetensors")):
                raise ValueError(
                    f"srlora.ledger_dir {self.folder} holds the ledger of another run: choose a new folder"
                )

    def add(self, site: str, left: Tensor, right: Tensor) -> None:
        """Note that ``left @ right``, (m, k) times (k, n), is added to a site's W by the switch under way."""
        self._pending[f"{site}.left"] = left.cpu().contiguous()
        self._pending[f"{site}.right"] = right.cpu().contiguous()

    def close_switch(self, report: SwitchReport) -> None:
        """Append the switch: written beside, synced and renamed, so that an entry is there whole or not at all."""
        entry, self._pending = self._pending, {}
        if self.folder is None:
            self._entries.append(entry)
            return
        path = self.folder / f"switch-{report.switch:05d}.safetensors"
        temporary = path.with_suffix(".tmp")
        save_file(entry, temporary, metadata={"format": FORMAT, "report": json.dumps(asdict(report))})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)

    def entries(self) -> Iterator[dict[str, Tensor]]:
        """The switches in order, each as ``{site.left, site.right}``."""
        yield from self._entries
        for path in sorted(self.folder.glob("switch-*.safetensors")) if self.folder is not None else []:
            with safe_open(path, "pt") as file:
                yield {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)

    def factors(self, sites: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """For each site all that was added to W0: columns (m, R) and rows (R, n).

        Raises:
            ValueError: There is no entry for a site.
        """
        lefts: dict[str, list[Tensor]] = {site: [] for site in sites}
        rights: dict[str, list[Tensor]] = {site: [] for site in sites}
        for entry in self.entries():
            for site in sites:
                if f"{site}.left" in entry:
                    lefts[site].append(entry[f"{site}.left"])
                    rights[site].append(entry[f"{site}.right"])
        missing = [site for site in sites if not lefts[site]]
        if missing:
            raise ValueError(f"the ledger {self.folder or 'in memory'} has no entry for {missing[0]}: was it removed?")
        return {site: (torch.cat(lefts[site], 1), torch.cat(rights[site], 0)) for site in sites}
