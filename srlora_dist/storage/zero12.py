"""DeepSpeed ZeRO-1 and ZeRO-2: whole model weights on every rank, optimizer state cut into flat fragments.

The trainable parameters of a group are laid out in one flat buffer, in DeepSpeed's own order and with its padding, and
the buffer is cut into one fragment a rank. The optimizer steps the fp32 copy of the fragment, then the whole parameters
are rebuilt from all fragments, so a written pair must go to both copies.
"""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from srlora_dist.layers.site import Site
from srlora_dist.layers.spans import fragment
from srlora_dist.storage.factor_spans import OwnedSpan
from srlora_dist.storage.optimizer_state import not_stepped_error
from srlora_dist.storage.replicated import ReplicatedStorage


class Zero12Storage(ReplicatedStorage):
    """A rank tracks the spans of factors that fall into its fp32 fragment."""

    def __init__(self, optimizer: Optimizer, sites: list[Site], zero_optimizer: object) -> None:
        super().__init__(optimizer, sites)
        self.name = "zero2" if zero_optimizer.partition_gradients else "zero1"
        self.loss_scaler = zero_optimizer.loss_scaler
        self._fragments = zero_optimizer.single_partition_of_fp32_groups
        # Not parameter._hp_mapping: under round_robin_gradients that map does not follow the layout of the buffer.
        layout = zip(zero_optimizer.round_robin_bit16_groups, zero_optimizer.round_robin_bit16_offsets, strict=True)
        self._places = {
            id(parameter): (group, offset)
            for group, (parameters, offsets) in enumerate(layout)
            for parameter, offset in zip(parameters, offsets, strict=True)
        }
        self._map_factors()

    def owned_span(self, parameter: nn.Parameter) -> OwnedSpan:
        if id(parameter) not in self._places:
            raise not_stepped_error(self.sites, parameter)
        group, offset = self._places[id(parameter)]
        owner = self._fragments[group]
        start, numel = fragment(offset, parameter.numel(), owner.numel(), self.rank)
        # Of a parameter that lies outside the fragment the piece is empty, wherever it would begin.
        return OwnedSpan(owner, offset + start - self.rank * owner.numel() if numel else 0, start, numel)
