"""Manages the frozen second adapter: where W is never written, it holds what was fused and what was taken out of W.

``W + s B_fused A_fused`` stands for the edited W. It has the scale of its site and is filled from the left, so that a
fused pair is an exact copy of the pair that was trained, in whatever type that was, and the function is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.layers.pairs import truncate_pairs
from srlora_dist.layers.site import FUSED, PAIR_DIM, Site
from srlora_dist.storage.base import Storage


def add_second_adapters_(sites: list[Site], config: SRLoRAConfig) -> list[RemovableHandle]:
    """Give sites a second, frozen adapter that is active beside the first and holds nothing yet.

    Its rank is all that a run can fuse and take, ``2 r_target - r`` with the paper's choices, or ``fused_rank`` if that
    is less.

    Args:
        sites: Sites of a model that is not yet prepared; get the factors of the second adapter.
        config: ``fusion``, ``fused_rank`` and ``start``.

    Returns:
        Handles of the hooks that keep the second adapters frozen.

    Raises:
        ValueError: A quantised site is to be edited in place, the budget does not even hold the first directions, or
            there is a second adapter already.
    """
    budget = config.fused_rank
    needing = [site for site in sites if config.fusion == "adapter" or site.quantised]
    for site in needing:  # all of them before any is changed
        if config.fusion == "in_place":
            raise ValueError(
                f"srlora.fusion is in_place, but {site.name} is quantised ({site.quantised}), where an edit would be "
                "lost in the rounding: choose auto or adapter"
            )
        if site.fused_a is not None:
            raise ValueError(f"{site.name} has an adapter {FUSED!r} already: load the model anew for another Switcher")
        if budget is not None and budget < site.num_first:
            raise ValueError(
                f"srlora.fused_rank {budget} is below the LoRA rank of {site.name} (r={site.num_first}), so that it "
                "does not hold even the first directions: raise it, or leave it out"
            )
    if budget is not None and not needing:
        warnings.warn(f"srlora.fused_rank {budget} is without effect: no weight needs a second adapter", stacklevel=3)
    hooks = []
    for site in needing:
        most = site.state.num_starts - site.num_first  # those that are fused
        if config.start == "pissa":
            most += site.state.num_starts  # what they began with was taken
        hooks += _add_to_layer_(site, max(1, most) if budget is None else min(budget, max(1, most)))
    return hooks


def activate_again_(sites: list[Site]) -> None:
    """Activate second adapters that a Trainer has switched off, as it does while it loads several adapters."""
    for site in sites:
        if site.fused_a is not None and FUSED not in site.lora.active_adapters:
            with _same_gradients(site.lora):
                site.lora.set_adapter([*site.lora.active_adapters, FUSED])


def require_intact(sites: list[Site]) -> None:
    """Raise where PEFT was told to merge, to switch adapters or to change types, which changes the function.

    Raises:
        RuntimeError: The message names the site and the remedy.
    """
    for site in sites:
        if site.lora.merged:
            raise RuntimeError(f"the adapter of {site.name} has been merged: call unmerge_adapter() before training on")
        if site.fused_a is None:
            continue
        if FUSED not in site.lora.active_adapters:
            raise RuntimeError(
                f"the adapter {FUSED!r} of {site.name}, which holds what was fused, is not active any more: call "
                f"layer.set_adapter([yours, {FUSED!r}]) on each LoRA layer, or leave the adapters alone"
            )
        if site.fused_a.dtype != site.lora_a.dtype:
            raise RuntimeError(
                f"the pairs of {site.name} are {site.lora_a.dtype} and what is fused {site.fused_a.dtype}: change both "
                "or make the Switcher after it"
            )


def _add_to_layer_(site: Site, rank: int) -> list[RemovableHandle]:
    layer = site.lora
    with _same_gradients(layer):
        # Not PeftModel.add_adapter: it would also copy modules_to_save, and refuses two active names beside them.
        layer.update_layer(FUSED, rank, lora_alpha=rank, config=LoraConfig(r=rank, init_lora_weights=True))
        layer.scaling[FUSED] = site.scale
        layer.set_adapter([*layer.active_adapters, FUSED])
    site.fused_rank = rank
    site.fused_a, site.fused_b = (factors[FUSED].weight for factors in (layer.lora_A, layer.lora_B))
    for parameter, like in ((site.fused_a, site.lora_a), (site.fused_b, site.lora_b)):
        parameter.requires_grad_(False)
        parameter.data = torch.zeros(parameter.shape, dtype=like.dtype, device=like.device)
    return [factors[FUSED].register_forward_pre_hook(_freeze) for factors in (layer.lora_A, layer.lora_B)]


@contextmanager
def _same_gradients(layer: LoraLayer) -> Iterator[None]:
    """Put back which parameters are trained: set_adapter turns on gradients of all that it activates."""
    trains = {parameter: parameter.requires_grad for parameter in layer.parameters()}
    try:
        yield
    finally:
        for parameter, before in trains.items():
            parameter.requires_grad_(before)


def _freeze(module: nn.Module, *_: object) -> None:
    # disable_adapter() turns on the gradients of all active adapters when it ends.
    module.weight.requires_grad_(False)


def append_pairs_(storage: Storage, number: int, left: Tensor, right: Tensor) -> float:
    """Add ``scale * left @ right`` to what stands for a site's W.

    Args:
        storage: How the ranks hold the sites.
        number: Index of the site.
        left: Columns, (m, k), in the type of the factors.
        right: Rows, (k, n).

    Returns:
        The relative error of what the second adapter holds. It is 0 unless the adapter was full and was compressed.

    Collective: nothing; or if it has to be compressed, under ZeRO-3 and FSDP2 an all-reduce of the second adapter, and
        a broadcast of it, so that all ranks hold what rank 0 made.
    """
    site, error = storage.sites[number], 0.0
    first = site.state.num_fused
    if first + left.shape[1] > site.fused_rank:
        held_a, held_b = storage.gather_parameters([site.fused_a, site.fused_b])
        left, right = torch.cat([held_b[:, :first], left], 1), torch.cat([held_a[:first], right], 0)
        left, right, error = _compress(storage, left, right, site.fused_rank)
        first = 0
    site.state.num_fused = first + left.shape[1]
    slots = torch.arange(first, site.state.num_fused)
    for factor, parameter, new in (("A", site.fused_a, right), ("B", site.fused_b, left)):
        whole = new.new_zeros(site.fused_shape(factor))
        whole.index_copy_(PAIR_DIM[factor], slots.to(whole.device), new)
        storage.write_parameter_(parameter, PAIR_DIM[factor], slots, whole)
    return error


def _compress(storage: Storage, left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best pairs of a smaller rank as rank 0 finds them (signs differ between machines), and their error."""
    shapes = (left.shape[0], rank), (rank, right.shape[1]), (1,)
    results = [torch.zeros(shape, dtype=left.dtype, device=left.device) for shape in shapes]
    error = results[2] = results[2].double()
    made = storage.on_rank_0("compress the second adapter", lambda: truncate_pairs(left, right, rank, left.dtype))
    if made is not None:
        for result, part in zip(results, (*made[:2], torch.tensor([made[2]])), strict=True):
            result.copy_(part)
    for result in results:
        storage.broadcast_(result)
    return results[0], results[1], error.item()
