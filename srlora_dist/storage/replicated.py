"""Every rank holds every weight and factor whole: a single process, or DDP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srlora_dist.layers.site import Site
from srlora_dist.layers.spans import deal_by_size, whole
from srlora_dist.storage.base import Storage
from srlora_dist.storage.factor_spans import OwnedSpan
from srlora_dist.storage.optimizer_state import not_stepped_error


class ReplicatedStorage(Storage):
    """The storages that keep whole weights on every rank. Each site is assigned to one rank, balanced by size."""

    def __init__(self, optimizer: Optimizer, sites: list[Site]) -> None:
        super().__init__(optimizer, sites)
        for site in sites:
            if hasattr(site.weight, "to_local"):
                raise ValueError(
                    f"the weight of {site.name} is cut by tensor parallelism, which is not supported: load the model "
                    "without tp_plan, and use FSDP2 or ZeRO-3"
                )
            if site.weight.device != sites[0].lora_a.device:
                raise ValueError(
                    f"the weight of {site.name} is on {site.weight.device}, where a device_map has put it: load the "
                    "whole model on one device, or use FSDP2 or ZeRO-3"
                )
            if not site.weight.is_contiguous():
                raise ValueError(f"the weight of {site.name} is not contiguous: call .contiguous() on it first")
        self.dealt_to = deal_by_size([site.num_factor_elements for site in sites], self.world_size)

    def local_span(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        return parameter.detach().view(-1), 0

    def copies(self, parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
        yield from (parameter.detach() for parameter in parameters)

    def weight_copies(self, number: int) -> Iterator[Tensor]:
        site = self.sites[number]
        whole = (site.weight, self.residuals.get(number), site.fused_a, site.fused_b)
        return (tensor.detach() for tensor in whole if tensor is not None)

    def disjoint_span(self, number: int) -> tuple[Tensor, int]:
        flat = self.sites[number].weight.detach().view(-1)
        return (flat if self.dealt_to[number] == self.rank else flat[:0]), 0

    def gather_stored(self, number: int, to_rank: int) -> Tensor | None:
        return self.sites[number].weight.detach() if self.rank == to_rank else None

    def gather_parameters(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        return [parameter.detach() for parameter in parameters]


class PlainStorage(ReplicatedStorage):
    """The optimizer holds everything too. A rank tracks only the sites that are assigned to it."""

    cuts_optimizer = False

    def __init__(self, optimizer: Optimizer, sites: list[Site]) -> None:
        super().__init__(optimizer, sites)
        self.name = "ddp" if self.world_size > 1 else "plain"
        self._owners = self.find_owners()
        self._map_factors()
        self.tracked = [span for span in self.held if self.dealt_to[span.site] == self.rank]

    def find_owners(self) -> dict[int, Tensor]:
        """The tensor that the optimizer steps for each trained parameter, by the parameter's ``id``."""
        return {id(parameter): parameter for group in self.optimizer.param_groups for parameter in group["params"]}

    def owned_span(self, parameter: nn.Parameter) -> OwnedSpan:
        if id(parameter) not in self._owners:
            raise not_stepped_error(self.sites, parameter)
        return OwnedSpan(self._owners[id(parameter)], 0, *whole(parameter.numel()))

    def copies(self, parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
        for parameter in parameters:
            owner = self._owners[id(parameter)]
            yield from (tensor.detach() for tensor in ((parameter,) if owner is parameter else (parameter, owner)))
            state = self.optimizer.state.get(owner, {})
            yield from (state[key] for key in sorted(state) if torch.is_tensor(state[key]))
