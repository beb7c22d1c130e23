"""What every text classification task shares: the model with its head, the tokenizer and the encoded rows."""

from __future__ import annotations

import datasets
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from srlora_dist.config.run import RunConfig
from srlora_dist.tasks.labels import check_columns
from srlora_dist.tasks.loading import check_length, check_tokens, load_classifier, quiet
from srlora_dist.tasks.metrics import Scorer
from srlora_dist.tasks.task import Task


def text_task(
    config: RunConfig, train: dict[str, list], evaluation: dict[str, list], num_labels: int, scorer: Scorer
) -> Task:
    """Make a task out of columns of text.

    Args:
        config: The run.
        train: Columns ``text``, ``pair`` where two texts belong together, and ``labels``.
        evaluation: Rows for evaluation, likewise.
        num_labels: Classes, whose labels are 0 and so on, or 1 for a regression on numbers.
        scorer: Its figures; the first is the main one.

    Raises:
        ValueError: A split is empty or has a label that does not belong, the model cannot be loaded, or an option does
            not fit it.
    """
    if isinstance(scorer, Scorer):  # one of one's own knows itself
        scorer.require_labels(num_labels)
    train, evaluation = (
        check_columns(split, columns, num_labels)
        for split, columns in (("training", train), ("evaluation", evaluation))
    )
    kind = "regression" if num_labels == 1 else "single_label_classification"
    with quiet():
        model, tokenizer, new_parts = load_classifier(config, num_labels=num_labels, problem_type=kind)
        paired = "pair" in train
        check_length(config, model, tokenizer, least=tokenizer.num_special_tokens_to_add(pair=paired) + 1 + paired)
        splits = [
            encode(tokenizer, columns, config.task.max_length, most)
            for columns, most in ((train, config.task.max_train_samples), (evaluation, config.task.max_eval_samples))
        ]
        for rows in splits:
            check_tokens(config, model, tokenizer, rows)
    return Task(
        model,
        tokenizer,
        *splits,
        collate=DataCollatorWithPadding(tokenizer),
        answers=logits_and_labels,
        loss=classification_loss,
        metrics=scorer,
        main_metric=scorer.names[0],
        peft_type="SEQ_CLS",
        heads=new_parts,
    )


def logits_and_labels(output: ModelOutput, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What classification and regression are judged by: logits (rows, labels), and labels (rows,)."""
    return output.logits, batch["labels"]


def classification_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy for class labels, mean squared error for labels that are floats."""
    if labels.is_floating_point():
        return nn.functional.mse_loss(outputs.squeeze(-1), labels.double())
    return nn.functional.cross_entropy(outputs, labels)


def encode(
    tokenizer: PreTrainedTokenizerBase, columns: dict[str, list], max_length: int, most: int | None
) -> datasets.Dataset:
    """Turn the first ``most`` texts into tokens, cut to ``max_length``; other columns stay."""
    rows = datasets.Dataset.from_dict({name: values[:most] for name, values in columns.items()})
    texts = [name for name in ("text", "pair") if name in columns]

    def tokenise(batch: dict[str, list]) -> dict[str, list]:
        return dict(tokenizer(*(batch[name] for name in texts), truncation=True, max_length=max_length))

    return rows.map(tokenise, batched=True, remove_columns=texts, keep_in_memory=True)
