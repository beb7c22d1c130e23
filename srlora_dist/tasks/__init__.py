"""What is learnt: each task is one short file that returns a :class:`Task`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from srlora_dist.config.run import RunConfig
from srlora_dist.tasks import demo, glue, images, instruct, lm
from srlora_dist.tasks.files import check_model_folder
from srlora_dist.tasks.labels import check_task_rows
from srlora_dist.tasks.own import load_file
from srlora_dist.tasks.packaged import base_model

if TYPE_CHECKING:  # so that check_task can refuse a run without these seconds of imports
    import datasets
    import numpy as np
    from torch import Tensor
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils import ModelOutput

TASKS = {
    "demo": demo,
    **dict.fromkeys(glue.GLUE, glue),
    "lm": lm,
    "instruct": instruct,
    **dict.fromkeys(images.NAMES, images),
}
"""Each task's module, which offers ``check(config)`` and ``load(config)``."""


@dataclass
class Task:
    """A model and the data to fine-tune it on.

    Args:
        model: The untouched pretrained base, with the task's head.
        tokenizer: Its tokenizer or image processor.
        train: Rows that ``collate`` understands, such as model inputs and ``labels``, not padded.
        eval: The same for evaluation.
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
        names: Of the training rows, where one of them can go missing between two starts of a run, as files can: then a
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


def check_task(config: RunConfig) -> None:
    """Refuse a task that cannot be loaded, before data or model are read.

    Args:
        config: The run; ``config.task`` and ``config.model`` are looked at.

    Raises:
        ValueError: The task is unknown, one of its options is out of range, or a file that it needs is missing.
    """
    task = config.task
    module = _module_of(task.name)
    for option in ("max_length", "max_train_samples", "max_eval_samples"):
        value = getattr(task, option)
        if value is not None and value < 1:
            raise ValueError(f"task.{option} is {value}: choose at least 1")
    name, gguf_file = base_model(config)
    if gguf_file is None:
        check_model_folder(name)
    if hasattr(module, "check"):  # a file of one's own may do without
        module.check(config)


def load_task(config: RunConfig) -> Task:
    """Build the task that ``config.task.name`` asks for; every process builds the same one.

    Args:
        config: The run; ``config.seed`` draws the task's head and nothing else.

    Returns:
        The model, its data and its metrics.

    Raises:
        ValueError: As :func:`check_task`, the data or the model cannot be read, a split is empty, or a label does not
            belong.
    """
    check_task(config)
    task = _module_of(config.task.name).load(config)
    if not isinstance(task, Task):
        raise ValueError(
            f"task.name is {config.task.name!r}, whose load(config) gives {type(task).__name__}: let it return a Task"
        )
    check_task_rows(task)
    return task


def _module_of(name: str) -> ModuleType:
    if name.endswith(".py"):
        return load_file(name)
    if name not in TASKS:
        raise ValueError(f"task.name is {name!r}: choose one of {', '.join(TASKS)}, or a file of your own (.py)")
    return TASKS[name]
