"""Checks on the first training batch, before anything is learnt from it, that switch 0 has kept the function.

This finds what the structure of a model does not tell: a layer that the model never calls although it reads its weight
(bypassed), or a use of the weight, or of the second adapter, that PEFT knows nothing of.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from srlora_dist.checkpoint.random_state import random_state, restore_random_state
from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.errors import shorten_list
from srlora_dist.layers.adapter import find_peft_model
from srlora_dist.layers.bypassed import Usage
from srlora_dist.layers.site import FUSED
from srlora_dist.method.checks import largest_change, largest_on_any_rank, relative_change
from srlora_dist.method.extra_pass import (
    copy_inputs,
    evaluating,
    same_buffers,
    sample_outputs,
    samples,
    set_compiled_calls_aside_,
)
from srlora_dist.method.first_switch import edited_back, undo_first_switch_
from srlora_dist.storage.base import Storage

logger = logging.getLogger(__name__)


class FirstBatch:
    """Compares the model with what it was before switch 0, by two forward passes beside the batch's own.

    1. A pass in evaluation mode shows which layers are called, and of which the weight is read.
    2. A pass in training mode, with the random numbers of the batch's own pass, shows the same there. Meanwhile the
       sites that are suspicious are what they were before switch 0: those that were not called or were read get their
       W back (a copy of what the rank holds of it waits in host memory), those with a second adapter do without it.
       With ``check_switch`` all sites are, and a third pass gives the outputs in evaluation mode too.
    3. The batch's own forward pass has to give what that pass gave.

    Args:
        model: The prepared model, after switch 0.
        storage: How it is held.
        config: ``adapter_name``, ``start``, ``check_switch`` and ``switch_tolerance``.
        leave_out: Called on every rank with the indices of the sites that are bypassed, before the batch's own pass.

    Collective: the forward passes; two all-reduces of 12 bytes per site before the batch's own pass, and one of 8 bytes
        before the first optimizer step; under ZeRO-3 and FSDP2 an all-reduce of the suspicious sites' factors.
    """

    _entrances: tuple[nn.Module, ...] = ()

    def __init__(
        self, model: nn.Module, storage: Storage, config: SRLoRAConfig, leave_out: Callable[[list[int]], None]
    ) -> None:
        self.storage, self.config, self._leave_out = storage, config, leave_out
        self._root = find_peft_model(model)
        self._call: Callable[[], object] | None = None
        self._suspicious: list[int] = []
        self._before: list[Tensor] = []
        self._change = -1.0  # none yet
        self.is_closed = False
        self._types: set[torch.dtype] = set()
        self._is_told = False
        self._compiled = set_compiled_calls_aside_(self._root)
        self._entrances = tuple(_entrances(model, self._root))
        # Before DeepSpeed's and FSDP2's own hooks, which gather weights.
        self._handles = [
            module.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)
            for module in self._entrances
        ]

    @property
    def _tolerance(self) -> float:
        return largest_change(self.storage, self.config.switch_tolerance, self._types)

    @property
    def change(self) -> float | None:
        """Relative change of the outputs by switch 0, as seen by this rank; None if not measured."""
        return self._change if self._change >= 0 else None

    def __reduce__(self) -> tuple:
        return object.__new__, (FirstBatch,)  # a pickled model checks nothing either: this copy has no entrances

    def __deepcopy__(self, memo: dict) -> FirstBatch:
        return self  # a copied model has the hooks too, but is not checked

    def close(self) -> None:
        """Remove all hooks, and forget the batch."""
        for handle in self._handles:
            handle.remove()
        for module, call in self._compiled:
            module._compiled_call_impl = call
        self._handles, self._compiled, self._call, self._before = [], [], None, []
        self.is_closed = True

    def judge(self) -> float:
        """Undo switch 0 and raise on every rank, if it moved the outputs; call it before the first optimizer step.

        Returns:
            The largest relative change to accept, now that the types are known that the layers compute in.

        Collective: an all-reduce of 8 bytes.

        Raises:
            ValueError: The outputs moved; the message has the change and the sites that may be the cause.
        """
        tolerance = self._tolerance
        change = largest_on_any_rank(self.storage, self._change)
        if change > tolerance:
            change = self._judge_again(change)
        suspicious = self._suspicious
        self.close()
        if change < 0 and not self._is_told:
            logger.warning(
                "the first batch was not checked, because the model was not called as a whole before the first "
                "optimizer step: nothing tells whether it calls all adapted layers"
            )
        if change <= tolerance:
            return tolerance
        undo_first_switch_(self.storage, list(range(len(self.storage.sites))), self.config.start)
        names = shorten_list([self.storage.sites[number].name for number in suspicious])
        raise ValueError(
            f"switch 0 changed the output on the first batch by {change:.1e} of its size, more than {tolerance:.1e}, "
            f"and was undone: the model uses a weight or a second adapter in another way than by calling PEFT's layer"
            f"{f' (it may be {names})' if names else ''}. Leave that layer out of target_modules, or switch fused LoRA "
            "kernels off, which know one adapter alone"
        )

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        is_ours = not torch.compiler.is_compiling() and module in self._entrances
        if not is_ours or self._call is not None or not torch.is_grad_enabled():
            return
        self._call = lambda: module(*(copies := copy_inputs((args, kwargs)))[0], **copies[1])
        state = random_state()
        try:
            if self._compare():
                self._handles.append(module.register_forward_hook(self._after_forward))
        finally:
            restore_random_state(state)

    def _after_forward(self, module: nn.Module, args: tuple, output: object) -> None:  # noqa: ARG002 (a hook's)
        if torch.is_grad_enabled() and self._before:
            self._change = max(self._change, relative_change(samples(output), self._before))
            self._before = []

    def _compare(self) -> bool:
        """Do the passes before the batch's own; False where the model cannot be called an extra time."""
        after, unused, called, read = self._look(evaluates=True)
        if after is None:
            return False
        sites = self.storage.sites
        self._suspicious = [
            number
            for number, site in enumerate(sites)
            if self.config.check_switch or read[number] or not called[number] or site.fused_a is not None
        ]
        with self._as_before_switch_0():
            before, more, *_ = self._look(evaluates=False)
            if self.config.check_switch:
                self._change = relative_change(after, self._look(evaluates=True)[0] or [])
        if before is None:
            return False
        in_place = [number for number, site in enumerate(sites) if site.fused_a is None]
        bypassed = [number for number in in_place if unused[number] or more[number]]
        if bypassed and self._matter(bypassed, after):
            self._leave_out(bypassed)
            unseen = set(bypassed) - set(self._suspicious)
            self._suspicious = [number for number in self._suspicious if number not in bypassed]
            if unseen:  # they still had the edited W
                with self._as_before_switch_0():
                    before = self._look(evaluates=False)[0]
        self._before = before or []
        return True

    def _matter(self, numbers: list[int], after: list[Tensor]) -> bool:
        """Whether outputs depend on the W of layers that are read but not called; some are read for their type alone.

        Args:
            numbers: Indices of the sites.
            after: The outputs in evaluation mode as it is.

        Collective: three forward passes, and an all-reduce of 8 bytes.
        """
        trains = self._look(evaluates=False)[0]
        with edited_back(self.storage, numbers, moves=self.config.start == "zero_b"):
            moved = self._look(evaluates=True)[0], self._look(evaluates=False)[0]
        change = max(relative_change(now or [], then or []) for now, then in zip(moved, (after, trains), strict=True))
        # A read for the type alone moves nothing at all, and a small layer may move the outputs by little.
        return largest_on_any_rank(self.storage, change) > self._tolerance / 100

    def _look(self, evaluates: bool) -> tuple[list[Tensor] | None, list[bool], list[bool], list[bool]]:
        """Call the model once, and share what any rank saw with every rank.

        Returns:
            Samples of the outputs, None if a rank could not call it; then for each site whether it was bypassed,
            called, and read.
        """
        usage, outputs, error = Usage([site.lora for site in self.storage.sites]), None, None
        state = random_state()
        with same_buffers(self._root), evaluating(self._root) if evaluates else nullcontext(), usage.watching():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # checkpointing warns that nothing has gradients
                    outputs = sample_outputs(self._call)
            except Exception as failure:  # the others would wait for this rank
                error = failure
        self._types |= usage.types
        restore_random_state(state)
        self.storage.forget_fetch_order()
        bypassed = [read and not called for read, called in zip(usage.read, usage.called, strict=True)]
        flags = torch.tensor([*bypassed, *usage.called, *usage.read, error is not None], dtype=torch.int32)
        *flags, failed = map(bool, self.storage.all_reduce_(flags.to(self.storage.device), "max").tolist())
        if failed:
            self._is_told = True
            logger.warning(
                "the first batch was not checked, for the model cannot be called on it once more: %s",
                error if error is not None else "another rank could not",
            )
        count = len(self.storage.sites)
        return None if failed else outputs, flags[:count], flags[count : 2 * count], flags[2 * count :]

    @contextmanager
    def _as_before_switch_0(self) -> Iterator[None]:
        """Give suspicious sites the W from before switch 0 and silence their pairs; restore every bit afterwards."""
        sites = self.storage.sites
        edited = [n for n in self._suspicious if self.config.start == "pissa" and sites[n].fused_a is None]
        with edited_back(self.storage, edited):
            scaling = [(sites[n].lora.scaling, dict(sites[n].lora.scaling)) for n in self._suspicious]
            for numbers, _ in scaling:
                numbers.update({name: 0.0 for name in (self.config.adapter_name, FUSED) if name in numbers})
            try:
                yield
            finally:
                for numbers, before in scaling:
                    numbers.update(before)

    def _judge_again(self, change: float) -> float:
        """Confirm a change that is too large; judge in evaluation mode if the model is random in training mode.

        Returns:
            The change; 0 if the model is random in both modes, so that nothing can be told.

        Collective: two forward passes, and three more for evaluation mode; up to three all-reduces of 8 bytes.
        """
        once, twice = (self._look(evaluates=False)[0] or [] for _ in range(2))
        if largest_on_any_rank(self.storage, relative_change(once, twice)) <= self._tolerance:
            return change
        once, twice = (self._look(evaluates=True)[0] or [] for _ in range(2))
        repeats = largest_on_any_rank(self.storage, relative_change(once, twice)) <= self._tolerance
        logger.warning(
            "the model gives other outputs each time it is called, so %s",
            "what switch 0 does was judged in evaluation mode alone" if repeats else "the first batch was not checked",
        )
        if not repeats:
            return 0.0
        with self._as_before_switch_0():
            before = self._look(evaluates=True)[0] or []
        return largest_on_any_rank(self.storage, relative_change(once, before))


def _entrances(model: nn.Module, peft_model: nn.Module) -> list[nn.Module]:
    """The modules that a loop may call: the compiled PEFT model; or the PEFT model, and the one inside it."""
    wrappers = [module for module in model.modules() if hasattr(module, "_orig_mod")]
    around = [module for module in wrappers if any(inner is peft_model for inner in module.modules())]
    return around[:1] or [peft_model, peft_model.get_base_model()]
