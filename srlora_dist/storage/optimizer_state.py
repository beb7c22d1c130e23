"""Which optimizers keep moments that can be reset pair by pair, and how theirs are laid out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "state1")
SECOND_MOMENTS = ("exp_avg_sq", "state2")

# Of bitsandbytes these, with 8-bit, 32-bit and paged forms under longer names.
ELEMENTWISE = {
    "torch": ("Adam", "AdamW", "SGD", "NAdam", "RAdam"),
    "deepspeed": ("DeepSpeedCPUAdam", "FusedAdam"),
    "bitsandbytes": ("Adam", "AdamW", "SGD"),
}
"""Optimizers, by package, whose every moment has the shape of the weight."""

ADAM = ("Adam", "AdamW", "DeepSpeedCPUAdam", "FusedAdam")
"""Those of them that divide both moments by one minus their decay to the power of the step."""


def require_resettable(optimizer: Optimizer, optimizer_reset: str, iterates: Sequence[str] = ()) -> None:
    """Refuse a reset that the layout of the optimizer's state does not permit.

    Args:
        optimizer: The innermost one.
        optimizer_reset: ``srlora.optimizer_reset``.
        iterates: Names of the parts of its state that hold weights, see :func:`try_state`.

    Raises:
        ValueError: With the reason and the remedy.
    """
    kinds = type(optimizer).__mro__
    name = type(optimizer).__name__
    if iterates:
        raise ValueError(
            f"{name} is not supported: its {iterates[0]} is a copy of the weights, towards which it would pull "
            "restarted pairs back, whatever srlora.optimizer_reset is; use AdamW or SGD"
        )
    reason, remedy = "the layout of its state is not known", "use AdamW or SGD, or choose keep"
    if optimizer_reset in ("survivors", "pair_steps"):
        if any(_is_elementwise(kind) and _plain_name(kind) in ADAM for kind in kinds) and not name.endswith("8bit"):
            return
        reason, remedy = "it is made for Adam with float32 moments", "use AdamW, or choose zero"
    elif optimizer_reset == "keep" or any(_is_elementwise(kind) for kind in kinds):
        return
    elif name == "Adafactor":  # a first moment, where it has one, has the shape of the weight
        if optimizer_reset == "first_moment":
            return
        reason = "it keeps its second moment as one number a row and one a column, and pairs share those"
        remedy = "choose first_moment or keep"
    raise ValueError(f"srlora.optimizer_reset {optimizer_reset!r} is not supported with {name}: {reason}; {remedy}")


def is_known(kind: type) -> bool:
    """Whether just this kind, none made from it, keeps moments in floating point of the shape of the weight."""
    return _is_elementwise(kind) and kind.__module__.split(".")[0] != "bitsandbytes"


def _is_elementwise(kind: type) -> bool:
    return _plain_name(kind) in ELEMENTWISE.get(kind.__module__.split(".")[0], ())


def _plain_name(kind: type) -> str:
    return kind.__name__.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")


def resettable_moments(
    state: dict[str, object], owner: Tensor, optimizer_reset: str, second_moment: float = 0.0
) -> Iterator[tuple[Tensor, float]]:
    """The moments of a tensor that a switch resets, each with the number that it becomes.

    Args:
        state: The optimizer's, of that tensor.
        owner: The tensor.
        optimizer_reset: ``srlora.optimizer_reset``.
        second_moment: What the second moments become with ``survivors``.
    """
    for key, moment in state.items():
        if optimizer_reset == "keep" or (optimizer_reset == "first_moment" and key not in FIRST_MOMENTS):
            continue
        if not torch.is_tensor(moment) or moment.shape != owner.shape:
            continue
        if moment.is_floating_point():
            survives = optimizer_reset == "survivors" and key not in FIRST_MOMENTS
            yield moment, second_moment if survives else 0.0
        else:  # 8-bit codes, which a table turns into shares of the largest value of their block
            yield moment, float(state[key.replace("state", "qmap")].abs().argmin())
