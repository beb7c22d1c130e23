"""PyTorch's FSDP2 (``fully_shard``): each parameter is a DTensor, and a rank holds some of its rows, or none."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from srlora_dist.layers.site import Site
from srlora_dist.layers.spans import longest_rows, rows
from srlora_dist.storage.factor_spans import OwnedSpan, local_part
from srlora_dist.storage.optimizer_state import not_stepped_error
from srlora_dist.storage.quantized import require_cuttable
from srlora_dist.storage.sharded import ShardedStorage


class Fsdp2Storage(ShardedStorage):
    """The optimizer steps the DTensors themselves; its moments are DTensors that are sharded in the same way."""

    name = "fsdp2"

    def __init__(self, optimizer: Optimizer, sites: list[Site], sharded: list[FSDPModule]) -> None:
        super().__init__(optimizer, sites)
        for site in sites:
            _require_rows(site, self.world_size)
        kind = sites[0].lora_a.device_mesh.device_type  # parameters may be offloaded to the CPU
        self.device = torch.device(kind, torch.accelerator.current_device_index()) if kind != "cpu" else self.device
        self._sharded = sharded
        self._stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._map_factors()

    def owned_span(self, parameter: nn.Parameter) -> OwnedSpan:
        if id(parameter) not in self._stepped:
            raise not_stepped_error(self.sites, parameter)
        if not isinstance(parameter, DTensor) or parameter.placements != (Shard(0),):
            raise ValueError(
                "FSDP2 does not cut it into rows (ignored_params), so that no rank answers for it: let fully_shard "
                "have it too, or freeze it"
            )
        span, start = self.local_span(parameter)
        return OwnedSpan(parameter, 0, start, span.numel())

    def largest_span(self, parameter: nn.Parameter) -> int:
        return longest_rows(parameter.shape, self.world_size)

    def local_span(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        return local_part(parameter).view(-1), rows(parameter.shape, self.world_size, self.rank).start

    def to_rest_layout_(self) -> None:
        """Drop the gathered weights that FSDP keeps after a forward pass, which an edit would not reach."""
        for module in self._sharded:
            module.reshard()


def _require_rows(site: Site, world_size: int) -> None:
    """Raise unless every parameter of a site is sharded by rows over all ranks."""
    if site.quantised == "int8" or not isinstance(site.weight, DTensor):
        require_cuttable(site)
    for parameter in (site.weight, site.lora_a, site.lora_b, site.fused_a, site.fused_b):
        if parameter is None:
            continue
        if not isinstance(parameter, DTensor):
            raise ValueError(
                f"{site.name} is in part not sharded by FSDP2: call fully_shard on the whole model, or on none of it"
            )
        if parameter.placements != (Shard(0),) or parameter.device_mesh.size() != world_size:
            raise ValueError(
                f"{site.name} is placed as {parameter.placements} on a mesh of {tuple(parameter.device_mesh.shape)}"
                f"{_known_as(parameter)}, and SRLoRA supports FSDP2 with rows cut over all {world_size} ranks: use a "
                f"mesh of one dimension, ({world_size},)"
            )


def _known_as(parameter: DTensor) -> str:
    """The usual name of a placement that is not supported."""
    if any(placement.is_replicate() for placement in parameter.placements) and parameter.device_mesh.ndim > 1:
        return ", which is HSDP"
    return ", which is FSDP2 with tensor parallelism" if parameter.device_mesh.ndim > 1 else ""
