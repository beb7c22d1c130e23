"""DeepSpeed ZeRO-3: every parameter is flattened and cut into one run a rank, the last one padded.

``parameter.ds_tensor`` is this rank's run; small parameters ("persistent" ones) are also kept whole in
``parameter.data`` while they are AVAILABLE. The optimizer steps flat fp32 sub-groups, which hold the runs of the
trainable parameters end to end.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from srlora_dist.pairs import add_pairs_, fill_pairs_
from srlora_dist.sites import PAIR_DIM, Site
from srlora_dist.storage.base import Run, Storage, require_stepped


class Zero3Storage(Storage):
    """A rank edits, tracks and resets its own runs; only the small factors are ever gathered."""

    name = "zero3"

    def __init__(self, optimizer: Optimizer, sites: list[Site], zero_optimizer: object) -> None:
        super().__init__(optimizer, sites)
        _refuse_unsupported(sites, zero_optimizer)
        positions = {
            id(parameter): (group, offset)
            for group, parameters in enumerate(zero_optimizer.fp16_groups)
            for parameter, offset in zip(parameters, _offsets(parameters), strict=True)
        }
        for number, site in enumerate(sites):
            for factor in ("A", "B"):
                parameter = site.factor(factor)
                require_stepped(site, id(parameter) in positions)
                group, offset = positions[id(parameter)]
                start, numel = _span(parameter)
                owner = zero_optimizer.fp32_partitioned_groups_flat[group]
                self.held.append(Run(number, factor, start, owner, offset, numel))
        self.tracked = self.held

    def weight_run(self, number: int) -> tuple[Tensor, int]:
        return _local_run(self.sites[number].weight)

    def gather_weight(self, number: int) -> Tensor | None:
        weight = self.sites[number].weight
        if _is_whole(weight):
            return weight.detach() if self.rank == 0 else None
        run = weight.ds_tensor.detach().to(self.device)
        runs = [torch.empty_like(run) for _ in range(self.world_size)] if self.rank == 0 else None
        dist.gather(run, runs, dst=0)
        if self.rank != 0:
            return None
        return torch.cat(runs)[: weight.ds_numel].view(self.sites[number].shape)

    def gather_parameters(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """See :meth:`Storage.gather_parameters`.

        Collective: one all-reduce of the parameters laid end to end; it is exact, for only one rank adds to an element.
        """
        sizes = [parameter.ds_numel for parameter in parameters]
        packed = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=self.device)
        wholes = packed.split(sizes)
        for parameter, whole in zip(parameters, wholes, strict=True):
            run, start = _local_run(parameter)
            whole[start : start + run.numel()] = run
        self.all_reduce_(packed)
        return [whole.view(parameter.ds_shape) for parameter, whole in zip(parameters, wholes, strict=True)]

    def model_run(self, run: Run) -> Tensor:
        return _local_run(self.sites[run.site].factor(run.factor))[0]

    def edit_weight_(self, number: int, left: Tensor, right: Tensor) -> None:
        weight = self.sites[number].weight
        run, start = _local_run(weight)
        if _is_whole(weight):
            # One edit of the whole, the same call on every rank, then this rank's run is a copy of a part of it.
            add_pairs_(weight.detach().view(-1), 0, left, right)
            run.copy_(weight.detach().view(-1)[start : start + run.numel()])
        else:
            add_pairs_(run, start, left.to(run.device), right.to(run.device))

    def write_copies_(self, number: int, factor: str, slots: Tensor, whole: Tensor) -> None:
        parameter = self.sites[number].factor(factor)
        run, start = _local_run(parameter)
        fill_pairs_(run, start, PAIR_DIM[factor], slots, whole)
        if _is_whole(parameter):
            fill_pairs_(parameter.detach().view(-1), 0, PAIR_DIM[factor], slots, whole)


def _span(parameter: nn.Parameter) -> tuple[int, int]:
    """Offset and length of this rank's run without the padding; the length of an empty run is 0."""
    start = min(parameter.partition_numel() * dist.get_rank(), parameter.ds_numel)
    return start, min(parameter.partition_numel(), parameter.ds_numel - start)


def _local_run(parameter: nn.Parameter) -> tuple[Tensor, int]:
    start, numel = _span(parameter)
    return parameter.ds_tensor.detach().view(-1)[:numel], start


def _offsets(parameters: list[nn.Parameter]) -> list[int]:
    """Where each parameter's run begins in the flat tensor of its sub-group."""
    offsets = [0]
    for parameter in parameters[:-1]:
        offsets.append(offsets[-1] + parameter.partition_numel())
    return offsets


def _is_whole(parameter: nn.Parameter) -> bool:
    return parameter.ds_status.name == "AVAILABLE"


def _refuse_unsupported(sites: list[Site], zero_optimizer: object) -> None:
    """Raise where a part of the weights or of the optimizer is not where this file expects it."""
    if zero_optimizer.swap_optimizer:
        raise ValueError("offload_optimizer to nvme is not supported yet: set offload_optimizer.device to cpu or none")
    if zero_optimizer.offload_optimizer and zero_optimizer.partial_offload < 1:
        raise ValueError(f"offload_optimizer.ratio {zero_optimizer.partial_offload} is not supported: set it to 1")
    for site in sites:
        run = site.weight.ds_tensor
        if getattr(site.weight, "ds_secondary_tensor", None) is not None:
            raise ValueError("zero_hpz_partition_size > 1 is not supported yet: set it to 1")
        if hasattr(run, "ds_quant_scale"):
            raise ValueError("zero_quantized_nontrainable_weights is not supported: set it to false")
        if getattr(run.final_location, "value", run.final_location) == "nvme":
            raise ValueError("offload_param to nvme is not supported yet: set offload_param.device to none")
