"""Which elements of the factors and of their optimizer state this rank holds, and where they lie."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class OwnedSpan:
    """A span of a parameter: the same one of the weight, the gradient and the moments that this rank's optimizer holds.

    Args:
        owner: The tensor that the optimizer steps: the parameter itself, or a flat fragment of several.
        offset: Offset in the flattened owner.
        start: Offset in the flattened parameter.
        numel: Length, 0 where this rank holds nothing of it.
    """

    owner: Tensor
    offset: int
    start: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """This span of the owner's weight, gradient or moment, a view."""
        return local_part(tensor).view(-1)[self.offset : self.offset + self.numel]


@dataclass(eq=False)
class FactorSpan(OwnedSpan):
    """The piece of one factor.

    Args:
        site: Number of the site.
        factor: ``"A"`` or ``"B"``.
    """

    site: int
    factor: str


def by_site(spans: list[FactorSpan]) -> dict[int, list[FactorSpan]]:
    """Runs by the number of their site."""
    found: dict[int, list[FactorSpan]] = defaultdict(list)
    for span in spans:
        found[span.site].append(span)
    return found


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it, or its shard if it is a DTensor."""
    # Without autograd to_local() makes no view, while to detach a DTensor takes long.
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.detach() if torch.is_grad_enabled() else tensor
