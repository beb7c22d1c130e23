"""Checks a switch: how far it moves the model's outputs on a training batch, and whether ranks still agree."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from srlora_dist.checkpoint.training_state import trained_parameters
from srlora_dist.errors import RunStoppedError
from srlora_dist.layers.adapter import find_peft_model
from srlora_dist.layers.digest import digest_span
from srlora_dist.method.extra_pass import evaluating, sample_outputs
from srlora_dist.storage.base import Storage

logger = logging.getLogger(__name__)

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest accepted relative change of an output, by type: a few times what rounding alone does, as measured."""

SMALL_OUTPUT = 1e-3
"""An output tensor is compared relative to its own size, or to this share of the largest one's if that is more."""


class OutputCheck:
    """Keeps the inputs of the last training batch of a model, and compares outputs on them.

    Args:
        model: The prepared model.
        storage: How it is held.
        tolerance: Largest relative change to accept; None chooses it by the type of the weights.
    """

    def __init__(self, model: nn.Module, storage: Storage, tolerance: float | None) -> None:
        self.storage = storage
        self.tolerance = largest_change(storage, tolerance)
        self._model = model
        self._inputs: tuple[tuple, dict] | None = None
        peft_model = find_peft_model(model)
        self.hooks = [peft_model.register_forward_pre_hook(self._keep, with_kwargs=True)]

    def _keep(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.is_grad_enabled():
            self._inputs = args, kwargs

    def output(self) -> list[Tensor] | None:
        """Samples of the outputs on the last training batch, without dropout; None before the first.

        Collective: a forward pass; every rank must call it.
        """
        if self._inputs is None:
            return None
        args, kwargs = self._inputs
        with evaluating(self._model):
            return sample_outputs(lambda: self._model(*args, **kwargs))

    def relative_change(self, before: list[Tensor]) -> float:
        """The change of the outputs since ``before``, see :func:`relative_change`, on the rank where it is largest.

        Collective: a forward pass, and an all-reduce of 8 bytes.
        """
        return largest_on_any_rank(self.storage, relative_change(self.output(), before))


def largest_change(storage: Storage, tolerance: float | None, types: Iterable[torch.dtype] = ()) -> float:
    """The largest relative change to accept: ``srlora.switch_tolerance``, or one for the shortest type in use.

    Args:
        storage: How the sites are held.
        tolerance: ``srlora.switch_tolerance``; None for the shortest type that sites are held or computed in.
        types: Further types that a forward pass has shown.
    """
    if tolerance is not None:
        return tolerance
    found = {*types, *(t.dtype for site in storage.sites for t in (site.weight, site.lora_a))}
    found |= {getattr(site.lora.get_base_layer(), "compute_dtype", None) for site in storage.sites}
    if storage.device.type != "cpu":
        found.add(torch.float16)  # TF32 has its mantissa
    # An int8 layer rounds its inputs to 8 bits, as bfloat16 does.
    found |= {torch.bfloat16 for site in storage.sites if site.quantised == "int8"}
    return max(TOLERANCES[kind] for kind in found if kind in TOLERANCES)


def relative_change(now: list[Tensor], before: list[Tensor]) -> float:
    """The largest relative change of any output tensor: the norm of its change over its norm before.

    It is infinite if a shape has changed, or if a number has become or ceased to be finite.
    """
    if [tensor.shape for tensor in now] != [tensor.shape for tensor in before]:
        return float("inf")
    sizes = [float(tensor.nan_to_num(0, 0, 0).double().square().mean().sqrt()) for tensor in before]
    smallest = max(SMALL_OUTPUT * max(sizes, default=0.0), torch.finfo(torch.float32).tiny)
    largest = 0.0
    for new, old, size in zip(now, before, sizes, strict=True):
        same = (new == old) | (new.isnan() & old.isnan())
        moved = torch.where(same, 0.0, new.double() - old.double()).square().mean().sqrt()
        largest = max(largest, float(moved.nan_to_num(torch.inf, torch.inf)) / max(size, smallest))
    return largest


def largest_on_any_rank(storage: Storage, change: float) -> float:
    """The largest of the ranks' numbers, on every rank. Collective: an all-reduce of 8 bytes."""
    return storage.all_reduce_(torch.tensor([change], dtype=torch.float64, device=storage.device), "max").item()


class AgreementCheck:
    """Compares whatever several ranks hold copies of: trained parameters, under DDP their moments, and the weights.

    Args:
        model: The prepared model.
        storage: How it is held.
    """

    def __init__(self, model: nn.Module, storage: Storage) -> None:
        self._model, self.storage = model, storage
        self._warned_of_nothing = False

    def require(self, num_steps: int, every: int) -> None:
        """Raise on every rank if the copies of any tensor differ; warn once if there are no copies.

        Args:
            num_steps: Optimizer steps that were done, for the message.
            every: ``srlora.agreement_every``, for the warning.

        Collective: see ``Storage.to_rest_layout_``; one all-reduce of 16 bytes per tensor.

        Raises:
            RunStoppedError: Some rank holds something else; the message names the first such tensor.
        """
        self.storage.to_rest_layout_()
        named = list(_copies(self._model, self.storage))
        number = self.storage.find_difference([digest_span(copy) for _, copy in named])
        if number is not None:
            raise RunStoppedError(
                f"after step {num_steps} the ranks hold different values of {named[number][0]}; they have drifted "
                "apart, so the run stops. Restart from the last good checkpoint"
            )
        if not named and not self._warned_of_nothing:
            self._warned_of_nothing = True
            logger.warning(
                "srlora.agreement_every %d is without effect: on %s no rank holds a copy of what another one holds",
                every,
                self.storage.name,
            )


def _copies(model: nn.Module, storage: Storage) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in trained_parameters(model).items():
        for copy in storage.copies([parameter]):
            yield name, copy
    for number, site in enumerate(storage.sites):
        for copy in storage.weight_copies(number):
            yield f"the weight of {site.name}, or of what stands for its change", copy
