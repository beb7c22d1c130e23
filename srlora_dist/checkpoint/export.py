"""Writes a plain PEFT adapter that gives the trained model's outputs on the untouched base."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import PeftConfig
from torch import Tensor, nn

from srlora_dist.checkpoint.adapter_files import About, write_adapter
from srlora_dist.checkpoint.base_label import BaseLabel
from srlora_dist.checkpoint.export_parts import ExportParts
from srlora_dist.checkpoint.files import Put, fill_folder
from srlora_dist.checkpoint.format import NOT_TRAINED, TRAINED, Checkpoint
from srlora_dist.checkpoint.ledger import Ledger
from srlora_dist.checkpoint.ledger_files import read_entries, require_entries
from srlora_dist.checkpoint.training_state import trained_parameters
from srlora_dist.layers.adapter import find_peft_model
from srlora_dist.layers.pairs import replay_pairs
from srlora_dist.layers.site import Site
from srlora_dist.storage.base import Storage


@torch.no_grad()
def export_adapter(
    model: nn.Module,
    storage: Storage,
    sites: list[Site],
    ledger: Ledger | None,
    folder: str | Path,
    parts: ExportParts,
    max_rank: int | None = None,
    put: Put = fill_folder,
) -> None:
    """Write ``adapter_config.json``, ``adapter_model.safetensors`` and a README on rank 0.

    The change of a site's pretrained weight has two parts: what was added to W (by the ledger or in the second adapter)
    and the live pairs, ``s B A``. Both are sums of pairs, so together they are one LoRA of scale 1. Its rank is twice
    the number of directions taken, or that number with ``start: zero_b``. A W that another load of the base would not
    have is exported itself, as it is now, with the live pairs alone.

    Args:
        model: The (wrapped) PEFT model.
        storage: How the ranks hold its tensors.
        sites: The sites of the model.
        ledger: What was added to W, on rank 0; None on the other ranks, and in a run without switches.
        folder: Where to write.
        parts: What is exported beside the pairs.
        max_rank: Truncate each site to this rank by SVD and log the relative error; None is exact.
        put: Writes the files into the folder, on rank 0.

    Collective: every rank must call it; under ZeRO-3 and FSDP2 an all-reduce of the trainable parameters, one of
        the second adapter, and one of each frozen parameter that the export holds.

    Raises:
        ValueError: ``max_rank`` is below 1, another adapter is trained too, or rank 0 could not write. Raised on every
            rank.
    """
    _require_rank(max_rank)
    parts.require_alone(model, sites)
    storage.to_rest_layout_()
    tensors = _gather_exported(model, storage, parts)
    fused = _gather_fused(storage, sites)

    def write() -> None:
        added = fused | (ledger.factors(_edited_in_place(sites, parts)) if ledger is not None else {})
        scales = {site.name: site.scale for site in sites}
        config = find_peft_model(model).peft_config[parts.adapter_name]
        about = About(config, scales, parts.other_layers, parts.base)
        was_edited = ledger is not None or bool(fused)
        write_adapter(tensors, about, added if was_edited else None, Path(folder), max_rank, put)

    storage.on_rank_0(f"write the adapter to {folder}", write)


@torch.no_grad()
def export_checkpoint(checkpoint: Checkpoint, folder: str | Path, max_rank: int | None = None) -> None:
    """Write the adapter of a checkpoint. This needs neither the pretrained model nor the engine of the run.

    Args:
        checkpoint: A checkpoint of any engine and number of ranks.
        folder: Where to write.
        max_rank: As in :func:`export_adapter`.

    Raises:
        ValueError: ``max_rank`` is below 1, or the checkpoint lacks a tensor or an entry of the ledger.
    """
    _require_rank(max_rank)
    state = checkpoint.state
    tensors = {exported: checkpoint.read(TRAINED, name) for exported, name in state["exported_names"].items()}
    tensors |= {name: checkpoint.read(NOT_TRAINED, name) for name in state["exported_besides"]}
    added = _sum_entries(checkpoint) if "num_switches" in state else None
    config = PeftConfig.from_pretrained(str(checkpoint.folder))
    scales = {site["name"]: site["scale"] for site in state["sites"]}
    others = {name: (int(rank), float(scale)) for name, (rank, scale) in state.get("other_layers", {}).items()}
    base = BaseLabel.from_dict(state["base"]) if "base" in state else BaseLabel(state["weights"])
    about = About(config, scales, others, base)
    write_adapter(tensors, about, added, Path(folder), max_rank)


def _sum_entries(checkpoint: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """What the ledger of a checkpoint has added to the W of each site, unless W itself is exported.

    Raises:
        ValueError: An entry is missing or cannot be read.
    """
    state = checkpoint.state
    require_entries(checkpoint.ledger, state["num_switches"])
    entries, added = list(read_entries(checkpoint.ledger)), {}
    for site in state["sites"]:
        is_in_exported_w = site["fused_rank"] == 0 and site["name"] in state.get("exported_weights", ())
        if is_in_exported_w or site.get("left_out"):
            continue
        left, right = (f"{site['name']}.{side}" for side in ("left", "right"))
        pairs = [(entry[left], entry[right]) for entry in entries if left in entry]
        # Without a second adapter nothing was ever compressed.
        total = replay_pairs(pairs, site["fused_rank"] or sys.maxsize)
        added[site["name"]] = tuple(part.float() for part in total)
    return added


def exported_parts(
    model: nn.Module, storage: Storage, parts: ExportParts
) -> tuple[dict[str, object], dict[str, Tensor], PeftConfig]:
    """What a checkpoint keeps so that :func:`export_checkpoint` needs no model.

    Returns:
        Three things. First, entries of ``state.json``: the trained parameter behind each of PEFT's names, and the names
        of the other exported tensors. Second, those other tensors, on rank 0. Third, the adapter's configuration.

    Collective: every rank must call it; under ZeRO-3 and FSDP2 an all-reduce of each exported parameter that is not
        trained.
    """
    peft_model, parameters = find_peft_model(model), parts.parameters(model)
    whole = _gather_whole_weights(storage, parts)
    frozen = _gather_frozen(storage, parameters) | parts.buffers(model)
    first_names = {id(parameter): name for name, parameter in trained_parameters(model).items()}  # of tied ones
    trained, rest = {}, dict(whole)
    for exported, name in parts.names.items():
        if name in parameters and parameters[name].requires_grad:
            trained[exported] = first_names[id(parameters[name])]
        elif name in frozen:
            rest[exported] = frozen[name]
    rest |= {name: tensor for name, tensor in frozen.items() if name not in parts.names.values()}
    about = {
        "exported_names": trained,
        "exported_besides": sorted(rest) if storage.rank == 0 else [],
        "exported_weights": parts.own_weights,
        "other_layers": parts.other_layers,
        "base": parts.base.as_dict(),
    }
    rest = {name: tensor.detach().cpu().clone() for name, tensor in rest.items()} if storage.rank == 0 else {}
    return about, rest, peft_model.peft_config[parts.adapter_name]


def _edited_in_place(sites: list[Site], parts: ExportParts) -> list[str]:
    """Names of the sites whose W holds what the ledger says, unless that W is exported itself."""
    own = parts.own_weights
    return [site.name for site in sites if site.fused_a is None and not site.state.left_out and site.name not in own]


def _gather_exported(model: nn.Module, storage: Storage, parts: ExportParts) -> dict[str, Tensor]:
    """Every tensor that the export holds, by PEFT's names; complete on rank 0."""
    parameters = parts.parameters(model)
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    tensors = dict(zip(trained, storage.gather_parameters(list(trained.values())), strict=True))
    tensors |= _gather_frozen(storage, parameters)
    tensors |= parts.buffers(model)
    named = {exported: tensors[name] for exported, name in parts.names.items() if name in tensors}
    named |= _gather_whole_weights(storage, parts)
    return named | {name: tensor for name, tensor in tensors.items() if name not in parts.names.values()}


