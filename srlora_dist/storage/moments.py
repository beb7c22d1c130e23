"""Which optimizers keep moments that can be reset pair by pair, and how theirs are laid out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "state1")

# Of bitsandbytes these, with 8-bit, 32-bit and paged forms under longer names.
ELEMENTWISE = {
    "torch": ("Adam", "AdamW", "SGD", "NAdam", "RAdam"),
    "deepspeed": ("DeepSpeedCPUAdam", "FusedAdam"),
    "bitsandbytes": ("Adam", "AdamW", "SGD"),
}
"""Optimizers, by package, whose every moment has the shape of the weight."""


def require_resettable(optimizer: Optimizer, optimizer_reset: str) -> None:
    """Refuse a reset that the layout of the optimizer's state does not permit.

    Raises:
        ValueError: With the reason and the remedy.
    """
    if optimizer_reset == "keep" or any(_is_elementwise(kind) for kind in type(optimizer).__mro__):
        return
    name = type(optimizer).__name__
    reason, remedy = "the layout of its state is not known", "use AdamW or SGD, or choose keep"
    if name == "Adafactor":  # a first moment, where it has one, has the shape of the weight
        if optimizer_reset == "first_moment":
            return
        reason = "it keeps its second moment as one number a row and one a column, and pairs share those"
        remedy = "choose first_moment or keep"
    raise ValueError(f"srlora.optimizer_reset {optimizer_reset!r} is not supported with {name}: {reason}; {remedy}")


def _is_elementwise(kind: type) -> bool:
    name = kind.__name__.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")
    return name in ELEMENTWISE.get(kind.__module__.split(".")[0], ())


def resettable_moments(state: dict[str, object], owner: Tensor, optimizer_reset: str) -> Iterator[tuple[Tensor, float]]:
    """The moments of a tensor that a switch resets, each with the number that stands for zero in it."""
    for key, moment in state.items():
        if optimizer_reset == "keep" or (optimizer_reset == "first_moment" and key not in FIRST_MOMENTS):
            continue
        if not torch.is_tensor(moment) or moment.shape != owner.shape:
            continue
        if moment.is_floating_point():
            yield moment, 0.0
        else:  # 8-bit codes, which a table turns into shares of the largest value of their block
            yield moment, float(state[key.replace("state", "qmap")].abs().argmin())
