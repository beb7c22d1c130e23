"""Tries on a small parameter of its own what an optimizer keeps, before a run depends on it."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srlora_dist.storage.optimizer_state import is_known

logger = logging.getLogger(__name__)

LARGEST = 99_999
"""Elements of the parameter that is tried: bitsandbytes keeps 8 bits from 4,096 on, and pages from 100,000 on."""

VALUE, GRADIENT = 100.0, 1e-3
"""Far apart, so that a state that holds weights is told from one that holds moments."""


@dataclass
class TriedState:
    """What an optimizer keeps after one step.

    Args:
        optimizer: Name of its class.
        kept: The parameter that was stepped in each group, with its state by name.
    """

    optimizer: str
    kept: list[tuple[Tensor, dict[str, object]]]

    def iterates(self) -> list[str]:
        """Names of what holds weights, such as the z of schedule-free optimizers, which a switch does not restart."""
        return [
            key
            for parameter, state in self.kept
            for key, value in state.items()
            if torch.is_tensor(value)
            and value.is_floating_point()
            and value.shape == parameter.shape
            and bool(((value - VALUE).abs() < VALUE / 10).all())
        ]

    def problem(self) -> str | None:
        """Why a checkpoint cannot hold it, or None."""
        parts = ((key, value, parameter) for parameter, state in self.kept for key, value in state.items())
        found = (why_not_saved(self.optimizer, *part) for part in parts)
        return next((why for why in found if why is not None), None)


def why_not_saved(optimizer: str, key: str, value: object, owner: Tensor) -> str | None:
    """Why a part of an optimizer's state cannot be cut by elements and put together again, or None.

    Args:
        optimizer: Name of its class.
        key: Name of the part.
        value: The part.
        owner: The tensor that the optimizer steps.
    """
    if not torch.is_tensor(value) and isinstance(value, (int, float)):
        return None
    what = f"a {type(value).__name__}"
    if torch.is_tensor(value):
        is_plain = type(value) in (Tensor, nn.Parameter) or hasattr(value, "to_local")  # 4-bit moments are not
        if value.dim() == 0 or (is_plain and value.shape == owner.shape and value.is_floating_point()):
            return None
        of, kind = tuple(value.shape), "" if is_plain else f" in {what}"
        what = f"{value.dtype} of shape {of}{kind} for a tensor of {tuple(owner.shape)}"
    return (
        f"the {key} of {optimizer} is kept as {what}, which no other number of ranks could use: a checkpoint needs an "
        "optimizer with moments in floating point, such as AdamW"
    )


def try_state(optimizer: Optimizer, owners: Iterable[Tensor]) -> TriedState | None:
    """Let a copy of an optimizer take one step on a parameter like one of its own.

    Args:
        optimizer: Its hooks, its state and its parameters are left alone.
        owners: What it steps, the parts of this rank; the largest of at most ``LARGEST`` elements is imitated.

    Returns:
        None where nothing is to be found out, or the optimizer cannot be tried like this.
    """
    kind = type(optimizer)
    # A copy that goes would take along what belongs to the original; and DeepSpeed's own may communicate.
    if is_known(kind) or hasattr(kind, "__del__") or kind.__module__.startswith("deepspeed."):
        return None
    owners = sorted((owner for owner in owners if owner.numel()), key=lambda owner: owner.numel())
    if not owners:
        return None
    owner = next((owner for owner in reversed(owners) if owner.numel() <= LARGEST), owners[0])
    owner = owner.detach() if owner.dim() > 1 else owner.detach()[:LARGEST]
    parameters = [nn.Parameter(torch.full_like(owner, VALUE)) for _ in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, GRADIENT)
    # Not copy.copy, which leaves out what a kind of optimizer adds. A scheduler puts its own step on the instance.
    kept = {name: value for name, value in vars(optimizer).items() if name != "step"}
    tried = object.__new__(kind)
    vars(tried).update({k: copy.copy(v) if isinstance(v, (dict, list, set)) else v for k, v in kept.items()})
    tried.param_groups, tried.state = [], defaultdict(dict)
    for group, parameter in zip(optimizer.param_groups, parameters, strict=True):
        tried.param_groups.append({**group, "params": [parameter]})
        if "weight_decay" in group:  # as a part of the gradient it would look like a weight
            tried.param_groups[-1]["weight_decay"] = 0.0
    tried._optimizer_step_pre_hooks, tried._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        tried.step()
    except Exception as error:  # a kind of optimizer that nobody here knows
        logger.debug("what %s keeps could not be tried: %r", kind.__name__, error)
        return None
    return TriedState(kind.__name__, [(parameter.detach(), dict(tried.state[parameter])) for parameter in parameters])
