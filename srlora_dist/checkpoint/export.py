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
from srlora_dist.checkpoint.format import Checkpoint
from srlora_dist.checkpoint.ledger import Ledger
from srlora_dist.checkpoint.ledger_files import read_entries, require_entries
from srlora_dist.checkpoint.training_state import WEIGHTS, trained_parameters
from srlora_dist.layers.adapter import find_peft_model
from srlora_dist.layers.pairs import replay_pairs
from srlora_dist.layers.site import Site
from srlora_dist.storage.base import Storage

NOT_TRAINED = "exported"
"""Name of a checkpoint's file of what PEFT saves beside the trained parameters."""


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

    A site's change of the pretrained weight is what was added to W, by the ledger or in the second adapter, plus the
    live pairs, ``s B A``; both are sums of pairs, so together they are one LoRA of scale 1, of rank twice the number of
    directions taken, or of that number with ``start: zero_b``. Where W itself is exported, because another load of the
    base would not have it, it is as it stands, and the pairs are those that are live.

    Args:
        model: The (wrapped) PEFT model.
        storage: How its tensors are held.
        sites: Its sites.
        ledger: What was added to W; None on the other ranks, and everywhere for a run without switches.
        folder: Where to write.
        parts: What is exported beside the pairs.
        max_rank: Truncate each site to this rank by SVD and log the relative error; None is exact.
        put: Gets the folder and the files on rank 0, to write them.

    Collective: every rank must call it; under ZeRO-3 and FSDP2 an all-reduce of the trainable parameters, one of
        the second adapter, and one of each frozen parameter that the export holds.

    Raises:
        ValueError: ``max_rank`` is below 1, another adapter is trained, too, or rank 0 could not write; raised on every
            rank.
    """
    peft_model = find_peft_model(model)
    _require_rank(max_rank)
    parts.require_alone(model, sites)
    storage.to_rest_layout_()
    parameters = parts.parameters(model)
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    tensors = dict(zip(trained, storage.gather_parameters(list(trained.values())), strict=True))
    tensors |= _gather_frozen(storage, parameters)
    tensors |= parts.buffers(model)
    whole = _gather_whole_weights(storage, parts)
    fused = _gather_fused(storage, sites)

    def write() -> None:
        whole_w = parts.own_weights
        in_place = [s.name for s in sites if s.fused_a is None and not s.left_out and s.name not in whole_w]
        added = fused | (ledger.factors(in_place) if ledger is not None else {})
        named = {exported: tensors[name] for exported, name in parts.names.items() if name in tensors} | whole
        named |= {name: tensor for name, tensor in tensors.items() if name not in parts.names.values()}
        scales = {site.name: site.scale for site in sites}
        about = About(peft_model.peft_config[parts.adapter_name], scales, parts.other_layers, parts.base)
        never_edited = ledger is None and not fused
        write_adapter(named, about, None if never_edited else added, Path(folder), max_rank, put)

    storage.on_rank_0(f"write the adapter to {folder}", write)


@torch.no_grad()
def export_checkpoint(checkpoint: Checkpoint, folder: str | Path, max_rank: int | None = None) -> None:
    """Write the adapter of a checkpoint; this needs neither the pretrained model nor the engine that it was made on.

    Args:
        checkpoint: Of any engine and number of ranks.
        folder: Where to write.
        max_rank: As in :func:`export_adapter`.

    Raises:
        ValueError: ``max_rank`` is below 1, or a file of the checkpoint lacks something.
    """
    _require_rank(max_rank)
    state, added = checkpoint.state, None
    tensors = {exported: checkpoint.read(WEIGHTS, name) for exported, name in state["exported_names"].items()}
    tensors |= {name: checkpoint.read(NOT_TRAINED, name) for name in state["exported_besides"]}
    if "num_switches" in state:
        require_entries(checkpoint.ledger, state["num_switches"])
        entries, added = list(read_entries(checkpoint.ledger)), {}
        for site in state["sites"]:
            left, right = (f"{site['name']}.{side}" for side in ("left", "right"))
            pairs = [(entry[left], entry[right]) for entry in entries if left in entry]
            if site["fused_rank"] == 0 and site["name"] in state.get("exported_weights", ()):
                continue  # in W itself
            if site.get("left_out"):
                continue  # nothing was added to its W
            # Without a second adapter nothing was ever compressed.
            a_sum = replay_pairs(pairs, site["fused_rank"] or sys.maxsize)
            added[site["name"]] = tuple(part.float() for part in a_sum)
    config = PeftConfig.from_pretrained(str(checkpoint.folder))
    scales = {site["name"]: site["scale"] for site in state["sites"]}
    others = {name: (int(rank), float(scale)) for name, (rank, scale) in state.get("other_layers", {}).items()}
    base = BaseLabel.from_dict(state["base"]) if "base" in state else BaseLabel(state["weights"])
    about = About(config, scales, others, base)
    write_adapter(tensors, about, added, Path(folder), max_rank)


def exported_parts(
    model: nn.Module, storage: Storage, parts: ExportParts
) -> tuple[dict[str, object], dict[str, Tensor], PeftConfig]:
    """What a checkpoint keeps so that :func:`export_checkpoint` can do without the model.

    Returns:
        The part of ``state.json``: which trained parameter PEFT saves under which name, and the names of what it saves
        beside them; those tensors, on rank 0; the adapter's configuration.

    Collective: every rank must call it; under ZeRO-3 and FSDP2 an all-reduce of each parameter that is exported and
        not trained.
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


def _gather_frozen(storage: Storage, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Whole parameters that are not trained, on rank 0: one after the other, for embeddings are large."""
    frozen = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            (whole,) = storage.gather_parameters([parameter])
            if storage.rank == 0:
                frozen[name] = whole.cpu()
    return frozen


def _gather_whole_weights(storage: Storage, parts: ExportParts) -> dict[str, Tensor]:
    """W, as it is stored now, of the sites that have it exported, on rank 0."""
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
    """What stands for the change of W at each site with a second adapter: columns, scale excluded, and rows."""
    with_second = [site for site in sites if site.fused_a is not None]
    if not with_second:
        return {}
    gathered = iter(storage.gather_parameters([f for site in with_second for f in (site.fused_a, site.fused_b)]))
    added = {}
    for site in with_second:
        a, b = next(gathered)[: site.num_fused], next(gathered)[:, : site.num_fused]
        added[site.name] = b.float().cpu(), a.float().cpu()
    return added
