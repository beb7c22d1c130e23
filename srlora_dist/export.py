"""Writes a plain PEFT adapter that gives the trained model's outputs on the untouched base."""

from __future__ import annotations

import copy
import logging
import re
import sys
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from srlora_dist.checkpoint import Checkpoint
from srlora_dist.fused import replay_pairs
from srlora_dist.ledger import Ledger, read_entries, require_entries
from srlora_dist.pairs import truncate_pairs
from srlora_dist.safefiles import write_whole
from srlora_dist.sites import FUSED, Site, describe_base, find_peft_model
from srlora_dist.storage import Storage
from srlora_dist.training_state import WEIGHTS

logger = logging.getLogger(__name__)

NOT_TRAINED = "exported"
"""Name of a checkpoint's file of what PEFT saves beside the trained parameters."""


@torch.no_grad()
def export_adapter(
    model: nn.Module,
    storage: Storage,
    sites: list[Site],
    ledger: Ledger | None,
    folder: str | Path,
    max_rank: int | None = None,
    adapter_name: str = "default",
) -> None:
    """Write ``adapter_config.json``, ``adapter_model.safetensors`` and a README on rank 0.

    A site's change of the pretrained weight is what was added to W, by the ledger or in the second adapter, plus the
    live pairs, ``s B A``; both are sums of pairs, so together they are one LoRA of scale 1, of rank twice the number of
    directions taken, or of that number with ``start: zero_b``.

    Args:
        model: The (wrapped) PEFT model.
        storage: How its tensors are held.
        sites: Its sites.
        ledger: What was added to W; None on the other ranks, and everywhere for a run without switches.
        folder: Where to write.
        max_rank: Truncate each site to this rank by SVD and log the relative error; None is exact.
        adapter_name: The adapter to export.

    Collective: every rank must call it; under ZeRO-3 and FSDP2 an all-reduce of the trainable parameters, and one of
        the second adapter.

    Raises:
        ValueError: ``max_rank`` is below 1, or rank 0 could not write; raised on every rank.
    """
    peft_model = find_peft_model(model)
    _require_rank(max_rank)
    storage.settle()
    saved = _exported_parameters(peft_model, adapter_name)
    state = dict(peft_model.named_buffers())
    state |= zip(saved, storage.gather_parameters(list(saved.values())), strict=True)
    fused = _gather_fused(storage, sites)

    def write() -> None:
        in_place = [site.name for site in sites if site.fused_a is None]
        added = fused | (ledger.factors(in_place) if ledger is not None else {})
        tensors = _named_by_peft(peft_model, state, adapter_name)
        config, scales = peft_model.peft_config[adapter_name], {site.name: site.scale for site in sites}
        _write(tensors, config, scales, added, Path(folder), max_rank, describe_base(sites))

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
    state, added = checkpoint.state, {}
    tensors = {exported: checkpoint.read(WEIGHTS, name) for exported, name in state["exported_names"].items()}
    tensors |= {name: checkpoint.read(NOT_TRAINED, name) for name in state["exported_besides"]}
    if "num_switches" in state:
        require_entries(checkpoint.ledger, state["num_switches"])
        entries = list(read_entries(checkpoint.ledger))
        for site in state["sites"]:
            left, right = (f"{site['name']}.{side}" for side in ("left", "right"))
            pairs = [(entry[left], entry[right]) for entry in entries if left in entry]
            # Without a second adapter nothing was ever compressed.
            a_sum = replay_pairs(pairs, site["fused_rank"] or sys.maxsize)
            added[site["name"]] = tuple(part.float() for part in a_sum)
    config = PeftConfig.from_pretrained(str(checkpoint.folder))
    scales = {site["name"]: site["scale"] for site in state["sites"]}
    _write(tensors, config, scales, added, Path(folder), max_rank, state["weights"])


