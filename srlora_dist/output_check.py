"""Measures how far a switch moves the model's output, on the last training batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from srlora_dist.sites import find_peft_model
from srlora_dist.storage import Storage

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest relative change of an output by type: a few times what rounding alone was measured to do (README)."""


class OutputCheck:
    """Keeps the inputs of the last training batch of a model, and compares outputs on them.

    Args:
        model: The prepared model.
        storage: How it is held.
        tolerance: Largest relative change to accept; None goes by the type of the weights.
    """

    def __init__(self, model: nn.Module, storage: Storage, tolerance: float | None) -> None:
        self.storage = storage
        self.tolerance = TOLERANCES[_computes_in(storage)] if tolerance is None else tolerance
        self._model = model
        self._inputs: tuple[tuple, dict] | None = None
        peft_model = find_peft_model(model)
        self.hooks = [peft_model.register_forward_pre_hook(self._keep, with_kwargs=True)]

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module.training and torch.is_grad_enabled():
            self._inputs = args, kwargs

    @torch.no_grad()
    def output(self) -> Tensor | None:
        """The output on the last training batch, without dropout; None before the first.

        Collective: a forward pass; every rank must call it.
        """
        if self._inputs is None:
            return None
        modes = {module: module.training for module in self._model.modules()}
        self._model.eval()
        args, kwargs = self._inputs
        output = _first_tensor(self._model(*args, **kwargs)).float().clone()
        for module, mode in modes.items():
            module.training = mode
        return output

    def relative_change(self, before: Tensor) -> float:
        """The norm of the change of the output since ``before``, relative to it, on the rank where it is largest.

        Collective: a forward pass, and an all-reduce of 8 bytes.
        """
        change = (self.output() - before).norm() / before.norm().clamp_min(torch.finfo(torch.float32).tiny)
        change = change.double().nan_to_num(torch.inf).to(self.storage.device).reshape(1)
        return self.storage.all_reduce_(change, "max").item()


def _first_tensor(output: object) -> Tensor:
    """The logits of a Transformers output, or the first tensor of floating point of another."""
    if torch.is_tensor(output):
        return output
    values = output.values() if isinstance(output, dict) else output
    logits = getattr(output, "logits", None)
    return logits if logits is not None else next(v for v in values if torch.is_tensor(v) and v.is_floating_point())


def _computes_in(storage: Storage) -> torch.dtype:
    """The shortest type among the weights and the pairs."""
    types = {t.dtype for site in storage.sites for t in (site.weight, site.lora_a) if t.dtype in TOLERANCES}
    return max(types, key=TOLERANCES.__getitem__)
