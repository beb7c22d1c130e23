"""Corrects Adam's bias by the age of each pair, because the optimizer has one step count for all elements."""

from __future__ import annotations

import torch
from torch import Tensor

from srlora_dist.layers.pairs import places_of_pairs
from srlora_dist.layers.site import PAIR_DIM
from srlora_dist.storage.base import Storage
from srlora_dist.storage.factor_spans import FactorSpan


class PairSteps:
    """Scales the updates of restarted pairs as if Adam counted their steps from their start.

    With moments m and v, decays b1 and b2, Adam moves a weight by ``-rate m / (1 - b1^t) / sqrt(v / (1 - b2^t))``,
    where t counts the steps of the run. A restarted pair has moments that count from its start, so its first update
    late in a run is ``(1 - b1) / sqrt(1 - b2)`` times the rate: 3.16 with the usual decays, in place of 1.

    Args:
        storage: How the ranks hold the factors; each rank scales what its optimizer steps.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._born: dict[FactorSpan, tuple[int, ...]] = {}  # births at the site when the places were found
        # Places of the elements of restarted pairs in a span, and the slot of each element.
        self._places: dict[FactorSpan, tuple[Tensor, Tensor]] = {}
        self._before: dict[FactorSpan, Tensor] = {}

    @torch.no_grad()
    def before_(self, owners: set[int]) -> None:
        """The optimizer is about to step the tensors with these ids."""
        for span in self._restarted(owners):
            self._before[span] = span.of(span.owner)[self._places[span][0]]

    @torch.no_grad()
    def after_(self, owners: set[int], step: int) -> None:
        """The optimizer has taken this step, counted from 1."""
        betas = {id(owner): g["betas"] for g in self.storage.optimizer.param_groups for owner in g["params"]}
        for span in self._restarted(owners):
            at, slots = self._places[span]
            beta1, beta2 = betas[id(span.owner)]
            born = self.storage.sites[span.site].state.born
            ratios = [_correction(step - k, beta1, beta2) / _correction(step, beta1, beta2) for k in born]
            before, weight = self._before.pop(span), span.of(span.owner)
            ratio = torch.tensor(ratios, dtype=weight.dtype, device=weight.device)[slots]
            weight.index_copy_(0, at, before + (weight[at] - before) * ratio)

    def _restarted(self, owners: set[int]) -> list[FactorSpan]:
        """The spans of these tensors that hold restarted pairs."""
        return [span for span in self.storage.held if id(span.owner) in owners and self._find_places(span)]

    def _find_places(self, span: FactorSpan) -> bool:
        site = self.storage.sites[span.site]
        if self._born.get(span) != tuple(site.state.born):
            self._born[span] = tuple(site.state.born)
            restarted = [slot for slot, born in enumerate(site.state.born) if born > 0]
            slots = torch.tensor(restarted, dtype=torch.int64)
            shape, pair_dim = site.factor_shape(span.factor), PAIR_DIM[span.factor]
            at = places_of_pairs(span.start, span.numel, shape, pair_dim, slots)
            whole = at + span.start
            of = whole // shape[1] if pair_dim == 0 else whole % shape[1]
            self._places[span] = at.to(span.owner.device), of.to(span.owner.device)
        return self._places[span][0].numel() > 0


def _correction(num_steps: int, beta1: float, beta2: float) -> float:
    """The factor that Adam's bias correction applies after this many steps."""
    return (1 - beta2**num_steps) ** 0.5 / (1 - beta1**num_steps)
