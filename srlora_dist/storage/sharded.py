"""What ZeRO-3 and FSDP2 share: each parameter is cut into one contiguous run a rank, some of which may be empty."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from srlora_dist.storage.base import Storage


class CutWeights(Storage):
    """A rank edits, tracks and resets its own runs; only the small factors are ever gathered."""

    gathers = True

    @abstractmethod
    def largest_run(self, parameter: nn.Parameter) -> int:
        """Elements of the longest run that a rank holds of a parameter."""

    def weight_run(self, number: int) -> tuple[Tensor, int]:
        return self.parameter_run(self.sites[number].weight)

    def gather_stored(self, number: int, to_rank: int) -> Tensor | None:
        weight = self.sites[number].weight
        run, _ = self.parameter_run(weight)
        padded = torch.zeros(self.largest_run(weight), dtype=run.dtype, device=self.device)
        padded[: run.numel()] = run
        runs = [torch.empty_like(padded) for _ in range(self.world_size)] if self.rank == to_rank else None
        dist.gather(padded.view(torch.uint8), runs and [part.view(torch.uint8) for part in runs], dst=to_rank)
        if self.rank != to_rank:
            return None
        shape = self.whole_shape(weight)
        return torch.cat(runs)[: shape.numel()].view(shape)

    def gather_parameters(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """See :meth:`Storage.gather_parameters`.

        Collective: one all-reduce of the parameters laid end to end, in float32; it is exact, for only one rank adds to
        an element.
        """
        shapes = [self.whole_shape(parameter) for parameter in parameters]
        packed = torch.zeros(sum(shape.numel() for shape in shapes), device=self.device)
        wholes = packed.split([shape.numel() for shape in shapes])
        for parameter, whole in zip(parameters, wholes, strict=True):
            run, start = self.parameter_run(parameter)
            whole[start : start + run.numel()] = run
        self.all_reduce_(packed)
        return [
            whole.view(shape).to(parameter.dtype)
            for parameter, whole, shape in zip(parameters, wholes, shapes, strict=True)
        ]
