"""Describes one adapted linear layer: its W, A and B, with their shapes and types. It knows no ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from srlora_dist.config.weight_type import WeightType
from srlora_dist.layers.site_state import SiteState

FUSED = "srlora_fused"
"""Name of the frozen second adapter that holds what is fused where W itself is never written."""


@dataclass(eq=False)
class Site:
    """One adapted linear layer, ``y = x (W + scale * B A)^T``.

    Args:
        name: Name of the layer in the untouched base model.
        lora: PEFT's layer around it.
        weight: W, stored as (m, n); or as (n, m) if ``transposed``, or as a packed payload if ``quantised``. Under
            ZeRO-3 a placeholder that knows its shape.
        lora_a: A, shape (r, n).
        lora_b: B, shape (m, r).
        shape: (m, n).
        rank: r, the number of pairs.
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA.
        transposed: Whether W is stored as its transpose (GPT-2's Conv1D).
        quantised: ``nf4``, ``fp4``, ``int8``, with ``-double`` where the scales are quantised too; else empty.
        fused_a: A of the second adapter, shape (R, n), or None where W is edited in place.
        fused_b: B of the second adapter, shape (m, R), or None likewise; its scale is that of the site.
        fused_rank: R, the number of pairs that the second adapter has room for.
        state: How far the method has got here.
    """

    name: str
    lora: LoraLayer
    weight: nn.Parameter
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    shape: tuple[int, int]
    rank: int
    scale: float
    transposed: bool = False
    quantised: str = ""
    fused_a: nn.Parameter | None = None
    fused_b: nn.Parameter | None = None
    fused_rank: int = 0
    state: SiteState = field(default_factory=SiteState)

    @property
    def num_first(self) -> int:
        """Number of directions that switch 0 takes: a small matrix may have fewer than the site has pairs."""
        return min(self.rank, self.state.target_rank)

    def factor(self, name: str) -> nn.Parameter:
        """The parameter called ``"A"`` or ``"B"``."""
        return self.lora_a if name == "A" else self.lora_b

    def factor_shape(self, name: str) -> torch.Size:
        """Shape of the whole factor ``"A"`` or ``"B"``, however it is stored."""
        return self._pairs_shape(name, self.rank)

    def fused_shape(self, name: str) -> torch.Size:
        """Shape of the whole factor of the second adapter."""
        return self._pairs_shape(name, self.fused_rank)

    @property
    def num_factor_elements(self) -> int:
        """Elements of A and B together."""
        return self.rank * sum(self.shape)

    def _pairs_shape(self, name: str, num_pairs: int) -> torch.Size:
        return torch.Size((num_pairs, self.shape[1]) if name == "A" else (self.shape[0], num_pairs))


PAIR_DIM = {"A": 0, "B": 1}
"""Which dimension of a factor counts pairs."""


def describe_base(sites: list[Site]) -> str:
    """The type of the weights that an adapter was trained on, and therefore belongs to."""
    return " and ".join(Counter(map(_stored_as, sites)))


def _stored_as(site: Site) -> str:
    if not site.quantised:
        return str(site.weight.dtype).removeprefix("torch.")
    computes_in = getattr(site.lora.get_base_layer(), "compute_dtype", None)
    kind, _, double = site.quantised.partition("-")
    return str(WeightType(str(computes_in or "").removeprefix("torch."), kind, bool(double)))


def quantisation(layer: nn.Module) -> str:
    """How bitsandbytes stores a layer's weight, by the name of its class: that package may not be installed."""
    kinds = {kind.__name__ for kind in type(layer).__mro__}
    if "Linear4bit" in kinds:
        # FSDP2 puts a plain DTensor in the place of the weight; the layer still knows.
        state = getattr(layer.weight, "quant_state", None) or layer.quant_state
        if state is None:
            raise ValueError("a 4-bit layer is not quantised yet: move the model to its device first")
        return state.quant_type + ("-double" if state.nested else "")
    return "int8" if "Linear8bitLt" in kinds else ""
