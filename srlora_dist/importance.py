"""The moving averages of Eq. 3-6, on the runs that a rank tracks, and the pair scores of Eq. 7."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from srlora_dist.pairs import fill_pairs_, mean_by_pair
from srlora_dist.sites import PAIR_DIM
from srlora_dist.storage import Run, Storage


class Importance:
    """How sensitive the loss is to each element of the factors, and how much that varies.

    Between switches nothing is sent: each rank updates the statistics of its own runs, from the gradient that the
    optimizer is about to apply. When a switch is due, one all-reduce adds up the ranks' parts of the pair scores.
    """

    def __init__(self, storage: Storage, beta1: float, beta2: float) -> None:
        self.storage = storage
        self.beta1, self.beta2 = beta1, beta2
        self.seconds = 0.0
        self._runs: dict[int, list[Run]] = defaultdict(list)
        for run in storage.tracked:
            self._runs[id(run.owner)].append(run)
        self._means, self._deviations = (
            {run: torch.zeros_like(run.of(run.owner), dtype=torch.float32) for run in storage.tracked} for _ in range(2)
        )

    @property
    def num_bytes(self) -> int:
        """Memory that this rank holds for the statistics."""
        return sum(t.nbytes for t in (*self._means.values(), *self._deviations.values()))

    @torch.no_grad()
    def observe_(self, owners: list[Tensor]) -> None:
        """Eq. 3-5 for the tensors that are about to be stepped; a few multi-tensor kernels, nothing is sent."""
        began = time.perf_counter()
        runs = [run for owner in owners if owner.grad is not None for run in self._runs[id(owner)] if run.numel]
        if runs:
            means, deviations = [self._means[run] for run in runs], [self._deviations[run] for run in runs]
            # Of a parameter that is trained in 16 bits too: averages of such short numbers would stand still.
            weights = [run.of(run.owner).float() for run in runs]
            grads = [run.of(run.owner.grad).float() for run in runs]
            change = torch._foreach_mul(weights, grads)
            torch._foreach_abs_(change)
            torch._foreach_lerp_(means, change, 1 - self.beta1)
            torch._foreach_sub_(change, means)
            torch._foreach_abs_(change)
            torch._foreach_lerp_(deviations, change, 1 - self.beta2)
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
        return [each[run] for run in self.storage.tracked if run.site == number for each in self._statistics()]

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
        for run in self.storage.tracked:
            if run.site != number:
                continue
            for statistic in (each[run] for each in self._statistics()):
                if slots is None:
                    statistic.zero_()
                else:
                    whole = torch.zeros(self.storage.sites[number].factor_shape(run.factor))
                    fill_pairs_(statistic, run.start, PAIR_DIM[run.factor], slots, whole)
