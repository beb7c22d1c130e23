"""The moving averages of Eq. 3-6, on the runs that a rank tracks, and the pair scores of Eq. 7."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from srlora_dist.pairs import mean_by_pair, places_of_pairs
from srlora_dist.sites import PAIR_DIM
from srlora_dist.storage import Piece, Run, Storage, by_site, local_part

GROUP_ELEMENTS = {"cpu": 1 << 16, "other": 1 << 24}
"""Elements that are updated together: on a CPU few enough for its cache, elsewhere enough to need few kernels."""

MOST_GROUPINGS = 16
"""Sets of tensors with a gradient for which the groups are kept: one in most runs, under ZeRO-3 one a sub-group."""


@dataclass
class Group:
    """Pieces of tensors that the optimizer steps; their statistics lie end to end and are updated as one tensor.

    Args:
        pieces: Of one device and type.
        mean: Their moving averages of the sensitivity (Eq. 4), flat.
        deviation: Those of its deviation (Eq. 5), flat.
    """

    pieces: list[Piece]
    mean: Tensor
    deviation: Tensor

    def __post_init__(self) -> None:
        # To use a tensor as it is costs less than to make a view of it.
        self._are_whole = all(piece.numel == local_part(piece.owner).numel() for piece in self.pieces)

    def sensitivity(self) -> Tensor:
        """Eq. 3, flat and in float32."""
        if self._are_whole:
            weights = [local_part(piece.owner) for piece in self.pieces]
            grads = [local_part(piece.owner.grad) for piece in self.pieces]
        else:
            weights = [piece.of(piece.owner) for piece in self.pieces]
            grads = [piece.of(piece.owner.grad) for piece in self.pieces]
        if weights[0].dtype != torch.float32:  # trained in 16 bits: averages of such short numbers would stand still
            weights, grads = ([tensor.float() for tensor in tensors] for tensors in (weights, grads))
        return torch._utils._flatten_dense_tensors(torch._foreach_mul(weights, grads)).abs_()


class Importance:
    """How sensitive the loss is to each element of the factors, and how much that varies.

    Between switches nothing is sent: each rank updates the statistics of its own runs, from the gradient that the
    optimizer is about to apply. When a switch is due, one all-reduce adds up the ranks' parts of the pair scores.

    Attributes:
        seconds: Host time of the updates; a GPU may still be at work when they return.
    """

    def __init__(self, storage: Storage, beta1: float, beta2: float) -> None:
        self.storage = storage
        self.beta1, self.beta2 = beta1, beta2
        self.seconds = 0.0
        self._of_site = by_site(storage.tracked)
        # By their place in the owner, so that neighbours can be joined.
        owners = {id(run.owner): number for number, run in enumerate(storage.tracked)}
        runs = sorted(storage.tracked, key=lambda run: (str(run.owner.device), owners[id(run.owner)], run.offset))
        self._means: dict[Run, Tensor] = {}
        self._deviations: dict[Run, Tensor] = {}
        self._buffers: list[tuple[Tensor, Tensor, list[Run]]] = []
        for device in dict.fromkeys(run.owner.device for run in runs):
            there = [run for run in runs if run.owner.device == device]
            lengths = [run.numel for run in there]
            mean, deviation = torch.zeros(2, sum(lengths), device=device)
            self._buffers.append((mean, deviation, there))
            self._means |= zip(there, mean.split(lengths), strict=True)
            self._deviations |= zip(there, deviation.split(lengths), strict=True)
        self._groups: dict[tuple[int, ...], list[Group]] = {}

    @property
    def num_bytes(self) -> int:
        """Memory that this rank holds for the statistics."""
        return sum(mean.nbytes + deviation.nbytes for mean, deviation, _ in self._buffers)

    @torch.no_grad()
    def observe_(self, owners: list[Tensor]) -> None:
        """Eq. 3-5 for the tensors that are about to be stepped; nothing is sent, and no device is waited for."""
        began = time.perf_counter()
        present = tuple(id(owner) for owner in owners if owner.grad is not None)
        if present not in self._groups:
            if len(self._groups) == MOST_GROUPINGS:  # layers that are left out at random
                self._groups.clear()
            self._groups[present] = list(self._make_groups(set(present)))
        for group in self._groups[present]:
            change = group.sensitivity()
            group.mean.lerp_(change, 1 - self.beta1)
            change.sub_(group.mean).abs_()
            group.deviation.lerp_(change, 1 - self.beta2)
        self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def pair_scores(self) -> list[Tensor]:
        """Eq. 6-7: the scores of every site's pairs, (r,) float64 on the CPU each, the same on every rank.

        Collective: one all-reduce of 8 bytes a pair.
        """
        sites = self.storage.sites
        packed = torch.zeros(sum(site.rank for site in sites), dtype=torch.float64, device=self.storage.device)
        parts = packed.split([site.rank for site in sites])
        for run in self.storage.tracked:
            score = (self._means[run] * self._deviations[run]).to(packed.device)
            shape = sites[run.site].factor_shape(run.factor)
            parts[run.site].add_(mean_by_pair(score, run.start, shape, PAIR_DIM[run.factor]))
        return list(self.storage.all_reduce_(packed).cpu().split([site.rank for site in sites]))

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

    def of_site(self, number: int) -> list[Tensor]:
        """The statistics that this rank holds of a site, to be kept or put back."""
        return [each[run] for run in self._of_site[number] for each in self._statistics()]

    def clear_(self) -> None:
        """Forget all statistics."""
        for mean, deviation, _ in self._buffers:
            mean.zero_()
            deviation.zero_()

    def _make_groups(self, present: set[int]) -> Iterator[Group]:
        """All that is tracked of the owners with these ids, in groups."""
        for mean, deviation, runs in self._buffers:
            most = GROUP_ELEMENTS.get(mean.device.type, GROUP_ELEMENTS["other"])
            spans: list[tuple[int, list[Piece]]] = []  # (where its statistics begin, pieces)
            stop = 0
            for start, piece in _cut(_joined(runs, present), most):
                first, pieces = spans[-1] if spans else (0, [])
                fits = pieces and start == stop and start + piece.numel - first <= most
                if fits and pieces[0].owner.dtype == piece.owner.dtype:
                    pieces.append(piece)
                else:
                    spans.append((start, [piece]))
                stop = start + piece.numel
            for first, pieces in spans:
                last = first + sum(piece.numel for piece in pieces)
                yield Group(pieces, mean[first:last], deviation[first:last])

    def _statistics(self) -> tuple[dict[Run, Tensor], dict[Run, Tensor]]:
        return self._means, self._deviations

    def _names_and_sizes(self) -> tuple[list[str], list[int]]:
        factors = [(site, factor) for site in self.storage.sites for factor in ("A", "B")]
        names = [f"{site.name}.{factor}.{kind}" for site, factor in factors for kind in ("mean", "deviation")]
        return names, [site.factor_shape(factor).numel() for site, factor in factors for _ in range(2)]

    def _parts(self) -> list[tuple[int, int, Tensor]]:
        """(number of the name, start, run) of all that this rank tracks."""
        return [
            (4 * run.site + 2 * "AB".index(run.factor) + kind, run.start, each[run])
            for run in self.storage.tracked
            for kind, each in enumerate(self._statistics())
        ]

    def reset_(self, number: int, slots: Tensor | None) -> None:
        """Forget the statistics of the given slots of a site, or of all its pairs."""
        for run in self._of_site[number]:
            for statistic in (each[run] for each in self._statistics()):
                if slots is None:
                    statistic.zero_()
                else:
                    shape = self.storage.sites[number].factor_shape(run.factor)
                    at = places_of_pairs(run.start, run.numel, shape, PAIR_DIM[run.factor], slots)
                    statistic.index_fill_(0, at.to(statistic.device), 0)


def _joined(runs: list[Run], present: set[int]) -> list[tuple[int, Piece]]:
    """Runs of these owners as (where its statistics begin, piece), neighbours made one."""
    found: list[tuple[int, Piece]] = []
    start = 0
    for run in runs:
        if id(run.owner) in present and run.numel:
            begin, last = found[-1] if found else (0, None)
            is_next = last is not None and begin + last.numel == start and last.offset + last.numel == run.offset
            if is_next and last.owner is run.owner:
                last.numel += run.numel
            else:
                found.append((start, Piece(run.owner, run.offset, run.start, run.numel)))
        start += run.numel
    return found


def _cut(pieces: list[tuple[int, Piece]], most: int) -> Iterator[tuple[int, Piece]]:
    """The same in pieces of at most so many elements."""
    for begin, piece in pieces:
        for k in range(0, piece.numel, most):
            yield begin + k, Piece(piece.owner, piece.offset + k, piece.start + k, min(most, piece.numel - k))
