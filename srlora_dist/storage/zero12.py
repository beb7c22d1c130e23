"""DeepSpeed ZeRO-1 and ZeRO-2: whole model weights on every rank, optimizer state cut into flat fragments.

DeepSpeed lays the trainable parameters of a group out in one flat buffer, in its own order and with padding, and cuts
the buffer into one fragment per rank. The optimizer steps the fp32 copy of the fragment. Then the whole parameters are
rebuilt from all fragments, so a pair must be written to both copies.
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
    """Each rank tracks the spans of factors that fall into its fp32 fragment."""

    def __init__(self, optimizer: Optimizer, sites: list[Site], zero_optimizer: object) -> None:
        super().__init__(optimizer, sites)
        self.name = "zero2" if zero_optimizer.partition_gradients else "zero1"
        self.loss_scaler = zero_optimizer.loss_scaler
        self._fragments = zero_optimizer.single_partition_of_fp32_groups
        # parameter._hp_mapping is no use: under round_robin_gradients it does not follow the layout of the buffer.
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
        # The span of a parameter outside the fragment is empty, so its offset must not count.
        return OwnedSpan(owner, offset + start - self.rank * owner.numel() if numel else 0, start, numel)
