"""Loads the pretrained model of a task and what makes its inputs: any source, any storage of the weights."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BaseImageProcessor,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from srlora_dist.config.run import RunConfig
from srlora_dist.tasks.heads import never_quantised, new_parts
from srlora_dist.tasks.model_files import reading, unpack_gguf
from srlora_dist.tasks.sources import base_model

if TYPE_CHECKING:  # srlora merge does without it
    import datasets


def load_decoder(config: RunConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the causal language model of ``config.model``, with a padding token and the configured dropout.

    Args:
        config: The run; ``config.engine`` decides the type in which 4-bit weights are packed.

    Raises:
        ValueError: The model or a package that it needs is not there, or a setting does not fit it.
    """
    model, tokenizer, _ = _load(AutoTokenizer.from_pretrained, "tokenizer", config, AutoModelForCausalLM)
    _ensure_padding_(model.name_or_path, model, tokenizer)
    return model, tokenizer


def load_classifier(
    config: RunConfig, **options: object
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, tuple[str, ...]]:
    """Load the classifier of texts of ``config.model``, with the configured dropout.

    Args:
        config: The run; ``config.seed`` draws weights that the checkpoint lacks.
        options: Go into the model's configuration.

    Returns:
        The model, its tokenizer, and which modules start at random beside the heads that PEFT knows.

    Raises:
        ValueError: As :func:`load_decoder`.
    """
    auto_class = AutoModelForSequenceClassification
    model, tokenizer, not_loaded = _load(AutoTokenizer.from_pretrained, "tokenizer", config, auto_class, **options)
    _ensure_padding_(model.name_or_path, model, tokenizer)
    return model, tokenizer, new_parts(model, not_loaded)


def load_image_model(
    config: RunConfig, auto_class: type, **options: object
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load the classifier of pictures of ``config.model``, and the image processor that belongs to it.

    Raises:
        ValueError: As :func:`load_decoder`.
    """
    # Not the one of torchvision, which need not be there and gives other pixels.
    reader = partial(AutoImageProcessor.from_pretrained, backend="pil")
    model, processor, _ = _load(reader, "image processor", config, auto_class, **options)
    return model, processor


def _load(
    read: Callable, part: str, config: RunConfig, auto_class: type, **options: object
) -> tuple[PreTrainedModel, object, set[str]]:
    """Load a model, the part that makes its inputs, which is read first because that takes no time, and what it lacks.

    Weights that the checkpoint does not have, or has in another shape, are drawn from ``config.seed``.
    """
    name, gguf_file = base_model(config)
    trust = {"trust_remote_code": config.model.trust_remote_code}
    if gguf_file is not None:
        name = unpack_gguf(name, gguf_file, config.model.dtype)
    with reading(name, "configuration", "give a local folder with a model, or a model on a hub that can be reached"):
        settings = AutoConfig.from_pretrained(name, **trust, **options)
    with reading(name, part, "keep its files in the folder of the model"):
        makes_inputs = read(name, **trust)
    if isinstance(makes_inputs, PreTrainedTokenizerBase):
        _require_words(name, makes_inputs)
    quantization = _quantization(config, auto_class, settings)
    torch.manual_seed(config.seed)  # a head is drawn below and has to be the same in every process
    with reading(name, "weights", "they have to fit config.json, and to be safetensors: pickles are not opened"):
        model, report = auto_class.from_pretrained(
            name,
            config=settings,
            dtype=getattr(torch, config.model.dtype),
            quantization_config=quantization,
            use_safetensors=True,  # reading a pickle can run whatever is in it
            ignore_mismatched_sizes=True,  # a head for another number of classes gives way to a new one
            output_loading_info=True,
            **trust,
        )
    not_loaded = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    _warn_of_random_body(name, model, not_loaded)
    if config.model.dropout is not None:
        set_dropout_(model, config.model.dropout)
    return model, makes_inputs, not_loaded


def set_dropout_(model: PreTrainedModel, share: float) -> None:
    """Set every dropout of a model, also those that an attention keeps as a plain number or in the configuration.

    Args:
        model: Changed in place.
        share: Share of the activations that are dropped, in [0, 1).
    """
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d)):
            module.p = share
        _set_dropout_numbers_(module, share)
    _set_dropout_numbers_(model.config, share)


def check_length(config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, least: int) -> None:
    """Compare ``task.max_length`` with what the model takes.

    Raises:
        ValueError: It is below ``least`` or above the positions of the model.
    """
    length = config.task.max_length
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    most = min(positions, tokenizer.model_max_length)
    if not least <= length <= most:
        raise ValueError(f"task.max_length is {length}: {base_model(config)[0]} takes {least} to {most} tokens")


def check_tokens(
    config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset
) -> None:
    """Compare the tokens of the encoded rows, and the padding, with what the model has an embedding for.

    Raises:
        ValueError: One is beyond it.
    """
    most = getattr(model.get_input_embeddings(), "num_embeddings", None)
    highest = max((max(tokens, default=0) for tokens in rows["input_ids"]), default=0)
    highest = max(highest, tokenizer.pad_token_id)
    if most is not None and highest >= most:
        raise ValueError(
            f"the tokenizer of {base_model(config)[0]!r} gives token {highest}, but the model has embeddings for "
            f"{most}: put the model's own tokenizer into its folder"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what every rank would print: progress, and the list of weights that a head lacks."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    data = sys.modules.get("datasets")
    data_bars = data is not None and not data.are_progress_bars_disabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    if data_bars:
        data.disable_progress_bars()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
        if data_bars:
            data.enable_progress_bars()


def _require_words(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    # Where the files are missing, Transformers makes a tokenizer that knows its special tokens alone.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(
            f"model.name_or_path is {name!r}, whose tokenizer has no words: keep its files in the folder of the model"
        )


def _quantization(config: RunConfig, auto_class: type, settings: PretrainedConfig) -> BitsAndBytesConfig | None:
    options = config.model
    if options.quantization == "none":
        return None
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"model.quantization is {options.quantization}, which needs the package bitsandbytes: "
            "pip install bitsandbytes"
        )
    skipped = never_quantised(auto_class, settings, trust_remote_code=options.trust_remote_code)
    if options.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    dtype = getattr(torch, options.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quantization,
        bnb_4bit_use_double_quant=options.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        # FSDP cuts parameters of one floating type alone.
        bnb_4bit_quant_storage=dtype if config.engine == "fsdp2" else torch.uint8,
        llm_int8_skip_modules=skipped,
    )


def _set_dropout_numbers_(holder: object, share: float) -> None:
    for name, value in vars(holder).items():
        if ("dropout" in name or name.endswith("pdrop")) and type(value) in (int, float):
            setattr(holder, name, share)


def _warn_of_random_body(name: str, model: PreTrainedModel, not_loaded: set[str]) -> None:
    # A new head is what fine-tuning wants; a body that starts at random is a mistake that the quiet load would hide.
    body = sorted(key for key in not_loaded if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key)
    if body:
        warnings.warn(
            f"model.name_or_path is {name!r}, which lacks {len(body)} weights of the model or has them in another "
            f"shape, the first of them {body[0]}: they start at random",
            stacklevel=2,
        )


def _ensure_padding_(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {name!r} has neither a padding nor an end token: choose another model.name_or_path"
            )
        tokenizer.pad_token = tokenizer.eos_token
    # A classifier that looks for the last token which is not padding has to know the same one.
    for settings in (model.config, model.config.get_text_config()):
        settings.pad_token_id = tokenizer.pad_token_id
