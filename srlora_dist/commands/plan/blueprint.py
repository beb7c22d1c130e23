"""What a run is made of, from the configuration of its model alone: shapes and types, no weights and no network.

The model is built on the meta device and adapted by the code that a run uses, so that its sites are those of the run.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.config.run import ModelOptions, RunConfig
from srlora_dist.engine.precision import cast_trainable_
from srlora_dist.errors import first_sentence
from srlora_dist.layers.discovery import find_sites
from srlora_dist.layers.site import FUSED, Site
from srlora_dist.layers.spans import longest_padded, longest_rows
from srlora_dist.method.budget import plan_switches, share_out_directions_
from srlora_dist.method.second_adapter import add_second_adapters_
from srlora_dist.tasks.heads import heads_of
from srlora_dist.training.adapter import adapt

LLAMAS = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "llama-7b": (4096, 11008, 32, 32, 32, 32000),  # Llama 2, arXiv 2307.09288
    "llama-70b": (8192, 28672, 80, 64, 8, 128256),  # Llama 3.1, arXiv 2407.21783, Table 3
    "llama-405b": (16384, 53248, 126, 128, 8, 128256),  # likewise
}
BLOCK, NESTED_BLOCK = 64, 256
"""Weights of one 4-bit scale, and scales of one scale of scales, as bitsandbytes cuts them by default."""
CODE_4BIT, CODE_8BIT = 4 * 16, 4 * 256
"""Bytes of the tables of values that bitsandbytes keeps beside each 4-bit weight, and beside each set of its scales."""


class Stored(NamedTuple):
    """How a parameter is stored.

    Args:
        shape: Shape of the tensor that engines cut; a quantised weight is packed.
        element_size: Bytes an element.
        beside: Bytes that every rank holds whole beside it: scales and tables of a quantised weight.
    """

    shape: Sequence[int]
    element_size: int
    beside: int = 0

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


@dataclass
class Blueprint:
    """A run without its weights.

    Args:
        engine: ``plain``, ``ddp``, ``zero0``, ``zero1``, ``zero2``, ``zero3`` or ``fsdp2``.
        world_size: Ranks.
        sites: With their second adapters, where they need one.
        frozen: The pretrained parameters as they are stored.
        groups: The trained parameters of each group of the optimizer, in its order.
        num_moments: That the optimizer keeps of each of them.
        weights: How W of each site is stored.
        due_steps: Steps of the switches after switch 0.
        options: Options of the method.
        persistence_threshold: ZeRO-3 also keeps parameters of up to so many elements whole on every rank.
    """

    engine: str
    world_size: int
    sites: list[Site]
    frozen: list[Stored]
    groups: list[list[nn.Parameter]]
    num_moments: int
    weights: list[Stored]
    due_steps: list[int]
    options: SRLoRAConfig
    persistence_threshold: int = 0

    @property
    def gathers(self) -> bool:
        """Whether a rank holds only a part of each parameter."""
        return self.engine in ("zero3", "fsdp2")

    def is_persistent(self, stored: Stored) -> bool:
        """Whether ZeRO-3 also keeps a parameter whole on every rank."""
        return self.engine == "zero3" and stored.numel <= self.persistence_threshold

    def longest_run(self, stored: Stored) -> int:
        """Elements of the longest run that the model of a rank has of a parameter, padding included."""
        if self.engine == "fsdp2":
            return longest_rows(stored.shape, self.world_size)
        return longest_padded(stored.numel, self.world_size) if self.engine == "zero3" else stored.numel


def build_blueprint(config: RunConfig, world_size: int, persistence_threshold: int | None = None) -> Blueprint:
    """The blueprint of a run.

    Args:
        config: The run; ``train.max_steps`` is its length, ``model.name_or_path`` one of ``LLAMAS``, a folder or file
            with a configuration, or a name on the hub.
        world_size: Ranks.
        persistence_threshold: Threshold of ZeRO-3; None is 10 times the width, what Accelerate puts for ``auto``.

    Raises:
        ValueError: The model is not known, or an option does not fit it or the engine.
    """
    model = build_model(config)
    if persistence_threshold is None:
        widths = getattr(model.config, "hidden_sizes", [10**4])
        persistence_threshold = 10 * getattr(model.config, "hidden_size", max(widths))
    return draw_from(model, config, world_size, persistence_threshold)


def build_model(config: RunConfig) -> PeftModel:
    """The model of a run with its adapter, in the types in which it is trained, on the meta device.

    Raises:
        ValueError: The model is not known, or the adapter does not fit it.
    """
    model, peft_type, heads = _without_weights(_settings(config.model), config.model)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about weights
        model = adapt(config, model, peft_type, heads)
    cast_trainable_(model, config.model.dtype if config.engine.startswith("zero") else "float32")
    return model


def draw_from(
    model: nn.Module,
    config: RunConfig,
    world_size: int,
    persistence_threshold: int,
    groups: list[list[nn.Parameter]] | None = None,
) -> Blueprint:
    """The blueprint of a PEFT model that is there, not quantised, perhaps on the meta device; it is not kept.

    Args:
        model: It gets the second adapters.
        config: The run.
        world_size: Ranks.
        persistence_threshold: Threshold of ZeRO-3, in elements.
        groups: Parameter groups of the optimizer; None is all that is trained in one.

    Raises:
        ValueError: SRLoRA cannot work on the model like this.
    """
    options, train = config.srlora, config.train
    sites = find_sites(model, options.adapter_name)
    packed = _pack(model, config)
    for site in sites:
        site.quantised = config.model.quantization if id(site.weight) in packed else ""
    share_out_directions_(sites, options)
    due = plan_switches(sites, options, train.max_steps)
    add_second_adapters_(sites, options)
    frozen = {
        id(parameter): packed.get(id(parameter), Stored(parameter.shape, parameter.element_size()))
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and f".{FUSED}." not in name
    }
    return Blueprint(
        engine=config.engine,
        world_size=world_size,
        sites=sites,
        frozen=list(frozen.values()),
        groups=groups or [[parameter for parameter in model.parameters() if parameter.requires_grad]],
        num_moments=2 if train.optimizer == "adamw" else int(train.momentum > 0),
        weights=[frozen[id(site.weight)] for site in sites],
        due_steps=due,
        options=options,
        persistence_threshold=persistence_threshold,
    )


def _settings(options: ModelOptions) -> PretrainedConfig:
    name = options.name_or_path
    if name in LLAMAS:
        hidden, intermediate, layers, heads, key_value_heads, vocabulary = LLAMAS[name]
        return LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            vocab_size=vocabulary,
            architectures=["LlamaForCausalLM"],
        )
    try:
        if str(name).endswith(".json"):  # whatever the file is called
            return AutoConfig.for_model(**json.loads(Path(name).expanduser().read_text()))
        return AutoConfig.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # each kind of model raises errors of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model {name!r} has no configuration that can be read ({reason}): give {', '.join(LLAMAS)}, a folder with "
            "config.json, such a file, or a model on a hub that can be reached"
        ) from error


def _without_weights(
    settings: PretrainedConfig, options: ModelOptions
) -> tuple[PreTrainedModel, str | None, tuple[str, ...]]:
    """The model on the meta device, PEFT's ``task_type`` and the heads that it does not know.

    A decoder is taken as it is, any other as a classifier of texts or pictures whose head is new.
    """
    names = settings.architectures or []
    pictures = type(settings) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    decodes = not pictures and (any("CausalLM" in name or "LMHead" in name for name in names) or not names)
    others = AutoModelForImageClassification if pictures else AutoModelForSequenceClassification
    auto_class = AutoModelForCausalLM if decodes else others
    try:
        with torch.device("meta"):
            model = auto_class.from_config(settings, dtype=getattr(torch, options.dtype))
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        reason = first_sentence(error)
        raise ValueError(f"model {options.name_or_path!r} cannot be built from its configuration ({reason})") from error
    if decodes:
        return model, "CAUSAL_LM", ()
    heads = heads_of(model)
    if pictures:
        return model, None, heads
    return model, "SEQ_CLS", tuple(name for name in heads if name not in SEQ_CLS_HEAD_NAMES)


def _pack(model: nn.Module, config: RunConfig) -> dict[int, Stored]:
    """How bitsandbytes would store the frozen linear weights, all but the heads', by the identity of the parameter."""
    if config.model.quantization == "none":
        return {}
    kept = {"lm_head", *SEQ_CLS_HEAD_NAMES, "original_module"}  # the last is PEFT's, of a head that it trains a copy of
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and not module.weight.requires_grad
        and not kept & set(name.split("."))
    ]
    storage_size = getattr(torch, config.model.dtype).itemsize if config.engine == "fsdp2" else 1
    return {id(layer.weight): pack(layer.weight.shape, config.model, storage_size) for layer in layers}


def pack(shape: Sequence[int], options: ModelOptions, storage_size: int = 1) -> Stored:
    """How bitsandbytes stores a weight.

    Args:
        shape: (m, n).
        options: ``quantization`` and ``double_quantization``.
        storage_size: Bytes of the type that 4-bit weights are packed in.
    """
    numel = math.prod(shape)
    if options.quantization == "int8":
        return Stored(shape, 1, beside=4 * shape[0])  # one float32 a row
    num_scales = -(-numel // BLOCK)
    beside = CODE_4BIT + 4 * num_scales
    if options.double_quantization:  # a byte a scale, a float32 for every 256 of them, their table and their offset
        beside = CODE_4BIT + num_scales + 4 * -(-num_scales // NESTED_BLOCK) + CODE_8BIT + 4
    return Stored((-(-numel // (2 * storage_size)), 1), storage_size, beside)
