"""Looks at what a task is to be trained on and judged by before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

    from srlora_dist.tasks.task import Task

IGNORED = -100
"""The label that Transformers leaves out of a loss."""


def check_columns(split: str, columns: dict[str, list], num_labels: int) -> dict[str, list]:
    """Look at the columns of a split of texts.

    Args:
        split: Its name, for messages.
        columns: ``text``, perhaps ``pair``, and ``labels``.
        num_labels: Classes, or 1 for a regression.

    Returns:
        The same columns; the labels of a regression as floats.

    Raises:
        ValueError: The split is empty, a column has another length, a text is no text, or a label does not belong; the
            message names the row and the value.
    """
    for name in ("text", "labels"):
        if name not in columns:
            raise ValueError(f"the {split} split has no column {name!r}, but {', '.join(columns) or 'none'}")
    labels = columns["labels"]
    require_rows(split, len(labels))
    for name, values in columns.items():
        if len(values) != len(labels):
            raise ValueError(f"the {split} split has {len(labels)} labels, but {len(values)} of {name!r}")
    for name in ("text", "pair"):
        for row, text in enumerate(columns.get(name, ())):
            if not isinstance(text, str):
                raise ValueError(f"the {split} split, row {row}: {name!r} is {text!r}, which is no text")
    check_labels(split, labels, num_labels)
    return columns | {"labels": [float(label) if num_labels == 1 else int(label) for label in labels]}


def check_labels(split: str, labels: Sequence[object], num_labels: int) -> None:
    """Look at one label a row.

    Args:
        split: Its name, for messages.
        labels: Class indices, or for a regression numbers.
        num_labels: Classes, or 1 for a regression.

    Raises:
        ValueError: One is of another kind, out of range, or not a finite number; the message names it.
    """
    if isinstance(num_labels, bool) or not isinstance(num_labels, Integral) or num_labels < 1:
        raise ValueError(f"num_labels is {num_labels!r}: choose the number of classes, or 1 for a regression")
    kind, remedy = (Real, "give a finite number") if num_labels == 1 else (Integral, _range(num_labels))
    for row, label in enumerate(labels):
        value = label.item() if hasattr(label, "item") else label  # numpy's have other types
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(
                f"the {split} split, row {row}: the label is {value!r}, a {type(value).__name__}: {remedy}"
            )
        if num_labels == 1 and not math.isfinite(value):
            raise ValueError(f"the {split} split, row {row}: the label is {value}: leave that row out")
        if num_labels > 1 and not 0 <= value < num_labels:
            raise ValueError(f"the {split} split, row {row}: the label is {value}: {remedy}")


def check_token_labels(split: str, rows: datasets.Dataset, num_tokens: int | None) -> None:
    """Look at the labels of rows of tokens.

    Args:
        split: Its name, for messages.
        rows: Columns ``input_ids`` and ``labels``.
        num_tokens: That the model has embeddings for.

    Raises:
        ValueError: A row has none to learn or another number of labels than tokens, or one is no token.
    """
    import numpy as np

    require_rows(split, len(rows))
    for row, (tokens, labels) in enumerate(zip(rows["input_ids"], rows["labels"], strict=True)):
        this, given = f"the {split} split, row {row}", np.asarray(labels)
        if len(tokens) != len(labels):
            raise ValueError(f"{this} has {len(tokens)} tokens, but {len(labels)} labels: give one label per token")
        if (given[1:] == IGNORED).all():
            raise ValueError(f"{this} has no label after its first token that is learnt: leave that row out")
        if given.dtype.kind not in "iu":
            raise ValueError(f"{this} has labels that are no whole numbers ({given.dtype}): give tokens, or {IGNORED}")
        wrong = given[(given != IGNORED) & ((given < 0) | (given >= (num_tokens or math.inf)))]
        if wrong.size:
            most = "" if num_tokens is None else f" below {num_tokens}"
            raise ValueError(f"{this} has the label {wrong[0]}: give a token{most}, or {IGNORED}")


def check_task_rows(task: Task) -> None:
    """Look at both splits of a task that a file of one's own may have made.

    Raises:
        ValueError: A split is empty, or has a label that is not as it should be.
    """
    for split, rows in (("training", task.train), ("evaluation", task.eval)):
        require_rows(split, len(rows))
        kind = getattr(rows, "features", {}).get("labels")
        dtype = getattr(kind, "dtype", None)
        if not isinstance(dtype, str):  # of tokens, or of another kind
            continue
        settings = getattr(task.model, "config", None)
        classes = getattr(settings, "num_labels", None) or 1
        is_regression = dtype.startswith("float")
        judged = getattr(settings, "problem_type", None) in (None, "single_label_classification", "regression")
        if judged and (is_regression or (classes > 1 and task.num_targets is None)):
            check_labels(split, rows["labels"][:], 1 if is_regression else classes)


def require_rows(split: str, count: int) -> None:
    """Refuse a split without rows.

    Raises:
        ValueError: It has none.
    """
    if count == 0:
        raise ValueError(f"the {split} split is empty: give it one row at least")


def _range(num_labels: int) -> str:
    return f"give a class index, a whole number from 0 to {num_labels - 1}; num_labels=1 makes a regression of numbers"
