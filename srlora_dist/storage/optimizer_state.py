"""The optimizer behind a storage: which moments it keeps, how to reset those of a span, and hooks around its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from srlora_dist.layers.site import Site
from srlora_dist.storage.factor_spans import OwnedSpan

FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "state1")
SECOND_MOMENTS = ("exp_avg_sq", "state2")

# The classes of bitsandbytes also have 8-bit, 32-bit and paged forms under longer names.
ELEMENTWISE = {
    "torch": ("Adam", "AdamW", "SGD", "NAdam", "RAdam"),
    "deepspeed": ("DeepSpeedCPUAdam", "FusedAdam"),
    "bitsandbytes": ("Adam", "AdamW", "SGD"),
}
"""Optimizers, by package, whose every moment has the shape of the weight."""

ADAM = ("Adam", "AdamW", "DeepSpeedCPUAdam", "FusedAdam")
"""The optimizers among them that divide both moments by one minus their decay to the power of the step."""


def require_resettable(optimizer: Optimizer, optimizer_reset: str, iterates: Sequence[str] = ()) -> None:
    """Refuse a reset that the layout of the optimizer's state does not permit.

    Args:
        optimizer: The innermost torch optimizer.
        optimizer_reset: ``srlora.optimizer_reset``.
        iterates: Names of the parts of its state that hold weights; see ``optimizer_trial.py``.

    Raises:
        ValueError: The optimizer cannot be reset in this way. The message gives the reason and the remedy.
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
        reason = "it keeps its second moment as one number per row and one per column, which pairs share"
        remedy = "choose first_moment or keep"
    raise ValueError(f"srlora.optimizer_reset {optimizer_reset!r} is not supported with {name}: {reason}; {remedy}")


def is_known(kind: type) -> bool:
    """Whether exactly this class (not a subclass) keeps floating-point moments in the shape of the weight."""
    return _is_elementwise(kind) and kind.__module__.split(".")[0] != "bitsandbytes"


def _is_elementwise(kind: type) -> bool:
    return _plain_name(kind) in ELEMENTWISE.get(kind.__module__.split(".")[0], ())


def _plain_name(kind: type) -> str:
    return kind.__name__.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")


def reset_moments_(
    optimizer: Optimizer, span: OwnedSpan, places: Tensor, optimizer_reset: str, second_moment: float = 0.0
) -> None:
    """Reset the moments of some elements of a span, as ``srlora.optimizer_reset`` says.

    Args:
        optimizer: The innermost torch optimizer.
        span: The span, of one of the tensors that the optimizer steps.
        places: Offsets of the elements in the span, int64 on the CPU.
        optimizer_reset: ``srlora.optimizer_reset``.
        second_moment: What the second moments become with ``survivors``.
    """
    for moment, value in _resettable_moments(optimizer, span.owner, optimizer_reset, second_moment):
        span.of(moment).index_fill_(0, places.to(moment.device), value)


def moments_of(optimizer: Optimizer, span: OwnedSpan) -> list[Tensor]:
    """All moments that a switch may reset, of the whole tensor that the span belongs to."""
    return [moment for moment, _ in _resettable_moments(optimizer, span.owner, "zero")]


def second_moment_of(optimizer: Optimizer, span: OwnedSpan) -> Tensor:
    """The second moment of a span, flat; 0 before the first step."""
    state = optimizer.state.get(span.owner, {})
    return next((span.of(state[key]) for key in SECOND_MOMENTS if key in state), torch.zeros(span.numel))


def _resettable_moments(
    optimizer: Optimizer, owner: Tensor, optimizer_reset: str, second_moment: float = 0.0
) -> Iterator[tuple[Tensor, float]]:
    """The moments of a stepped tensor that a switch resets, each with the number that it becomes."""
    state = optimizer.state.get(owner, {})
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


def call_around_steps(
    optimizer: Optimizer, before: Callable[[list[Tensor]], None], after: Callable[[list[Tensor]], None]
) -> list[RemovableHandle]:
    """Call functions ahead of and behind each step of an optimizer.

    Args:
        optimizer: The innermost torch optimizer.
        before: Gets the tensors that are about to be stepped, with their final gradients in ``.grad``.
        after: Gets the tensors that were stepped, before DeepSpeed copies them to the model.

    Returns:
        Handles that remove the two hooks.
    """

    def stepped(optimizer: Optimizer) -> list[Tensor]:
        return [owner for group in optimizer.param_groups for owner in group["params"]]

    def pre_hook(optimizer: Optimizer, *_: object) -> None:
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "the optimizer unscales fp16 gradients itself (fused=True with a GradScaler), so they cannot be "
                "observed: use fused=False, or train in fp32"
            )
        before(stepped(optimizer))

    return [
        optimizer.register_step_pre_hook(pre_hook),
        optimizer.register_step_post_hook(lambda optimizer, *_: after(stepped(optimizer))),
    ]


def not_stepped_error(sites: list[Site], parameter: nn.Parameter) -> ValueError:
    """The error of an optimizer that does not train a parameter."""
    names = [f"the LoRA parameters of {s.name}" for s in sites if parameter is s.lora_a or parameter is s.lora_b]
    what = names[0] if names else f"a trainable parameter of shape {tuple(parameter.shape)}"
    return ValueError(f"the optimizer does not hold {what}: build it from all trainable ones, or freeze the others")
