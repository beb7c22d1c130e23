"""What tasks of causal language models share: rows of tokens and labels, perhaps packed, and how they are judged."""

from __future__ import annotations

import inspect
from bisect import bisect_left, insort
from collections.abc import Callable
from itertools import chain

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from srlora_dist.config.run import RunConfig
from srlora_dist.tasks.labels import IGNORED, check_token_labels
from srlora_dist.tasks.sources import base_model
from srlora_dist.tasks.task import Task

UNSHIFTED = {
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "cpmant", "marian", "mbart", "mvp", "pegasus"),
    *("plbart", "prophetnet", "trocr", "whisper", "xlm", "xlnet"),
}
"""Models whose loss compares what a token predicts with that token itself (Transformers 5.23)."""
MASKED_LAYERS = {"full_attention", "sliding_attention"}
"""What Transformers calls the layers in which a token sees what the mask shows, and nothing else."""


def token_task(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: datasets.Dataset,
    evaluation: datasets.Dataset,
) -> Task:
    """Make a task out of rows of tokens.

    Args:
        config: The run; ``config.task.packing`` packs the training rows.
        model: A decoder.
        tokenizer: Its tokenizer.
        train: Columns ``input_ids`` and ``labels``; what is not learnt is ``IGNORED``. The first token never is:
            nothing before it predicts it.
        evaluation: Rows for evaluation, likewise.

    Raises:
        ValueError: A row has no label to learn or one that is no token, or the model cannot be trained on packed rows.
    """
    packing = config.task.packing
    for split, rows in (("training", train), ("evaluation", evaluation)):
        check_token_labels(split, rows, getattr(model.get_input_embeddings(), "num_embeddings", None))
    if packing:
        require_packable(config, model)
        train = pack(train, config.task.max_length)
    padding = tokenizer.pad_token_id
    return Task(
        model,
        tokenizer,
        train,
        evaluation,
        collate=collator(padding, getattr(torch, config.model.dtype)),
        answers=sums_and_counts,
        loss=token_loss,
        metrics=perplexity,
        main_metric="perplexity",
        peft_type="CAUSAL_LM",
        num_targets=[sum(label != IGNORED for label in labels[1:]) for labels in train["labels"]],
    )


def require_decoder(config: RunConfig, model: PreTrainedModel) -> None:
    """Stop where a model would learn to predict a token that it sees.

    Raises:
        ValueError: The model is an encoder, or its loss is that of the tokens where they are.
    """
    kind = model.config.model_type
    is_encoder = type(model.config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model.config, "is_decoder", True)
    if is_encoder or kind in UNSHIFTED:
        reason = "is not a decoder" if is_encoder else "does not shift the labels of its loss to the next token"
        raise ValueError(
            f"model.name_or_path is {base_model(config)[0]!r}, which {reason} ({kind}): "
            f"task {config.task.name} needs a decoder, such as a Llama or a GPT-2"
        )


def require_packable(config: RunConfig, model: PreTrainedModel) -> None:
    """Stop where samples of a packed row would see each other, or a mask for them would be taken for something else.

    Raises:
        ValueError: With the reason.
    """
    settings, longest = model.config.get_text_config(), config.task.max_length
    kinds = getattr(settings, "layer_types", None) or ()
    window = getattr(settings, "sliding_window", None)
    slides = window is not None and (not kinds or any("sliding" in kind for kind in kinds))
    attention, others = model.config._attn_implementation, sorted({*kinds} - MASKED_LAYERS)
    reasons = {
        "it keeps a state from token to token": getattr(model, "_is_stateful", False),
        f"it has layers of the kind {', '.join(others)}, which may look past a mask": others,
        f"its attention is {attention}, which takes no mask of blocks": attention not in ("eager", "sdpa"),
        "it takes no position_ids": "position_ids" not in inspect.signature(model.forward).parameters,
        f"its window of {window} tokens is shorter than task.max_length {longest}": slides and window < longest,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"task.packing does not work with a model of type {settings.model_type}: {reason}")


def pack(rows: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Put whole samples together into rows of at most so many tokens, each time into the fullest row where one fits.

    Args:
        rows: Columns ``input_ids`` and ``labels``.
        max_length: Tokens of a packed row; no sample is longer.

    Returns:
        Fewer rows, with ``position_ids`` that begin with 0 in each sample.
    """
    lengths = [len(tokens) for tokens in rows["input_ids"]]
    bins, spaces = [], []  # spaces: what is left of which bin, sorted
    for sample in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        place = bisect_left(spaces, (lengths[sample], -1))
        space, number = spaces.pop(place) if place < len(spaces) else (max_length, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(sample)
        insort(spaces, (space - lengths[sample], number))
    columns = {
        name: [np.fromiter(chain.from_iterable(values[k] for k in samples), np.int32) for samples in bins]
        for name, values in {
            "input_ids": rows["input_ids"][:],
            "labels": [[IGNORED, *labels[1:]] for labels in rows["labels"]],
            "position_ids": [range(length) for length in lengths],
        }.items()
    }
    return datasets.Dataset.from_dict(columns)


def collator(padding: int, dtype: torch.dtype) -> Callable[[list[dict]], dict[str, Tensor]]:
    """What makes a batch out of rows: padded on the right, and with a mask of blocks where they are packed.

    Args:
        padding: The token.
        dtype: Type of the model's activations, and of the mask.
    """

    def collate(rows: list[dict]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, fill: int) -> Tensor:
            return torch.tensor([[*row[name], *[fill] * (width - len(row[name]))] for row in rows])

        batch = {"input_ids": padded("input_ids", padding), "labels": padded("labels", IGNORED)}
        if "position_ids" in rows[0]:
            batch["position_ids"] = padded("position_ids", 0)
            batch["attention_mask"] = block_mask(batch["position_ids"], dtype)
        else:  # by the lengths, not by the token: the padding token may be the one that ends a document
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        return batch

    return collate


def block_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask with which the samples of a packed row do not see each other.

    It is added to the attention's scores: 0 where a token sees another, the least number elsewhere. Every attention
    understands that form, and the models hand a mask of four dimensions on as it is.

    Args:
        position_ids: (rows, tokens), 0 where a sample begins and in each token of the padding.
        dtype: Type of the mask.

    Returns:
        Of shape (rows, 1, tokens, tokens).
    """
    sample = (position_ids == 0).cumsum(1)
    sees = (sample[:, :, None] == sample[:, None, :]).tril()
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min).unsqueeze(1)


def sums_and_counts(output: ModelOutput, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each row, summed over its tokens, and their number: both of shape (rows,)."""
    labels = batch["labels"][:, 1:]
    # (rows, vocabulary, tokens), as cross_entropy wants it
    scores = output.logits[:, :-1].float().transpose(1, 2)
    losses = nn.functional.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="none")
    return losses.double().sum(1), (labels != IGNORED).sum(1)


def token_loss(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean over all tokens of a split."""
    return sums.sum() / counts.sum()


def perplexity(sums: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """The exponential of the loss; lower is better."""
    with np.errstate(over="ignore"):
        return {"perplexity": float(np.exp(sums.sum() / counts.sum()))}
