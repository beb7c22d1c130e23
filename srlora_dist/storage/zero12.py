"""DeepSpeed ZeRO-1 and ZeRO-2: whole model weights on every rank, optimizer state cut into flat fragments.

The trainable parameters of a group are laid end to end and cut into one fragment a rank. The optimizer steps the fp32
fragment, then the whole parameters are rebuilt from all of them, so a written pair must go to both copies.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from srlora_dist.pairs import fill_pairs_
from srlora_dist.sites import PAIR_DIM, Site
from srlora_dist.storage.base import Run
from srlora_dist.storage.plain import PlainStorage


class Zero12Storage(PlainStorage):
    """A rank tracks the runs of factors that fall into its fp32 fragment."""

    def __init__(self, optimizer: Optimizer, sites: list[Site], zero_optimizer: object) -> None:
        super().__init__(optimizer, sites)
        self.name = "zero2" if zero_optimizer.partition_gradients else "zero1"
        fragments = zero_optimizer.single_partition_of_fp32_groups
        self.held = []
        for number, site in enumerate(sites):
            for factor in ("A", "B"):
                mapping = site.factor(factor)._hp_mapping
                if mapping is None:  # this rank's fragment holds nothing of the factor
                    continue
                self.held.append(
                    Run(
                        site=number,
                        factor=factor,
                        start=mapping.lp_fragment_address.start,
                        owner=fragments[mapping.param_group_index],
                        offset=mapping.hp_fragment_address.start,
                        numel=mapping.hp_fragment_address.numel,
                    )
                )
        self.tracked = self.held

    def write_copies_(self, number: int, factor: str, slots: Tensor, whole: Tensor) -> None:
        parameter = self.sites[number].factor(factor)
        fill_pairs_(parameter.detach().view(-1), 0, PAIR_DIM[factor], slots, whole)