def _gather_frozen(storage: Storage, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Whole parameters that are not trained, on rank 0. They are gathered one by one, because embeddings are large."""
    frozen = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            (whole,) = storage.gather_parameters([parameter])
            if storage.rank == 0:
                frozen[name] = whole.cpu()
    return frozen


def _gather_whole_weights(storage: Storage, parts: ExportParts) -> dict[str, Tensor]:
    """The current stored W of the sites whose W is exported itself, on rank 0."""
    weights = {}
    for number, site in enumerate(storage.sites):
        if site.name in parts.own_weights:
            with storage.in_memory(number):
                whole = storage.gather_stored(number, 0)
            if whole is not None:
                weights[f"base_model.model.{site.name}.base_layer.weight"] = whole.cpu()
    return weights


def _require_rank(max_rank: int | None) -> None:
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}: choose at least 1, or None for the exact adapter")


def _gather_fused(storage: Storage, sites: list[Site]) -> dict[str, tuple[Tensor, Tensor]]:
    """The change of W at each site with a second adapter: columns, without the scale, and rows."""
    with_second = [site for site in sites if site.fused_a is not None]
    if not with_second:
        return {}
    gathered = iter(storage.gather_parameters([f for site in with_second for f in (site.fused_a, site.fused_b)]))
    added = {}
    for site in with_second:
        a, b = next(gathered)[: site.state.num_fused], next(gathered)[:, : site.state.num_fused]
        added[site.name] = b.float().cpu(), a.float().cpu()
    return added
