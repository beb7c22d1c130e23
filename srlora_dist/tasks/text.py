"""What every text classification task shares: the model with its head, the tokenizer and the encoded rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from srlora_dist.config import RunConfig
from srlora_dist.tasks import Task
from srlora_dist.tasks.metrics import Scorer
from srlora_dist.tasks.minilm import base_model


def text_task(
    config: RunConfig, train: dict[str, list], evaluation: dict[str, list], num_labels: int, scorer: Scorer
) -> Task:
    """Make a task out of columns of text.

    Args:
        config: The run.
        train: Columns ``text``, ``pair`` where two texts belong together, and ``labels``.
        evaluation: The same for evaluation.
        num_labels: Classes, or 1 for a regression on labels that are floats.
        scorer: Its figures; the first is the main one.

    Returns:
        The task, in fp32 unless ``config.model.dtype`` says otherwise.

    Raises:
        ValueError: The model cannot be loaded, or an option does not fit it.
    """
    dtype = _float_type(config.model.dtype)
    with _quiet():
        model, tokenizer = _load_model(config, num_labels, dtype)
        if config.model.dropout is not None:
            set_dropout_(model, config.model.dropout)
        _check_length(config, model, tokenizer, paired="pair" in train)
        splits = [
            _encode(tokenizer, columns, config.task.max_length, most)
            for columns, most in ((train, config.task.max_train_samples), (evaluation, config.task.max_eval_samples))
        ]
    collate = DataCollatorWithPadding(tokenizer)
    return Task(model, tokenizer, *splits, collate, scorer, main_metric=scorer.names[0], peft_type="SEQ_CLS")


def set_dropout_(model: PreTrainedModel, share: float) -> None:
    """Set every dropout of a model, also those that an attention keeps as a plain number or in the configuration.

    Args:
        model: Changed in place.
        share: Of the activations that are dropped, in [0, 1).
    """
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d)):
            module.p = share
        _set_dropout_numbers_(module, share)
    _set_dropout_numbers_(model.config, share)


def _set_dropout_numbers_(holder: object, share: float) -> None:
    for name, value in vars(holder).items():
        if ("dropout" in name or name.endswith("pdrop")) and type(value) in (int, float):
            setattr(holder, name, share)


def _float_type(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"model.dtype is {name!r}: choose float32, bfloat16 or float16")
    return dtype


def _load_model(
    config: RunConfig, num_labels: int, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    name, trust = base_model(config), config.model.trust_remote_code
    kind = "regression" if num_labels == 1 else "single_label_classification"
    try:
        settings = AutoConfig.from_pretrained(name, num_labels=num_labels, problem_type=kind, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        torch.manual_seed(config.seed)  # the head is drawn below and has to be the same in every process
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=settings,
            dtype=dtype,
            trust_remote_code=trust,
            ignore_mismatched_sizes=True,  # a head for another number of classes gives way to a new one
            output_loading_info=True,
        )
    except OSError as error:
        raise ValueError(
            f"model.name_or_path is {name!r}, which is neither a local folder with a model and its tokenizer nor a "
            f"model on a hub that can be reached: {error}"
        ) from error
    _warn_of_random_body(name, model, {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    _ensure_padding_(name, model, tokenizer)
    return model, tokenizer


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
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def _check_length(config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, paired: bool) -> None:
    length, least = config.task.max_length, tokenizer.num_special_tokens_to_add(pair=paired) + 1 + paired
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    most = min(positions, tokenizer.model_max_length)
    if not least <= length <= most:
        raise ValueError(f"task.max_length is {length}: {base_model(config)} takes {least} to {most} tokens")


def _encode(
    tokenizer: PreTrainedTokenizerBase, columns: dict[str, list], max_length: int, most: int | None
) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({name: values[:most] for name, values in columns.items()})
    texts = [name for name in ("text", "pair") if name in columns]

    def tokenise(batch: dict[str, list]) -> dict[str, list]:
        return dict(tokenizer(*(batch[name] for name in texts), truncation=True, max_length=max_length))

    return rows.map(tokenise, batched=True, remove_columns=texts, keep_in_memory=True)


@contextmanager
def _quiet() -> Iterator[None]:
    # Every rank loads the model, and each would print its progress and the list of weights that the head lacks.
    log = transformers.utils.logging
    level, bars, data_bars = log.get_verbosity(), log.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
        if not data_bars:
            datasets.enable_progress_bars()
