"""What a task is: a pretrained model, and the data to fine-tune it on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that check_task can refuse a run without these seconds of imports
    import datasets
    import numpy as np
    from torch import Tensor
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils import ModelOutput


@dataclass
class Task:
    """A model and the data to fine-tune it on.

    Args:
        model: The untouched pretrained base, with the task's head.
        tokenizer: Its tokenizer or image processor.
        train: Rows that ``collate`` understands, such as model inputs and ``labels``, not padded.
        eval: Rows for evaluation, likewise.
        collate: Makes a padded batch of tensors out of rows.
        answers: Takes the model's output and the batch, gives what evaluation keeps of them: two tensors with one row a
            sample and as little else as the loss and the figures need, because they are gathered from all ranks.
        loss: Takes both for a whole split, gives the validation loss.
        metrics: Takes both likewise, gives named figures.
        main_metric: The name of the figure to report first.
        peft_type: PEFT's ``task_type`` for the adapter; it decides which head is trained and saved with it.
        heads: Modules to train whole and save where the type does not say.
        num_targets: Tokens of each training row that are learnt, at least one: then an optimizer step takes the mean
            over all its tokens, and ``labels`` has -100 for the others. None takes the mean over rows.
        names: Names of the training rows, where one can go missing between two starts of a run, as files can: then the
            run goes on without it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | BaseImageProcessor
    train: datasets.Dataset
    eval: datasets.Dataset
    collate: Callable[[list[dict]], dict[str, Tensor]]
    answers: Callable[[ModelOutput, dict[str, Tensor]], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    main_metric: str
    peft_type: str | None
    heads: tuple[str, ...] = ()
    num_targets: Sequence[int] | None = None
    names: list[str] | None = None
