"""Keeps per-element statistics of the factors that a rank tracks, and reduces them to one score per pair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from srlora_dist.layers.pairs import mean_by_pair, places_of_pairs
from srlora_dist.layers.site import PAIR_DIM
from srlora_dist.storage.base import Storage
from srlora_dist.storage.factor_spans import FactorSpan, by_site


class PairStatistics(ABC):
    """Statistics of the spans that a rank tracks; over all ranks each element is tracked once.

    Args:
        storage: How the ranks hold the factors.

    Attributes:
        kinds: Names of the statistics; each is one float32 number per element.
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
        owners = {id(span.owner): number for number, span in enumerate(storage.tracked)}
        spans = sorted(storage.tracked, key=lambda span: (str(span.owner.device), owners[id(span.owner)], span.offset))
        self._statistics: dict[FactorSpan, tuple[Tensor, ...]] = {}
        self._buffers: list[tuple[Tensor, list[FactorSpan]]] = []  # (kinds, elements) and whose they are
        for device in dict.fromkeys(span.owner.device for span in spans):
            there = [span for span in spans if span.owner.device == device]
            lengths = [span.numel for span in there]
            buffers = torch.zeros(len(self.kinds), sum(lengths), device=device)
            self._buffers.append((buffers, there))
            parts = [buffer.split(lengths) for buffer in buffers]
            self._statistics |= dict(zip(there, zip(*parts, strict=True), strict=True))

    @abstractmethod
    def pair_scores(self) -> list[Tensor]:
        """How important each pair is: for every site (r,) float64 on the CPU, the same on every rank.

        Collective: one all-reduce of a few bytes per pair.
        """

    @abstractmethod
    def reset_(self, number: int, slots: Tensor) -> None:
        """Reset the statistics at a site of which a switch has restarted these slots."""

    def observe_(self, owners: list[Tensor]) -> None:  # noqa: B027 (a default)
        """Take note of the gradients: the optimizer is about to step these tensors."""

    def clear_(self) -> None:  # noqa: B027 (a default)
        """Forget all that was observed: the window of the steps that count begins."""

    @property
    def num_bytes(self) -> int:
        """Memory that this rank holds for the statistics."""
        return sum(buffers.nbytes for buffers, _ in self._buffers)

    def of(self, span: FactorSpan, kind: str) -> Tensor:
        """A view of one statistic of a span, flat."""
        return self._statistics[span][self.kinds.index(kind)]

    def spans_of(self, number: int) -> list[FactorSpan]:
        """The spans of a site that this rank tracks."""
        return self._of_site[number]

    def of_site(self, number: int) -> list[Tensor]:
        """All statistics that this rank holds of a site, for a snapshot."""
        return [statistic for span in self._of_site[number] for statistic in self._statistics[span]]

    def places(self, span: FactorSpan, slots: Tensor) -> Tensor:
        """Where the elements of the given pairs lie in a statistic of a span."""
        shape = self.storage.sites[span.site].factor_shape(span.factor)
        at = places_of_pairs(span.start, span.numel, shape, PAIR_DIM[span.factor], slots)
        return at.to(span.owner.device)

    def by_site(self, packed: Tensor) -> list[Tensor]:
        """Cut one number per pair, of all sites in a row, into (r,) per site, on the CPU."""
        return list(packed.cpu().split([site.rank for site in self.storage.sites]))

    def gather(self) -> dict[str, Tensor]:
        """The statistics of whole factors, flat, by ``site.factor.statistic``, on rank 0; an empty dict elsewhere.

        Collective: the statistics are gathered on rank 0, see ``Collectives.gather_to_0``.
        """
        names, sizes = self._names_and_sizes()
        return dict(zip(names, self.storage.gather_to_0(sizes, self._parts()), strict=self.storage.rank == 0))

    def restore_(self, read: Callable[[str], Tensor]) -> None:
        """Put back what :meth:`gather` gave.

        Args:
            read: Gives a statistic by its name; called on rank 0 alone.

        Collective: the statistics are scattered from rank 0, see ``Collectives.scatter_from_0``.
        """
        names, sizes = self._names_and_sizes()
        parts = {number: (start, span) for number, start, span in self._parts()}
        for number, whole in self.storage.scatter_from_0(sizes, lambda j: read(names[j])):
            if number in parts:
                start, span = parts[number]
                span.copy_(whole[start : start + span.numel()])

    def _names_and_sizes(self) -> tuple[list[str], list[int]]:
        factors = [(site, factor) for site in self.storage.sites for factor in ("A", "B")]
        names = [f"{site.name}.{factor}.{kind}" for site, factor in factors for kind in self.kinds]
        return names, [site.factor_shape(factor).numel() for site, factor in factors for _ in self.kinds]

    def _parts(self) -> list[tuple[int, int, Tensor]]:
        """(number of the name, start, span) of all that this rank tracks."""
        return [
            (len(self.kinds) * (2 * span.site + "AB".index(span.factor)) + kind, span.start, statistic)
            for span in self.storage.tracked
            for kind, statistic in enumerate(self._statistics[span])
        ]


def sum_by_pair(storage: Storage, of_span: Callable[[FactorSpan], Tensor], factors: str = "AB") -> Tensor:
    """This rank's part of the mean over each pair's elements in a factor: one number per pair, all sites in a row.

    Args:
        storage: The parts of all its ranks add up to the mean.
        of_span: Gives, for a tracked span, what is averaged: one number per element, flat.
        factors: The factors whose means are added up.

    Returns:
        (pairs of all sites,) in float64, on the device of the storage.
    """
    ranks = [site.rank for site in storage.sites]
    packed = torch.zeros(sum(ranks), dtype=torch.float64, device=storage.device)
    parts = packed.split(ranks)
    for span in storage.tracked:
        if span.factor in factors:
            shape = storage.sites[span.site].factor_shape(span.factor)
            parts[span.site].add_(
                mean_by_pair(of_span(span).to(packed.device), span.start, shape, PAIR_DIM[span.factor])
            )
    return packed