def exported_parts(
    model: nn.Module, storage: Storage, adapter_name: str
) -> tuple[dict[str, object], dict[str, Tensor], PeftConfig]:
    """What a checkpoint keeps so that :func:`export_checkpoint` can do without the model.

    Returns:
        The part of ``state.json``: which trained parameter PEFT saves under which name, and the names of what it saves
        beside them; those tensors, on rank 0; the adapter's configuration.

    Collective: every rank must call it; under ZeRO-3 and FSDP2 an all-reduce of what is saved and not trained.
    """
    peft_model = find_peft_model(model)
    parameters = _exported_parameters(peft_model, adapter_name)
    frozen = {name: parameter for name, parameter in parameters.items() if not parameter.requires_grad}
    state = dict(peft_model.named_buffers())
    state |= zip(frozen, storage.gather_parameters(list(frozen.values())), strict=True)
    # A mark in the place of each trained parameter shows where PEFT puts it.
    marks = {name: torch.empty(0) for name in parameters if name not in frozen}
    placed = _named_by_peft(peft_model, state | marks, adapter_name)
    names = {id(mark): name for name, mark in marks.items()}
    trained = {exported: names[id(tensor)] for exported, tensor in placed.items() if id(tensor) in names}
    rest = {name: tensor.detach().cpu().clone() for name, tensor in placed.items() if name not in trained}
    about = {"exported_names": trained, "exported_besides": sorted(rest)}
    return about, rest if storage.rank == 0 else {}, peft_model.peft_config[adapter_name]


def _exported_parameters(peft_model: PeftModel, adapter_name: str) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in peft_model.named_parameters()
        if (parameter.requires_grad or f".{adapter_name}." in name) and f".{FUSED}." not in name
    }


def _named_by_peft(peft_model: PeftModel, state: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    return get_peft_model_state_dict(
        peft_model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=False
    )


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


def _write(
    tensors: dict[str, Tensor],
    config: PeftConfig,
    scales: dict[str, float],
    added: dict[str, tuple[Tensor, Tensor]],
    folder: Path,
    max_rank: int | None,
    base: str,
) -> None:
    """Write the adapter's files.

    Args:
        tensors: By PEFT's names; the live pairs among them.
        config: Of the adapter that was trained.
        scales: Of each site, by its name.
        added: What was added to each site's W, scale excluded; empty for a run without switches.
        folder: Where to write.
        max_rank: Truncate to this rank, or None.
        base: The type of the pretrained weights.
    """
    config = copy.deepcopy(config)
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the same file every time
    if added:
        ranks, errors = {}, []
        for name, scale in scales.items():
            a_name, b_name = (f"base_model.model.{name}.lora_{factor}.weight" for factor in "AB")
            left, right = added[name]
            b = scale * torch.cat([left, tensors[b_name].float().cpu()], 1)
            a = torch.cat([right, tensors[a_name].float().cpu()], 0)
            if max_rank is not None and max_rank < a.shape[0]:
                b, a, error = truncate_pairs(b, a, max_rank)
                logger.info("%s: truncated to rank %d, relative error %.2e", name, max_rank, error)
                errors.append(error)
            tensors[a_name], tensors[b_name] = a, b
            ranks[name] = a.shape[0]
        _set_ranks(config, ranks)
        if errors:
            logger.warning(
                "export to rank %d: relative error of the change of W, mean %.2e, largest %.2e over %d sites",
                *(max_rank, sum(errors) / len(errors), max(errors), len(errors)),
            )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_whole(folder / "adapter_model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    config.save_pretrained(str(folder))
    (folder / "README.md").write_text(_readme(config, base))


def _readme(config: object, base: str) -> str:
    """A model card that says which weights the adapter belongs to: others differ from them by a rounding."""
    name = config.base_model_name_or_path
    header = [f"base_model: {name}"] * bool(name) + ["library_name: peft", "tags: [lora, srlora]"]
    return "\n".join(["---", *header, "---", ""]) + (
        f"\nA LoRA adapter trained with srlora_dist on {name or 'a model'}, the adapted weights in **{base}**.\n"
        "Load the untouched model in that type (same dtype, same quantization_config) before the adapter: in another,\n"
        "outputs differ by what the types round away.\n"
    )


def _set_ranks(config: object, ranks: dict[str, int]) -> None:
    """Scale 1 everywhere (alpha = rank); sites of another rank than most are listed, their names escaped for PEFT."""
    config.use_rslora = False
    config.init_lora_weights = True
    config.r = max(ranks.values(), key=list(ranks.values()).count)
    config.lora_alpha = config.r
    config.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
