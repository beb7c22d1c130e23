"""Which tasks there are, and how one is checked and loaded."""

from __future__ import annotations

from types import ModuleType

from srlora_dist.config.run import RunConfig
from srlora_dist.tasks import demo, glue, images, instruct, lm
from srlora_dist.tasks.custom import load_file
from srlora_dist.tasks.labels import check_task_rows
from srlora_dist.tasks.model_files import check_model_folder
from srlora_dist.tasks.sources import NAMES, base_model
from srlora_dist.tasks.task import Task

TASKS = {
    "demo": demo,
    **dict.fromkeys(glue.GLUE, glue),
    "lm": lm,
    "instruct": instruct,
    **dict.fromkeys(NAMES, images),
}
"""Each task's module, which offers ``check(config)`` and ``load(config)``."""


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
