"""Puts a PEFT adapter on the base model, and refuses what PEFT would let pass in silence."""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from srlora_dist.config.run import RunConfig


def adapt(config: RunConfig, base: PreTrainedModel, peft_type: str | None, heads: Sequence[str] = ()) -> PeftModel:
    """Put a LoRA adapter on a model. The model may be on the meta device, without weights.

    Args:
        config: The options of the run.
        base: The untouched model.
        peft_type: The task type, by PEFT's name.
        heads: Names of modules that are trained whole and saved with the adapter. For some task types PEFT knows them
            by itself.

    Raises:
        ValueError: No layer matches ``lora.target_modules``, or the rank is above that of every matrix.
    """
    options = adapter_options(config, base, peft_type, heads)
    return add_adapter(base, LoraConfig(r=config.lora.rank, use_rslora=config.lora.use_rslora, **options), config)


def adapter_options(
    config: RunConfig, base: PreTrainedModel, peft_type: str | None, heads: Sequence[str]
) -> dict[str, object]:
    """The options that LoRA and AdaLoRA have in common, by PEFT's names. The arguments are those of :func:`adapt`.

    Raises:
        ValueError: No layer matches ``lora.target_modules``, or the rank is above that of every matrix.
    """
    _require_rank(config.lora.rank, base)
    targets = config.lora.target_modules
    names = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    if targets != "all-linear":
        _require_targets(names, base)
    return {
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "target_modules": names,
        "task_type": peft_type,
        "modules_to_save": list(heads) or None,
        "exclude_modules": list(heads) or None,  # all-linear would adapt a head that PEFT does not know
    }


def add_adapter(base: PreTrainedModel, adapter: LoraConfig, config: RunConfig) -> PeftModel:
    """Put an adapter of any kind on a model.

    Raises:
        ValueError: PEFT refuses ``lora.target_modules``.
    """
    try:
        return get_peft_model(base, adapter, adapter_name=config.srlora.adapter_name)
    except ValueError as error:
        raise ValueError(f"lora.target_modules is {config.lora.target_modules!r}: {error}") from error


def _require_rank(rank: int, base: PreTrainedModel) -> None:
    """Stop if no matrix has that many directions: the other pairs would be wasted, and might not fit into memory."""
    shapes = [(layer.in_features, layer.out_features) for layer in base.modules() if isinstance(layer, nn.Linear)]
    shapes += [(layer.nx, layer.nf) for layer in base.modules() if isinstance(layer, Conv1D)]
    most = max(map(min, shapes), default=rank)
    if rank > most:
        raise ValueError(
            f"lora.rank is {rank}, but no matrix of the model has a rank above {most}: choose a smaller one"
        )


def _require_targets(names: list[str], base: PreTrainedModel) -> None:
    """Stop if a name fits no module. PEFT would leave it out in silence, as long as another name fits."""
    modules = [f".{name}" for name, _ in base.named_modules() if name]
    for name in names:
        if not any(module.endswith(f".{name}") for module in modules):
            raise ValueError(
                f"lora.target_modules is {','.join(names)!r}, but the model has no module {name!r}: correct it, or "
                "choose all-linear"
            )
