"""Writes a plain PEFT adapter that gives the trained model's outputs on the untouched base."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from srlora_dist.ledger import Ledger
from srlora_dist.pairs import truncate_pairs
from srlora_dist.sites import FUSED, Site, describe_base
from srlora_dist.storage import Storage

logger = logging.getLogger(__name__)


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
    directions taken.

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
    peft_model = next(module for module in model.modules() if isinstance(module, PeftModel))
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}: choose at least 1, or None for the exact adapter")
    storage.settle()
    saved = {
        name: parameter
        for name, parameter in peft_model.named_parameters()
        if (parameter.requires_grad or f".{adapter_name}." in name) and f".{FUSED}." not in name
    }
    state = dict(peft_model.named_buffers())
    state |= zip(saved, storage.gather_parameters(list(saved.values())), strict=True)
    fused = _gather_fused(storage, sites)

    def write() -> None:
        in_place = [site.name for site in sites if site.fused_a is None]
        added = fused | (ledger.factors(in_place) if ledger is not None else {})
        _write(peft_model, state, sites, added, Path(folder), max_rank, adapter_name)

    storage.on_rank_0(f"write the adapter to {folder}", write)


def _gather_fused(storage: Storage, sites: list[Site]) -> dict[str, tuple[Tensor, Tensor]]:
    """What stands for the change of W at each site with a second adapter: columns, scale included, and rows."""
    with_second = [site for site in sites if site.fused_a is not None]
    if not with_second:
        return {}
    gathered = iter(storage.gather_parameters([f for site in with_second for f in (site.fused_a, site.fused_b)]))
    added = {}
    for site in with_second:
        a, b = next(gathered)[: site.num_fused], next(gathered)[:, : site.num_fused]
        added[site.name] = site.scale * b.float().cpu(), a.float().cpu()
    return added


def _write(
    model: PeftModel,
    state: dict[str, Tensor],
    sites: list[Site],
    added: dict[str, tuple[Tensor, Tensor]],
    folder: Path,
    max_rank: int | None,
    adapter_name: str,
) -> None:
    tensors = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=False)
    config = copy.deepcopy(model.peft_config[adapter_name])
    config.inference_mode = True
    if added:
        ranks, errors = {}, []
        for site in sites:
            a_name, b_name = (f"base_model.model.{site.name}.lora_{factor}.weight" for factor in "AB")
            left, right = added[site.name]
            b = torch.cat([left, site.scale * tensors[b_name].float().cpu()], 1)
            a = torch.cat([right, tensors[a_name].float().cpu()], 0)
            if max_rank is not None and max_rank < a.shape[0]:
                b, a, error = truncate_pairs(b, a, max_rank)
                logger.info("%s: truncated to rank %d, relative error %.2e", site.name, max_rank, error)
                errors.append(error)
            tensors[a_name], tensors[b_name] = a, b
            ranks[site.name] = a.shape[0]
        _set_ranks(config, ranks)
        if errors:
            logger.warning(
                "export to rank %d: relative error of the change of W, mean %.2e, largest %.2e over %d sites",
                *(max_rank, sum(errors) / len(errors), max(errors), len(errors)),
            )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    (folder / "README.md").write_text(_readme(config, describe_base(sites)))


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
