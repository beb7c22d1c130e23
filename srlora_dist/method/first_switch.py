"""Undoes switch 0: for a moment, at the sites that are left out, or everywhere if the run cannot go on.

Nothing was trained yet. So adding the pairs that switch 0 took out of W gives the pretrained W again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.errors import shorten_list
from srlora_dist.layers.adapter import find_peft_model
from srlora_dist.layers.bypassed import LEAVE_OUT, is_all_linear
from srlora_dist.layers.site import PAIR_DIM
from srlora_dist.storage.base import Storage

BYPASSED = "the model never calls, for it reads the weight"


@contextmanager
def edited_back(storage: Storage, numbers: list[int], moves: bool = False) -> Iterator[None]:
    """Give sites the W from before switch 0 inside the context, and restore the edited W bit for bit afterwards.

    Meanwhile host memory holds a copy of what this rank holds of these weights.

    Args:
        storage: How the sites are held.
        numbers: Indices of sites that are edited in place.
        moves: Whether to move W by a visible amount along the pairs' rows instead, because the pairs are still 0.

    Collective: under ZeRO-3 and FSDP2 an all-reduce of the factors.
    """
    kept = [(number, *_copy_weight(storage, number)) for number in numbers]
    _edit_back_(storage, numbers, moves)
    try:
        yield
    finally:
        storage.to_rest_layout_()
        for number, weight, residual in kept:
            _put_weight_back_(storage, number, weight, residual)


def leave_out_(model: nn.Module, storage: Storage, config: SRLoRAConfig, numbers: list[int]) -> None:
    """Undo switch 0 at sites that the model bypasses, and leave them out of all later ones.

    Args:
        model: The prepared model.
        storage: How it is held.
        config: ``adapter_name`` and ``start``.
        numbers: Indices of the sites, the same on every rank.

    Collective: see :func:`undo_first_switch_`.

    Raises:
        ValueError: The user has named these layers, or there is no other site. Switch 0 is then undone at all sites.
    """
    peft_model, name = find_peft_model(model), config.adapter_name
    base, sites = peft_model.get_base_model(), storage.sites
    bypassed = shorten_list([sites[number].name for number in numbers])
    if len(numbers) == len(sites) or not is_all_linear(base, peft_model.peft_config[name], name):
        undo_first_switch_(storage, list(range(len(sites))), config.start)
        raise ValueError(f"SRLoRA cannot work on a layer that {BYPASSED}: {bypassed}; {LEAVE_OUT}")
    undo_first_switch_(storage, numbers, config.start)
    for number in numbers:
        sites[number].state.left_out = True
    warnings.warn(
        f"SRLoRA leaves out {bypassed} (a layer that {BYPASSED}): its pairs do nothing, with or without SRLoRA",
        stacklevel=2,
    )


@torch.no_grad()
def undo_first_switch_(storage: Storage, numbers: list[int], start: str) -> None:
    """Give sites the W from before switch 0, up to rounding, and pairs that do nothing.

    Args:
        storage: How the sites are held; nothing was trained yet.
        numbers: Indices of the sites.
        start: ``srlora.start``.

    Collective: under ZeRO-3 and FSDP2 an all-reduce of the factors.
    """
    _edit_back_(storage, [n for n in numbers if start == "pissa" and storage.sites[n].fused_a is None])
    for number in numbers:
        site = storage.sites[number]
        if site.fused_a is not None:
            for factor, parameter in (("A", site.fused_a), ("B", site.fused_b)):
                nothing = torch.zeros(site.fused_shape(factor), dtype=parameter.dtype, device=storage.device)
                storage.write_parameter_(parameter, PAIR_DIM[factor], torch.arange(site.state.num_fused), nothing)
        nothing = torch.zeros(site.factor_shape("B"), dtype=site.lora_b.dtype, device=storage.device)
        storage.write_pairs_(number, "B", torch.arange(site.rank), nothing, "keep")
        site.state.forget_pairs_(site.rank)


@torch.no_grad()
def _edit_back_(storage: Storage, numbers: list[int], moves: bool = False) -> None:
    """Add the pairs that switch 0 took out of W to it again.

    Args:
        storage: How the sites are held.
        numbers: Indices of the sites.
        moves: See :func:`edited_back`.
    """
    storage.to_rest_layout_()
    for number in numbers:
        a, b = storage.gather_parameters([storage.sites[number].lora_a, storage.sites[number].lora_b])
        storage.edit_weight_(number, torch.ones_like(b.float()) if moves else b.float(), a.float())


def _copy_weight(storage: Storage, number: int) -> tuple[Tensor, Tensor | None]:
    storage.to_rest_layout_()
    with storage.in_memory(number):
        residual = storage.residuals.get(number)
        return storage.weight_to_edit(number)[0].to("cpu", copy=True), None if residual is None else residual.clone()


@torch.no_grad()
def _put_weight_back_(storage: Storage, number: int, weight: Tensor, residual: Tensor | None) -> None:
    with storage.in_memory(number):
        storage.weight_to_edit(number)[0].copy_(weight)
        if residual is not None:
            storage.residuals[number].copy_(residual)
        storage.after_edit(number)
