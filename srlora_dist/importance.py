"""The moving averages of Eq. 3-6, on the runs that a rank tracks, and the pair scores of Eq. 7."""

from __future__ import annotations

import time
from collections import defaultdict

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

    def reset_(self, number: int, slots: Tensor | None) -> None:
        """Forget the statistics of the given slots of a site, or of all its pairs."""
        for run in self.storage.tracked:
            if run.site != number:
                continue
            for statistic in (self._means[run], self._deviations[run]):
                if slots is None:
                    statistic.zero_()
                else:
                    whole = torch.zeros(self.storage.sites[number].factor_shape(run.factor))
                    fill_pairs_(statistic, run.start, PAIR_DIM[run.factor], slots, whole)
