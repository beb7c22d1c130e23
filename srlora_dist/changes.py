"""How far a pair has come since it was started: a score that looks at the weights alone."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from srlora_dist.storage.factor_spans import Run
from srlora_dist.tracked import Tracked, sum_by_pair


class Changes(Tracked):
    """The mean square of a pair's change since its start, over its column of B plus over its row of A.

    Each rank keeps what its runs were started as, and no step has to be observed.
    """

    kinds = ("start",)
    needs_gradients = False

    @override
    @torch.no_grad()
    def pair_scores(self) -> list[Tensor]:
        """Collective: one all-reduce of 8 bytes a pair."""

        def square(run: Run) -> Tensor:
            return (run.of(run.owner).float() - self.of(run, "start")).double().square()

        return self.by_site(self.storage.all_reduce_(sum_by_pair(self.storage, square)))

    @override
    def reset_(self, number: int, slots: Tensor) -> None:
        for run in self.runs_of(number):
            at = self.places(run, slots)
            self.of(run, "start").index_copy_(0, at, run.of(run.owner)[at].float())
