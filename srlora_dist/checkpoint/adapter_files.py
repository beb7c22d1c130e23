"""Writes the files of a plain PEFT adapter: the pairs with scale 1, the configuration and a model card."""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from srlora_dist.checkpoint.base_label import BaseLabel
from srlora_dist.checkpoint.files import Put, fill_folder
from srlora_dist.checkpoint.hf_saves import unmark_folder
from srlora_dist.layers.pairs import truncate_pairs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class About:
    """What an adapter's files say beside its tensors.

    Args:
        config: PEFT's configuration of the trained adapter.
        scales: Scale of each site, by the site's name.
        other_layers: Rank and scale of each LoRA layer that is not a site, by its name in ``rank_pattern``.
        base: The base that the adapter belongs to.
    """

    config: PeftConfig
    scales: dict[str, float]
    other_layers: dict[str, tuple[int, float]]
    base: BaseLabel


def write_adapter(
    tensors: dict[str, Tensor],
    about: About,
    added: dict[str, tuple[Tensor, Tensor]] | None,
    folder: Path,
    max_rank: int | None,
    put: Put = fill_folder,
) -> None:
    """Write the adapter's files.

    Args:
        tensors: All tensors by PEFT's names, the live pairs among them.
        about: What the files say beside the tensors.
        added: What was added to each site's W, without the scale, except for sites whose W is among the tensors; None
            for a run without switches.
        folder: Where to write.
        max_rank: Truncate to this rank; None is exact.
        put: Puts the files into the folder.
    """
    config = copy.deepcopy(about.config)
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the same file every time
    if added is not None:
        _set_ranks(config, _join_pairs_(tensors, about.scales, added, max_rank), about.other_layers)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": "pt", **about.base.metadata()}
    files = {
        SAFETENSORS_WEIGHTS_NAME: lambda path: save_file(tensors, path, metadata=metadata),
        "README.md": lambda path: path.write_text(_readme(config, about.base.weights)),
        CONFIG_NAME: lambda path: config.save_pretrained(str(path.parent)),
    }
    put(folder, files)
    if (folder / CONFIG_NAME).exists():  # else the disk is full, and the files wait in memory
        unmark_folder(folder)


def _join_pairs_(
    tensors: dict[str, Tensor],
    scales: dict[str, float],
    added: dict[str, tuple[Tensor, Tensor]],
    max_rank: int | None,
) -> dict[str, int]:
    """Join what was added to W and the live pairs to pairs of scale 1, and return the rank of each site."""
    ranks, errors = {}, []
    for name, scale in scales.items():
        a_name, b_name = (f"base_model.model.{name}.lora_{factor}.weight" for factor in "AB")
        b, a = tensors[b_name].float().cpu(), tensors[a_name].float().cpu()
        if name in added:
            b, a = torch.cat([added[name][0], b], 1), torch.cat([added[name][1], a], 0)
        b = scale * b
        if max_rank is not None and max_rank < a.shape[0]:
            b, a, error = truncate_pairs(b, a, max_rank)
            logger.info("%s: truncated to rank %d, relative error %.2e", name, max_rank, error)
            errors.append(error)
        tensors[a_name], tensors[b_name] = a, b
        ranks[name] = a.shape[0]
    if errors:
        logger.warning(
            "export to rank %d: relative error of the change of W, mean %.2e, largest %.2e over %d sites",
            max_rank,
            sum(errors) / len(errors),
            max(errors),
            len(errors),
        )
    return ranks


def _readme(config: PeftConfig, base: str) -> str:
    """A model card that says in which type of weights the base must be loaded; another type rounds differently."""
    name = config.base_model_name_or_path
    header = [f"base_model: {name}"] * bool(name) + ["library_name: peft", "tags: [lora, srlora]"]
    return "\n".join(["---", *header, "---", ""]) + (
        f"\nA LoRA adapter trained with srlora_dist on {name or 'a model'}, the adapted weights in **{base}**.\n"
        "Load the untouched model in that type (same dtype, same quantization_config) before the adapter: in another,\n"
        "outputs differ by what the types round away.\n"
    )


def _set_ranks(config: PeftConfig, ranks: dict[str, int], other_layers: dict[str, tuple[int, float]]) -> None:
    """Set rank and alpha of each layer: scale 1 at the sites (alpha = rank), unchanged at other layers.

    Layers whose rank or alpha differs from that of most sites are listed by name, escaped as PEFT's patterns need.
    """
    config.use_rslora = False
    config.init_lora_weights = True
    for options in ("eva_config", "corda_config", "loftq_config", "lora_ga_config"):  # of other initialisations
        if getattr(config, options, None):
            setattr(config, options, {} if options == "loftq_config" else None)
    config.r = max(ranks.values(), key=list(ranks.values()).count)
    config.lora_alpha = config.r
    alphas = ranks | {name: scale * rank for name, (rank, scale) in other_layers.items()}
    ranks = ranks | {name: rank for name, (rank, _) in other_layers.items()}
    config.rank_pattern = {_exactly(name): rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {_exactly(name): alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"
