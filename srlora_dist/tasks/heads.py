"""What of a model is a head or as new as one: trained whole, saved with the adapter, and never quantised."""

from __future__ import annotations

import torch
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def heads_of(model: PreTrainedModel) -> tuple[str, ...]:
    """What a model has beside its pretrained body: the head, whatever it is called."""
    beside = (name for name, child in model.named_children() if name != model.base_model_prefix)
    return tuple(name for name in beside if any(True for _ in model.get_submodule(name).parameters()))


def new_parts(model: PreTrainedModel, not_loaded: set[str]) -> tuple[str, ...]:
    """Modules around the body of a classifier that start at random, but for heads that PEFT knows.

    DeBERTa's pooler is one, and DistilBERT's pre_classifier: what PEFT does not save of them, no other load would have.

    Args:
        model: The classifier.
        not_loaded: Names of weights that the checkpoint lacks.
    """
    parts = set()
    for key in not_loaded:
        first = key.split(".")[0]
        if first != model.base_model_prefix:
            parts.add(first)
        elif ".pooler." in key:
            parts.add(key.split(".pooler.")[0] + ".pooler")
    return tuple(sorted(parts - {*SEQ_CLS_HEAD_NAMES}))


def never_quantised(auto_class: type, settings: PretrainedConfig, **options: object) -> list[str] | None:
    """Layers that bitsandbytes leaves as they are: a classifier's heads; None is the output layer of a decoder.

    Args:
        auto_class: Class of Transformers that makes the model.
        settings: The configuration of the model.
        options: Arguments of ``from_config``.
    """
    if auto_class is AutoModelForCausalLM:
        return None
    with torch.device("meta"):
        model = auto_class.from_config(settings, **options)
    return sorted({*SEQ_CLS_HEAD_NAMES, *heads_of(model)})
