"""One adapted linear layer: its W, A and B, their shapes and types. It knows no ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from srlora_dist.config.weight_type import WeightType

FUSED = "srlora_fused"
"""Name of the frozen second adapter that holds what is fused where W itself is never written."""


@dataclass(eq=False)
class Site:
    """One adapted linear layer, ``y = x (W + scale * B A)^T``.

    Args:
        name: Of the layer in the untouched base model.
        lora: PEFT's layer around it.
        weight: W, stored as (m, n); or as (n, m) if ``transposed``, or as a packed payload if ``quantised``. Under
            ZeRO-3 a placeholder that knows its shape.
        lora_a: A, shape (r, n).
        lora_b: B, shape (m, r).
        shape: (m, n).
        rank: r.
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA.
        transposed: W is stored as its transpose (GPT-2's Conv1D).
        quantised: ``nf4``, ``fp4``, ``int8``, with ``-double`` where the scales are quantised too; else empty.
        fused_a: Rows of the second adapter, (R, n), or None where W is edited in place.
        fused_b: Columns of the second adapter, (m, R), likewise; its scale is that of the site.
        fused_rank: R, the pairs that the second adapter has room for.
        num_fused: Those of them in use.
        target_rank: Directions to use by the end of training, at most min(m, n).
        num_starts: Pairs that may be started in the whole run: as many as there are directions, or more where the site
            goes on without unused ones.
        num_taken: Number of the next direction; those used so far, while there are unused ones.
        held: The direction that the pair in each slot was started along, -1 for none.
        born: Optimizer steps that had been taken when it was started.
        left_out: The first batch has shown that the model bypasses the layer: W is untouched, and no switch takes it.
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
    num_fused: int = 0
    target_rank: int = 0
    num_starts: int = 0
    num_taken: int = 0
    held: list[int] | None = None
    born: list[int] | None = None
    left_out: bool = False

    @property
    def num_first(self) -> int:
        """Directions that switch 0 takes: a small matrix may have fewer than the site has pairs."""
        return min(self.rank, self.target_rank)

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
