"""Writes the checkpoints of a training loop, and brings a loop back to where one was written."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field, replace

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.optim.lr_scheduler import LambdaLR

from srlora_dist.checkpoint.format import Checkpoint, remove_checkpoints, remove_later_checkpoints
from srlora_dist.checkpoint.random_state import random_state, restore_random_state
from srlora_dist.config.run import RunConfig
from srlora_dist.method.diagnostics import LossWatch
from srlora_dist.storage.collectives import run_together
from srlora_dist.tasks.same_rows import pack_names, put_rows_back_, unpack_names
from srlora_dist.tasks.task import Task
from srlora_dist.training.methods import Method
from srlora_dist.training.resume import checkpoints_of
from srlora_dist.training.run_log import Window

logger = logging.getLogger(__name__)


NUM_EVALUATIONS = 5


@dataclass
class Progress:
    """How far a run has come; a checkpoint holds it.

    Args:
        done: Optimizer steps, those that were skipped too.
        start: Validation figures before the first step.
        best: Those of the lowest loss so far, with their ``step``.
        exported_step: Whose adapter lies in ``adapter``: not that of the best step where the disk was full.
        final: The last ones.
        train_seconds: Time of the training loop so far, over all starts.
        method_seconds: What the method added to it before the last start.
        num_skipped: Steps that were left out because their gradient was NaN or infinite.
        num_bad_in_a_row: Those up to now, without a good one after them.
        resumed_after: The steps after which the run was resumed.
        findings: What ``diagnostics.py`` noticed, each as a dictionary.
    """

    done: int = 0
    start: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] | None = None
    exported_step: int | None = None
    final: dict[str, float] = field(default_factory=dict)
    train_seconds: float = 0.0
    method_seconds: dict[str, float] = field(default_factory=dict)
    num_skipped: int = 0
    num_bad_in_a_row: int = 0
    resumed_after: list[int] = field(default_factory=list)
    findings: list[dict[str, object]] = field(default_factory=list)

    def results(self) -> dict[str, object]:
        """Its part of ``summary.json``."""
        best = dict(self.best)
        return {
            "skipped_steps": self.num_skipped,
            "resumed_after": self.resumed_after,
            "best_step": best.pop("step"),
            "start": self.start,
            "best": best,
            "final": self.final,
            "findings": self.findings,
            "train_seconds": self.train_seconds,
        }


def due_evaluations(num_steps: int, eval_every: int | None) -> set[int]:
    """Steps after which to evaluate: every so many, or five times a run; before the first and after the last always."""
    if eval_every is not None:
        return {*range(0, num_steps, eval_every), num_steps}
    return {math.ceil(num_steps * k / NUM_EVALUATIONS) for k in range(NUM_EVALUATIONS + 1)}


def due_checkpoints(num_steps: int, every: int | None, evaluations: set[int]) -> set[int]:
    """Steps after which to write a checkpoint: every so many and the last, with each evaluation, or none."""
    if every is None:
        return evaluations - {0}
    return {*range(every, num_steps, every), num_steps} if every else set()


class LoopCheckpointer:
    """What the loop itself has to remember, beside the model and the optimizer, and when.

    Args:
        config: The run.
        accelerator: On its engine.
        task: What is learnt; a resumed one gets the training rows of its checkpoint back.
        checkpoint: Checkpoint to go on from, on the main process; None elsewhere, and for a new run.

    Attributes:
        rows: The names of the training rows as a checkpoint holds them, or None where they have none.
        saved: What the loop had written into that checkpoint, on every process; None for a new run.
        source: The checkpoint on the main process and its folder elsewhere; None for a new run.
        progress: How far the run has come.
        num_bytes: Size of the last checkpoint that was written, on the main process.

    Collective: two broadcasts of ``saved``, and a gather of the number of rows.

    Raises:
        ValueError: The checkpoint is of a run on other data, or the ranks have other data.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, task: Task, checkpoint: Checkpoint | None) -> None:
        self.config, self.accelerator, self.task = config, accelerator, task
        parts = [checkpoint.state["extra"], str(checkpoint.folder)] if checkpoint is not None else [None, None]
        self.saved, folder = broadcast_object_list(parts)
        self.source: Checkpoint | str | None = checkpoint or folder
        self.num_bytes: int | None = None
        counts = {*gather_object([(len(task.train), len(task.eval))])}
        if len(counts) > 1:
            found = ", ".join(f"{train} and {evaluation}" for train, evaluation in sorted(counts))
            raise ValueError(
                f"the ranks do not have the same data, but {found} samples: give every rank the same files"
            )
        self.rows = self.saved.get("rows") if self.saved is not None else None
        if task.names is not None:
            if self.rows is not None:
                put_rows_back_(task, unpack_names(self.rows))
            self.rows = self.rows or pack_names(task.names)
        num_samples = len(task.train)
        if self.saved is not None and self.saved["num_samples"] != num_samples:
            raise ValueError(
                f"the checkpoint is of a run on {self.saved['num_samples']} training samples, and there are "
                f"{num_samples}, so that the order of the data would be another: resume with the same task.data_dir"
            )
        self.progress = Progress(**self.saved["progress"]) if self.saved is not None else Progress()

    def restore(self, scheduler: LambdaLR, window: Window, loss_watch: LossWatch) -> None:
        """Put back what a checkpoint holds, all but the random state, which waits for the first batch."""
        scheduler.load_state_dict(self.saved["scheduler"])
        if self.accelerator.scaler is not None and self.saved["scaler"]:
            self.accelerator.scaler.load_state_dict(self.saved["scaler"])
        window.load_state_dict(self.saved["window"], self.accelerator.is_main_process)
        loss_watch.load_state_dict(self.saved["loss_watch"])
        self.progress.resumed_after.append(self.progress.done)
        run_together(self._remove_later)

    def restore_random_state(self) -> None:
        """That of this rank; on another number of ranks each has got a new seed."""
        states = self.saved["random"]
        if len(states) == self.accelerator.num_processes:
            restore_random_state(states[self.accelerator.process_index])

    def save(self, method: Method, scheduler: LambdaLR, window: Window, loss_watch: LossWatch) -> bool:
        """Write a checkpoint and remove old ones; tells whether it was written.

        Collective: see ``Switcher.save_checkpoint``; a gather of the random states, and of two numbers.

        Raises:
            ValueError: It could not be written, and ``checkpoint.if_disk_full`` is ``stop``.
        """
        accelerator, options, done = self.accelerator, self.config.checkpoint, self.progress.done
        extra = {
            "config": asdict(self.config),
            "progress": asdict(replace(self.progress, method_seconds=self.method_seconds(method))),
            "num_samples": len(self.task.train),
            "rows": self.rows,
            "scheduler": scheduler.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            "window": window.state_dict(accelerator),
            "loss_watch": loss_watch.state_dict(),
            "random": gather_object([random_state()]),
        }
        try:
            self.num_bytes = method.save_checkpoint(checkpoints_of(self.config), extra, done)
        except ValueError as error:
            if options.if_disk_full == "stop":
                raise
            logger.warning("going on without a checkpoint of step %d, those before are still good: %s", done, error)
            return False
        run_together(self._remove_old)
        return True

    def method_seconds(self, method: Method) -> dict[str, float]:
        """What the method added to the training, over all starts."""
        earlier = self.saved["progress"]["method_seconds"] if self.saved is not None else {}
        return {name: earlier.get(name, 0.0) + value for name, value in asdict(method.seconds()).items()}

    def _remove_old(self) -> None:
        if self.accelerator.is_main_process:
            best = {self.progress.best["step"]} if self.progress.best is not None else set()
            remove_checkpoints(checkpoints_of(self.config), best, self.config.checkpoint.keep)

    def _remove_later(self) -> None:
        if self.accelerator.is_main_process:
            remove_later_checkpoints(checkpoints_of(self.config), self.progress.done)
