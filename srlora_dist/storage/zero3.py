"""DeepSpeed ZeRO-3: every parameter is flattened and cut into one span per rank, the last one padded.

``parameter.ds_tensor`` is this rank's span. Small parameters ("persistent" ones) are also whole in ``parameter.data``
while they are AVAILABLE. The optimizer steps flat fp32 sub-groups, which hold the spans of the trainable parameters end
to end. hpZ keeps a second span for the backward pass, cut among the ranks of a node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srlora_dist.layers.site import Site
from srlora_dist.layers.spans import longest_padded, padded
from srlora_dist.storage.factor_spans import OwnedSpan
from srlora_dist.storage.optimizer_state import not_stepped_error
from srlora_dist.storage.sharded import ShardedStorage


class Zero3Storage(ShardedStorage):
    """Maps DeepSpeed's flat sub-groups to sites, and keeps the copies beside a span up to date."""

    name = "zero3"

    def __init__(self, optimizer: Optimizer, sites: list[Site], zero_optimizer: object) -> None:
        super().__init__(optimizer, sites)
        _refuse_unsupported(sites, zero_optimizer)
        self.loss_scaler = zero_optimizer.loss_scaler
        self._coordinator = zero_optimizer.parameter_offload.get_param_coordinator()
        self._sub_groups = zero_optimizer.fp32_partitioned_groups_flat
        self._places = {
            id(parameter): (group, offset)
            for group, parameters in enumerate(zero_optimizer.fp16_groups)
            for parameter, offset in zip(parameters, _offsets(parameters), strict=True)
        }
        self._map_factors()

    def owned_span(self, parameter: nn.Parameter) -> OwnedSpan:
        if id(parameter) not in self._places:
            raise not_stepped_error(self.sites, parameter)
        group, offset = self._places[id(parameter)]
        span, start = self.local_span(parameter)
        return OwnedSpan(self._sub_groups[group], offset, start, span.numel())

    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.ds_shape

    def copies(self, parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
        yield from (parameter.detach() for parameter in parameters if _is_whole(parameter))

    def weight_copies(self, number: int) -> Iterator[Tensor]:
        site = self.sites[number]
        if _is_whole(site.weight):  # then the residual is whole, too
            yield from (t.detach() for t in (site.weight, self.residuals.get(number)) if t is not None)
        yield from self.copies(factor for factor in (site.fused_a, site.fused_b) if factor is not None)

    def is_away(self, number: int) -> bool:
        return _is_away(self.sites[number].weight)

    def largest_span(self, parameter: nn.Parameter) -> int:
        return longest_padded(parameter.ds_numel, self.world_size)

    def local_span(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        start, numel = padded(parameter.ds_numel, self.world_size, self.rank)
        return parameter.ds_tensor.detach().view(-1)[:numel], start

    @contextmanager
    def in_memory(self, number: int) -> Iterator[None]:
        weight = self.sites[number].weight
        away = _is_away(weight)
        if away:
            weight.nvme_swapper.swap_in([weight], async_op=False)
        try:
            yield
        finally:
            if away:
                weight.nvme_swapper.swap_out_and_release([weight])

    def weight_to_edit(self, number: int) -> tuple[Tensor, int]:
        weight = self.sites[number].weight
        # A whole weight is edited whole, by the same call on every rank, so that all copies get the same bits.
        return (weight.detach().view(-1), 0) if _is_whole(weight) else self.local_span(weight)

    def held_bytes(self, parameter: nn.Parameter) -> int:
        whole = parameter.ds_numel * parameter.element_size() if parameter.ds_persist else 0
        return whole + parameter.partition_numel() * parameter.element_size()

    def after_edit(self, number: int) -> None:
        weight = self.sites[number].weight
        if _is_whole(weight):
            span, start = self.local_span(weight)
            span.copy_(weight.detach().view(-1)[start : start + span.numel()])
        _forget_secondary(weight)

    def to_rest_layout_(self) -> None:
        """Make persistent weights whole and all others sharded, whatever the last forward pass has left.

        Residuals and snapshots cover either the whole weight or this rank's span. With another layout than theirs,
        ranks would round the same element differently.

        Collective: after a forward pass without a backward pass, an all-gather of the persistent weights. The next
            forward pass then does not gather them.
        """
        weights = [site.weight for site in self.sites if not site.quantised]
        waiting = [weight for weight in weights if weight.ds_persist and not _is_whole(weight)]
        if waiting:
            waiting[0].all_gather(waiting)
        for weight in weights:
            if _is_whole(weight) and not weight.ds_persist:
                weight.partition()

    def forget_fetch_order(self) -> None:
        """Make DeepSpeed record the order of its gathers anew.

        It takes the order of the first pass for all steps to come, and after a forward-only pass it would gather
        everything twice. It never clears its cache of what to release when, so that is cleared here.
        """
        if not self._coordinator.is_invalid_trace():
            self._coordinator._invalidate_trace()
        when = getattr(type(self._coordinator), "_PartitionedParameterCoordinator__params_to_release", None)
        if hasattr(when, "cache_clear"):
            when.cache_clear()

    def allocate_residuals(self, device: str) -> None:
        self.to_rest_layout_()
        super().allocate_residuals(device)

    def writable_copies_(self, parameter: nn.Parameter) -> list[tuple[Tensor, int]]:
        _forget_secondary(parameter)
        whole = [(parameter.detach().view(-1), 0)] if _is_whole(parameter) else []
        return [self.local_span(parameter), *whole]


def require_async_io() -> None:
    """Check that DeepSpeed can build the extension that reads and writes NVMe.

    Raises:
        ValueError: The library that it needs is missing.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError("parameters on NVMe need libaio: install libaio-dev (Debian) or libaio-devel (Fedora)")


def _offsets(parameters: list[nn.Parameter]) -> list[int]:
    """Offset of each parameter's span in the flat tensor of its sub-group."""
    offsets = [0]
    for parameter in parameters[:-1]:
        offsets.append(offsets[-1] + parameter.partition_numel())
    return offsets


def _is_whole(parameter: nn.Parameter) -> bool:
    return parameter.ds_status.name == "AVAILABLE"


def _is_away(parameter: nn.Parameter) -> bool:
    """Whether this rank's span lies on NVMe, where DeepSpeed puts spans of 1 MiB and more."""
    return parameter.ds_tensor.status.name == "NOT_AVAILABLE"


def _forget_secondary(parameter: nn.Parameter) -> None:
    """Drop the span that hpZ keeps for the backward pass. The next forward pass makes a new one."""
    parameter.ds_secondary_tensor = None


def _refuse_unsupported(sites: list[Site], zero_optimizer: object) -> None:
    """Raise if some weights or optimizer state are not where this file expects them."""
    if zero_optimizer.swap_optimizer:
        raise ValueError("offload_optimizer to nvme is not supported: set offload_optimizer.device to cpu or none")
    if zero_optimizer.offload_optimizer and zero_optimizer.partial_offload < 1:
        raise ValueError(f"offload_optimizer.ratio {zero_optimizer.partial_offload} is not supported: set it to 1")
    for setting in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if getattr(zero_optimizer.parameter_offload, setting):
            raise ValueError(
                f"{setting} is not supported, for it computes with other weights than it keeps: set it to false"
            )
    for site in sites:
        if any(
            _is_away(factor) for factor in (site.lora_a, site.lora_b, site.fused_a, site.fused_b) if factor is not None
        ):
            raise ValueError(
                f"the adapters of {site.name} are so large that offload_param puts them on nvme, which cannot be: "
                "set offload_param.device to cpu"
            )
