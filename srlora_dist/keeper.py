"""Writes the checkpoints of a training loop, and brings a loop back to where one was written."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.optim.lr_scheduler import LambdaLR

from srlora_dist.checkpoint.format import Checkpoint, remove_checkpoints, remove_later_checkpoints
from srlora_dist.checkpoint.random_state import random_state, restore_random_state
from srlora_dist.config.run import RunConfig
from srlora_dist.method.diagnostics import LossWatch
from srlora_dist.methods import Method
from srlora_dist.resuming import checkpoints_of
from srlora_dist.runlog import Window
from srlora_dist.storage.collectives import together
from srlora_dist.summary import Progress
from srlora_dist.tasks.same_rows import pack_names, put_rows_back_, unpack_names
from srlora_dist.tasks.task import Task

logger = logging.getLogger(__name__)


class Keeper:
    """What the loop itself has to remember, beside the model and the optimizer, and when.

    Args:
        config: The run.
        accelerator: On its engine.
        task: What is learnt; a resumed one gets the training rows of its checkpoint back.
        checkpoint: To go on from, on the main process; None elsewhere, and for a new run.

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
        together(self._remove_later)

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
        together(self._remove_old)
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
