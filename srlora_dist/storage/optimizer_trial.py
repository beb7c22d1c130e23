"""Steps a copy of the optimizer on a small parameter, to see which state it keeps before a run depends on it."""

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
"""Most elements of the small parameter. bitsandbytes keeps 8-bit state from 4,096 on and pages it from 100,000 on."""

VALUE, GRADIENT = 100.0, 1e-3
"""Weight and gradient of the small parameter: far apart, to tell a state of weights from a state of moments."""


@dataclass
class TriedState:
    """The state that an optimizer keeps after one step.

    Args:
        optimizer: Name of the optimizer's class.
        kept: For each group the parameter that was stepped, with its state by name.
    """

    optimizer: str
    kept: list[tuple[Tensor, dict[str, object]]]

    def iterates(self) -> list[str]:
        """Names of the parts that hold weights, which a switch cannot reset: ``z`` of schedule-free optimizers."""
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
        """Why a checkpoint cannot hold this state, or None."""
        parts = ((key, value, parameter) for parameter, state in self.kept for key, value in state.items())
        found = (why_not_saved(self.optimizer, *part) for part in parts)
        return next((why for why in found if why is not None), None)


def why_not_saved(optimizer: str, key: str, value: object, owner: Tensor) -> str | None:
    """Why a part of an optimizer's state cannot be cut into spans and put together again, or None.

    Args:
        optimizer: Name of the optimizer's class.
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
    """Let a copy of an optimizer take one step on a small parameter that is like one of its own.

    Args:
        optimizer: The optimizer. Its hooks, state and parameters stay as they are.
        owners: This rank's parts of the tensors that it steps. The largest one of at most ``LARGEST`` elements is
            imitated.

    Returns:
        The state after the step; None where it is known anyway, or the optimizer cannot be tried.
    """
    kind = type(optimizer)
    # Deleting the copy could free what belongs to the original, and DeepSpeed's optimizers may communicate.
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
    # copy.copy would leave out attributes of a subclass. A scheduler replaces ``step`` on the instance.
    kept = {name: value for name, value in vars(optimizer).items() if name != "step"}
    tried = object.__new__(kind)
    vars(tried).update({k: copy.copy(v) if isinstance(v, (dict, list, set)) else v for k, v in kept.items()})
    tried.param_groups, tried.state = [], defaultdict(dict)
    for group, parameter in zip(optimizer.param_groups, parameters, strict=True):
        tried.param_groups.append({**group, "params": [parameter]})
        if "weight_decay" in group:  # decay that is part of the gradient would look like a weight
            tried.param_groups[-1]["weight_decay"] = 0.0
    tried._optimizer_step_pre_hooks, tried._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        tried.step()
    except Exception as error:  # an unknown optimizer can raise anything
        logger.debug("what %s keeps could not be tried: %r", kind.__name__, error)
        return None
    return TriedState(kind.__name__, [(parameter.detach(), dict(tried.state[parameter])) for parameter in parameters])
