"""The training loop, the same one for every method and engine."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from srlora_dist.checkpoint.format import Checkpoint
from srlora_dist.checkpoint.ledger import SwitchReport
from srlora_dist.config.run import RunConfig
from srlora_dist.engine.accelerator import require_engine
from srlora_dist.engine.precision import cast_trainable_, require_precision
from srlora_dist.engine.preemption import StopRequest
from srlora_dist.errors import RunStoppedError, StoppedBySignalError
from srlora_dist.layers.discovery import keep_payloads_
from srlora_dist.method.diagnostics import worse_than_start
from srlora_dist.storage.collectives import run_together
from srlora_dist.tasks.task import Task
from srlora_dist.training.best_adapter import BestAdapter
from srlora_dist.training.evaluation import evaluate
from srlora_dist.training.loop_state import LoopCheckpointer, due_checkpoints, due_evaluations
from srlora_dist.training.methods import build_method
from srlora_dist.training.outcome import (
    count_skipped,
    doubts,
    is_better,
    require_a_best,
    require_a_step,
    require_finite_start,
)
from srlora_dist.training.preparation import prepare
from srlora_dist.training.recorder import Recorder
from srlora_dist.training.run_log import RunLog
from srlora_dist.training.summary import num_trainable, peak_memory, pretrained_bytes, versions


class FineTuner:
    """Fine-tunes one model: prepares the model, the data, the optimizer and the method for the engine, and trains.

    Args:
        config: The options of the run, with the name of its engine.
        accelerator: An Accelerator on that engine.
        task: The task that is learnt.
        log: Writes into the output folder, on the main process; None elsewhere.
        checkpoint: The checkpoint to go on from, on the main process; None elsewhere, and for a new run.

    Collective: prepares the model and performs switch 0, or resumes.

    Raises:
        ValueError: The data, the adapter, the storage or the checkpoint cannot be worked with.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        task: Task,
        log: RunLog | None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.config, self.accelerator, self.task, self.log = config, accelerator, task, log
        options = config.train
        self.checkpointer = LoopCheckpointer(config, accelerator, task, checkpoint)
        self.progress = self.checkpointer.progress
        self.resumes = self.checkpointer.saved is not None
        steps_per_epoch = len(task.train) // options.batch_size
        if steps_per_epoch == 0:
            raise ValueError(
                f"the training split has {len(task.train)} samples, fewer than train.batch_size {options.batch_size}: "
                "choose a smaller batch"
            )
        self.num_steps = options.max_steps or max(1, round(options.epochs * steps_per_epoch))
        self.recorder = Recorder(log, self.progress, config.method, self.num_steps, steps_per_epoch)
        set_seed(config.seed)
        self.method = build_method(config, task.model, task.peft_type, self.num_steps, config.engine, task.heads)
        self.num_trainable = num_trainable(self.method.model)
        self.model_bytes = pretrained_bytes(self.method.model)
        postponed = log.postponed if log is not None else None
        self.adapters = BestAdapter(Path(config.output_dir), self.method, self.progress, postponed)
        report = self._prepare()
        set_seed(config.seed + self.progress.done, device_specific=True)  # dropout must differ between ranks
        if self.resumes:
            self.checkpointer.restore(self.scheduler, self.recorder.window, self.recorder.loss_watch)
            run_together(lambda: log.resume(self.progress.done) if log is not None else None)
        self.recorder.switch(report, self.progress.done)
        self.stop_request = StopRequest(accelerator)

    def _prepare(self) -> SwitchReport | None:
        """Prepare for the engine, and perform switch 0 or resume."""
        config, model = self.config, self.method.model
        keep_payloads_(model)
        # DeepSpeed keeps a float32 copy of its own, and cuts parameters of one type alone.
        cast_trainable_(model, config.model.dtype if config.engine.startswith("zero") else "float32")
        run_together(lambda: self.log.start() if self.log is not None and not self.resumes else None)
        prepared = prepare(config, self.accelerator, self.task, model, self.num_steps, self.progress.done)
        self.model, self.optimizer, self.scheduler = prepared.model, prepared.optimizer, prepared.scheduler
        self.train_loader, self.eval_loader = prepared.train_loader, prepared.eval_loader
        self.trainable, self.token_mean = prepared.trainable, prepared.token_mean
        require_precision(self.model, config.model)
        report = self.method.bind(self.model, self.optimizer, self.checkpointer.source)
        require_engine(config.engine, self.method.storage_name, "the model is held as")
        return report

    def run(self) -> dict[str, object]:
        """Train to the last step; returns the summary.

        Collective: every rank calls it. Beside what training sends, each optimizer step sends one number, by which the
        ranks agree on whether to stop.
        """
        self.stop_request.listen()
        options, progress, recorder = self.config.train, self.progress, self.recorder
        evaluations = due_evaluations(self.num_steps, options.eval_every)
        checkpoints = due_checkpoints(self.num_steps, self.config.checkpoint.every, evaluations)
        if progress.done == 0:
            self._evaluate_and_export()
        elif self.resumes:
            self.adapters.export_missing(progress.done == self.num_steps, self.checkpointer.source)
        recorder.begin()
        self.model.train()
        for number, batch in enumerate(self.train_loader if progress.done < self.num_steps else ()):
            if number == 0 and self.resumes:
                self._catch_up(batch)
            loss, figures = self._micro_step(batch)
            recorder.micro_step(loss, batch)
            if not self.accelerator.sync_gradients:
                continue
            progress.done += 1
            recorder.step()
            count_skipped(progress, self.skipped, options.max_bad_steps)
            require_a_step(progress, self.num_steps)
            if progress.done % options.log_every == 0 or progress.done == self.num_steps:
                recorder.close_window(figures, self.accelerator)
            is_best = False
            if progress.done in evaluations:
                with recorder.window.paused():
                    is_best = self._evaluate_and_export()
            if progress.done in checkpoints or (is_best and checkpoints):
                self._save_checkpoint()
            self._stop_if_asked()
        recorder.end()
        self.adapters.require_written()
        return self._summary()

    def _micro_step(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Train on one micro-batch. The last one of a step ends with the optimizer step, and a switch if one is due.

        Returns:
            The loss, and figures for the log: the learning rate, and the norm of the gradient after a last one.
        """
        accelerator = self.accelerator
        figures = {"learning_rate": self.scheduler.get_last_lr()[0]}
        self.skipped = False
        with accelerator.accumulate(self.model):
            loss = self.model(**batch).loss
            if self.token_mean is not None:
                loss = self.token_mean.weigh(loss, batch)
            # A loss that is not finite may have gradients that are: then no rank would notice.
            accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))
            if accelerator.sync_gradients:
                # An infinite limit clips nothing and gives the norm. DeepSpeed has clipped and stepped already.
                norm = accelerator.clip_grad_norm_(self.trainable, self.config.train.max_grad_norm or math.inf)
                figures |= {} if norm is None else {"grad_norm": _number(norm)}
                self.skipped = accelerator.scaler is None and not math.isfinite(figures.get("grad_norm", 0.0))
            if not self.skipped:
                self.optimizer.step()
                self.scheduler.step()
            self.skipped |= accelerator.sync_gradients and accelerator.optimizer_step_was_skipped
            if accelerator.sync_gradients and not self.skipped:
                step = self.progress.done + 1
                self.recorder.switch(self.method.step(step), step)
            self.optimizer.zero_grad()
        return loss, figures

    def _evaluate_and_export(self) -> bool:
        """Evaluate; export the adapter if it is the best one so far, and after the last step in any case.

        Returns:
            Whether it is the best one so far.
        """
        progress, recorder = self.progress, self.recorder
        judged = evaluate(self.accelerator, self.model, self.eval_loader, self.task)
        figures = judged.figures
        recorder.metrics("eval", figures)
        if progress.done == 0:
            require_finite_start(judged)
            progress.start = figures
            return False
        progress.final = figures
        recorder.warn(worse_than_start(progress.done, progress.start, figures))
        is_best = is_better(figures, progress.best)
        if is_best:
            progress.best = {"step": progress.done, **figures}
            self.adapters.export_best()
        if progress.done == self.num_steps:
            require_a_best(progress)
            for finding in doubts(progress, self.num_steps, judged):
                recorder.warn(finding)
            self.adapters.export_last()
        return is_best

    def _save_checkpoint(self) -> bool:
        """Write a checkpoint, if the method can. Collective: see ``LoopCheckpointer.save``.

        Returns:
            Whether it was written.
        """
        if not self.method.can_save:
            return False
        window, loss_watch = self.recorder.window, self.recorder.loss_watch
        with window.paused():
            self.adapters.note()
            return self.checkpointer.save(self.method, self.scheduler, window, loss_watch)

    def _catch_up(self, batch: dict[str, Tensor]) -> None:
        """Bring a resumed run into the state of a run that was never stopped, once it has its first batch."""
        # After its first two passes DDP sums gradients in another order, which shows in the last bit from 3 ranks on:
        # test_three_ranks_go_on_bit_for_bit needs these two passes, whose gradients are dropped.
        if self.config.engine == "ddp":
            for _ in range(2):
                self.accelerator.backward(self.model(**batch).loss)
                self.optimizer.zero_grad()
        self.checkpointer.restore_random_state()

    def _stop_if_asked(self) -> None:
        """If any rank was asked to stop, write a checkpoint and raise. Collective: one all-reduce of a number."""
        progress = self.progress
        if self.stop_request.anywhere() and progress.done < self.num_steps:
            if not self._save_checkpoint():
                raise RunStoppedError(f"stopped by a signal after step {progress.done}, and no checkpoint was written")
            raise StoppedBySignalError(
                f"stopped by a signal after step {progress.done} of {self.num_steps}: the same command goes on"
            )

    def _summary(self) -> dict[str, object]:
        """The content of ``summary.json``. Collective: one gather of a number."""
        return {
            "method": self.config.method,
            "task": self.config.task.name,
            "model": self.task.model.name_or_path,
            "weights": self.config.model.stored_as,
            "seed": self.config.seed,
            "world_size": self.accelerator.num_processes,
            "storage": self.method.storage_name,
            "steps": self.num_steps,
            "main_metric": self.task.main_metric,
            **self.progress.results(),
            "trainable_parameters": self.num_trainable,
            **{f"{name}_seconds": value for name, value in self.checkpointer.method_seconds(self.method).items()},
            "peak_memory_bytes": peak_memory(self.accelerator),
            "extra_memory_bytes": self.method.extra_memory(),
            "checkpoint_bytes": self.checkpointer.num_bytes,
            "model_bytes": self.model_bytes,
            "versions": versions(),
        }


def _number(norm: Tensor | float) -> float:
    """The norm of a gradient as a number. Collective under FSDP2, where each rank holds a part: one all-reduce."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
