"""DeepSpeed without ZeRO: whole weights, gradients and moments on every rank, as under DDP.

In float32 the optimizer steps the model's own parameters. In 16 bits DeepSpeed gives it a float32 copy of each, from
which the parameter is rebuilt after a step, so a pair must be written to both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from srlora_dist.layers.site import Site
from srlora_dist.storage.replicated import PlainStorage


class Zero0Storage(PlainStorage):
    """Plain storage plus the float32 copies of DeepSpeed's wrapper, if there is one."""

    def __init__(self, optimizer: Optimizer, sites: list[Site], wrapper: object | None) -> None:
        self._wrapper = wrapper
        if wrapper is not None:
            _undo_trial_step_(optimizer, wrapper)
            self.loss_scaler = wrapper.loss_scale_config
        super().__init__(optimizer, sites)
        self.name = "zero0"

    @override
    def find_owners(self) -> dict[int, Tensor]:
        if self._wrapper is None:
            return super().find_owners()
        return {id(parameter): copy for parameter, copy in _parameters_and_copies(self._wrapper)}

    @override
    def on_optimizer_step(
        self, before: Callable[[list[Tensor]], None], after: Callable[[list[Tensor]], None]
    ) -> list[RemovableHandle]:
        def if_it_happens(hook: Callable[[list[Tensor]], None], owners: list[Tensor]) -> None:
            # leave_out_bad_steps_ turns a step with a bad gradient into nothing.
            if not getattr(self.optimizer, "overflow", False):
                hook(owners)

        return super().on_optimizer_step(partial(if_it_happens, before), partial(if_it_happens, after))


def leave_out_bad_steps_(optimizer: Optimizer) -> None:
    """Skip steps with a NaN or infinite gradient, as DeepSpeed's wrappers do; for float32 it has no wrapper.

    The gradients are averaged already, so all ranks skip the same steps. DeepSpeed and Accelerate look at ``overflow``
    for a skipped step.

    Args:
        optimizer: The optimizer, not yet prepared, and before anything else observes its steps.
    """
    optimizer.overflow = False

    def pre_hook(optimizer: Optimizer, *_: object) -> None:
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in stepped if p.grad is not None])
        optimizer.overflow = not bool(norm.isfinite())
        if optimizer.overflow:
            for parameter in stepped:
                parameter.grad = None

    optimizer.register_step_pre_hook(pre_hook)


def _parameters_and_copies(wrapper: object) -> list[tuple[Tensor, Tensor]]:
    """Each trained parameter with its float32 copy."""
    groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
    return [pair for parameters, copies in groups for pair in zip(parameters, copies, strict=True)]


def _undo_trial_step_(optimizer: Optimizer, wrapper: object) -> None:
    """Undo the step without gradients by which DeepSpeed allocates moments: it is counted, and it decays the copies.

    Does nothing once training has begun, which shows in moments other than 0.
    """
    moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    if any(bool(moment.any()) for moment in moments if moment.dim()):
        return
    optimizer.state.clear()
    for parameter, copy in _parameters_and_copies(wrapper):
        copy.detach().copy_(parameter.detach())
