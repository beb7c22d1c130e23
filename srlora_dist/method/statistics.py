"""What a rank keeps for each element of the factors that it tracks, and how that becomes one score a pair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from srlora_dist.layers.pairs import mean_by_pair, places_of_pairs
from srlora_dist.layers.site import PAIR_DIM
from srlora_dist.storage.base import Storage
from srlora_dist.storage.factor_spans import Run, by_site


class Tracked(ABC):
    """Statistics of the runs that a rank tracks; over all ranks each element is tracked once.

    Args:
        storage: How the ranks hold the factors.

    Attributes:
        kinds: Names of the statistics, each a float32 number an element.
        needs_gradients: Whether they follow the gradients, so that steps have to be observed.
        seconds: Host time spent on observing.
    """

    kinds: tuple[str, ...]
    needs_gradients = True

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.seconds = 0.0
        self._of_site = by_site(storage.tracked)
        # By their place in the owner, so that neighbours can be joined.
        owners = {id(run.owner): number for number, run in enumerate(storage.tracked)}
        runs = sorted(storage.tracked, key=lambda run: (str(run.owner.device), owners[id(run.owner)], run.offset))
        self._statistics: dict[Run, tuple[Tensor, ...]] = {}
        self._buffers: list[tuple[Tensor, list[Run]]] = []  # (kinds, elements) and whose they are
        for device in dict.fromkeys(run.owner.device for run in runs):
            there = [run for run in runs if run.owner.device == device]
            lengths = [run.numel for run in there]
            buffers = torch.zeros(len(self.kinds), sum(lengths), device=device)
            self._buffers.append((buffers, there))
            parts = [buffer.split(lengths) for buffer in buffers]
            self._statistics |= dict(zip(there, zip(*parts, strict=True), strict=True))

    @abstractmethod
    def pair_scores(self) -> list[Tensor]:
        """What a pair is worth: for every site (r,) float64 on the CPU, the same on every rank.

        Collective: one all-reduce of a few bytes a pair.
        """

    @abstractmethod
    def reset_(self, number: int, slots: Tensor) -> None:
        """A switch has restarted these slots of a site."""

    def observe_(self, owners: list[Tensor]) -> None:  # noqa: B027 (a default)
        """The optimizer is about to step these tensors."""

    def clear_(self) -> None:  # noqa: B027 (a default)
        """The window of the steps that count begins."""

    @property
    def num_bytes(self) -> int:
        """Memory that this rank holds for the statistics."""
        return sum(buffers.nbytes for buffers, _ in self._buffers)

    def of(self, run: Run, kind: str) -> Tensor:
        """A statistic of a run, flat, a view."""
        return self._statistics[run][self.kinds.index(kind)]

    def runs_of(self, number: int) -> list[Run]:
        """What this rank tracks of a site."""
        return self._of_site[number]

    def of_site(self, number: int) -> list[Tensor]:
        """The statistics that this rank holds of a site, to be kept or put back."""
        return [statistic for run in self._of_site[number] for statistic in self._statistics[run]]

    def places(self, run: Run, slots: Tensor) -> Tensor:
        """Where the elements of the given pairs lie in a statistic of a run."""
        shape = self.storage.sites[run.site].factor_shape(run.factor)
        at = places_of_pairs(run.start, run.numel, shape, PAIR_DIM[run.factor], slots)
        return at.to(run.owner.device)

    def by_site(self, packed: Tensor) -> list[Tensor]:
        """One number a pair, of all sites in a row, cut into (r,) a site, on the CPU."""
        return list(packed.cpu().split([site.rank for site in self.storage.sites]))

    def gather(self) -> dict[str, Tensor]:
        """The statistics of whole factors, flat, by ``site.factor.statistic``, on rank 0; nothing elsewhere.

        Collective: they are collected, see ``Ranks.collect``.
        """
        names, sizes = self._names_and_sizes()
        return dict(zip(names, self.storage.collect(sizes, self._parts()), strict=self.storage.rank == 0))

    def restore_(self, read: Callable[[str], Tensor]) -> None:
        """Put back what :meth:`gather` gave.

        Args:
            read: Gives a statistic by its name; called on rank 0 alone.

        Collective: they are spread, see ``Ranks.spread``.
        """
        names, sizes = self._names_and_sizes()
        parts = {number: (start, run) for number, start, run in self._parts()}
        for number, whole in self.storage.spread(sizes, lambda j: read(names[j])):
            if number in parts:
                start, run = parts[number]
                run.copy_(whole[start : start + run.numel()])

    def _names_and_sizes(self) -> tuple[list[str], list[int]]:
        factors = [(site, factor) for site in self.storage.sites for factor in ("A", "B")]
        names = [f"{site.name}.{factor}.{kind}" for site, factor in factors for kind in self.kinds]
        return names, [site.factor_shape(factor).numel() for site, factor in factors for _ in self.kinds]

    def _parts(self) -> list[tuple[int, int, Tensor]]:
        """(number of the name, start, run) of all that this rank tracks."""
        return [
            (len(self.kinds) * (2 * run.site + "AB".index(run.factor)) + kind, run.start, statistic)
            for run in self.storage.tracked
            for kind, statistic in enumerate(self._statistics[run])
        ]


def sum_by_pair(storage: Storage, of_run: Callable[[Run], Tensor], factors: str = "AB") -> Tensor:
    """This rank's part of the mean over each pair's elements in a factor, one number a pair, of all sites in a row.

    Args:
        storage: The parts of all its ranks add up to the mean.
        of_run: What is averaged, flat, for each element of a tracked run.
        factors: Those whose means are added up.

    Returns:
        (pairs of all sites,) in float64, on the device of the storage.
    """
    ranks = [site.rank for site in storage.sites]
    packed = torch.zeros(sum(ranks), dtype=torch.float64, device=storage.device)
    parts = packed.split(ranks)
    for run in storage.tracked:
        if run.factor in factors:
            shape = storage.sites[run.site].factor_shape(run.factor)
            parts[run.site].add_(mean_by_pair(of_run(run).to(packed.device), run.start, shape, PAIR_DIM[run.factor]))
    return packed
