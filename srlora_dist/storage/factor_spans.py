"""Which spans of the factors and of their optimizer state this rank holds, and where they lie."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class OwnedSpan:
    """The span of a parameter that this rank's optimizer holds: of its weight, its gradient and its moments alike.

    Args:
        owner: The tensor that the optimizer steps: the parameter itself, or a flat fragment of several parameters.
        offset: Offset of the span in the flattened owner, in elements.
        start: Offset of the span in the flattened parameter, in elements.
        numel: Length of the span; 0 if this rank holds nothing of the parameter.
    """

    owner: Tensor
    offset: int
    start: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """This span of the owner, of its gradient or of one of its moments, as a view."""
        return local_part(tensor).view(-1)[self.offset : self.offset + self.numel]


@dataclass(eq=False)
class FactorSpan(OwnedSpan):
    """The span of one factor.

    Args:
        site: Index of the site.
        factor: ``"A"`` or ``"B"``.
    """

    site: int
    factor: str


def by_site(spans: list[FactorSpan]) -> dict[int, list[FactorSpan]]:
    """Spans by the index of their site."""
    found: dict[int, list[FactorSpan]] = defaultdict(list)
    for span in spans:
        found[span.site].append(span)
    return found


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: its shard if it is a DTensor, else all of it."""
    # Detached after to_local(), because detaching a DTensor is slow; without autograd to_local() needs no detach.
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.detach() if torch.is_grad_enabled() else tensor
