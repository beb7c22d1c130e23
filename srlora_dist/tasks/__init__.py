"""A model, and data to fine-tune it on: each task is one short file that returns a :class:`Task`."""

from srlora_dist.tasks.registry import TASKS, check_task, load_task
from srlora_dist.tasks.task import Task

__all__ = ["TASKS", "Task", "check_task", "load_task"]
