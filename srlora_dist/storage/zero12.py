"""DeepSpeed ZeRO-1 and ZeRO-2: whole model weights on every rank, optimizer state cut into flat fragments.

The trainable parameters of a group are laid out in one flat buffer, in DeepSpeed's own order and with its padding, and
the buffer is cut into one fragment a rank. The optimizer steps the fp32 copy of the fragment, then the whole parameters
are rebuilt from all fragments, so a written pair must go to both copies.
"""

from __future__ import annotations

from torch.optim import Optimizer

from srlora_dist.sites import Site
from srlora_dist.storage.base import Run, require_stepped
from srlora_dist.storage.plain import WholeWeights


class Zero12Storage(WholeWeights):
    """A rank tracks the runs of factors that fall into its fp32 fragment."""

    def __init__(self, optimizer: Optimizer, sites: list[Site], zero_optimizer: object) -> None:
        super().__init__(optimizer, sites)
        self.name = "zero2" if zero_optimizer.partition_gradients else "zero1"
        # Not parameter._hp_mapping: under round_robin_gradients that map does not follow the layout of the buffer.
        layout = zip(zero_optimizer.round_robin_bit16_groups, zero_optimizer.round_robin_bit16_offsets, strict=True)
        places = {
            id(parameter): (group, offset)
            for group, (parameters, offsets) in enumerate(layout)
            for parameter, offset in zip(parameters, offsets, strict=True)
        }
        for number, site in enumerate(sites):
            for factor in ("A", "B"):
                parameter = site.factor(factor)
                require_stepped(site, id(parameter) in places)
                group, offset = places[id(parameter)]
                owner = zero_optimizer.single_partition_of_fp32_groups[group]
                begin = self.rank * owner.numel()  # of this rank's fragment in the buffer
                start = max(0, begin - offset)
                stop = min(parameter.numel(), begin + owner.numel() - offset)
                if start < stop:  # else this rank's fragment holds nothing of the factor
                    self.held.append(Run(number, factor, start, owner, offset + start - begin, stop - start))
        self.tracked = self.held
