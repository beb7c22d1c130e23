"""What ZeRO-3 and FSDP2 share: each rank holds one contiguous span of each parameter, which may be empty."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from srlora_dist.storage.base import Storage


class ShardedStorage(Storage):
    """Each rank edits, tracks and resets its own spans. Only the small factors are gathered during training."""

    gathers = True

    @abstractmethod
    def largest_span(self, parameter: nn.Parameter) -> int:
        """Elements of the longest span of a parameter on any rank."""

    def disjoint_span(self, number: int) -> tuple[Tensor, int]:
        return self.local_span(self.sites[number].weight)

    def gather_stored(self, number: int, to_rank: int) -> Tensor | None:
        weight = self.sites[number].weight
        span, _ = self.local_span(weight)
        padded = torch.zeros(self.largest_span(weight), dtype=span.dtype, device=self.device)
        padded[: span.numel()] = span
        spans = [torch.empty_like(padded) for _ in range(self.world_size)] if self.rank == to_rank else None
        dist.gather(padded.view(torch.uint8), spans and [part.view(torch.uint8) for part in spans], dst=to_rank)
        if self.rank != to_rank:
            return None
        shape = self.whole_shape(weight)
        return torch.cat(spans)[: shape.numel()].view(shape)

    def gather_parameters(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """See :meth:`Storage.gather_parameters`.

        Collective: one all-reduce of the parameters laid end to end, in float32. It is exact, because only one rank
            contributes to each element.
        """
        shapes = [self.whole_shape(parameter) for parameter in parameters]
        packed = torch.zeros(sum(shape.numel() for shape in shapes), device=self.device)
        wholes = packed.split([shape.numel() for shape in shapes])
        for parameter, whole in zip(parameters, wholes, strict=True):
            span, start = self.local_span(parameter)
            whole[start : start + span.numel()] = span
        self.all_reduce_(packed)
        return [
            whole.view(shape).to(parameter.dtype)
            for parameter, whole, shape in zip(parameters, wholes, shapes, strict=True)
        ]
