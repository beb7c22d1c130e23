"""The training loop, the same for every method and engine."""

from __future__ import annotations

import logging
import math
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from srlora_dist.checkpoint.folder_lock import PATIENCE_OF_A_RESTART, FolderLock, was_restarted
from srlora_dist.checkpoint.format import Checkpoint
from srlora_dist.checkpoint.ledger import SwitchReport
from srlora_dist.config.run import RunConfig
from srlora_dist.engine.accelerator import build_accelerator, choose_layers_to_shard, require_engine
from srlora_dist.engine.precision import cast_trainable_, require_precision
from srlora_dist.engine.preemption import StopRequest
from srlora_dist.errors import RunStoppedError, StoppedBySignalError
from srlora_dist.layers.discovery import keep_payloads_
from srlora_dist.method.diagnostics import Finding, LossWatch, worse_than_start
from srlora_dist.storage.collectives import run_together
from srlora_dist.storage.zero0 import leave_out_bad_steps_
from srlora_dist.tasks.registry import check_task, load_task
from srlora_dist.tasks.task import Task
from srlora_dist.training.best_adapter import BestAdapter
from srlora_dist.training.data_order import SampleOrder, TokenMean, by_length
from srlora_dist.training.evaluation import evaluate
from srlora_dist.training.figures import draw
from srlora_dist.training.loop_state import LoopCheckpointer, due_checkpoints, due_evaluations
from srlora_dist.training.methods import build_method
from srlora_dist.training.optimization import build_optimizer, warm_up_and_decay
from srlora_dist.training.outcome import doubts, is_better, require_a_best, require_a_step, require_finite_start
from srlora_dist.training.resume import choose_checkpoint
from srlora_dist.training.run_log import RunLog, Window
from srlora_dist.training.summary import num_trainable, peak_memory, pretrained_bytes, versions

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> dict[str, object]:
    """Run one training, or the rest of one, and leave its results in ``config.output_dir``.

    Collective: every process of the launch calls it.

    Returns:
        The content of ``summary.json``, on every process.

    Raises:
        ValueError: The options, the task, the launch, the output folder or the checkpoint cannot be worked with; the
            message names the value and the remedy.
        RunStoppedError: Training diverged, or the ranks no longer agree.
        StoppedBySignalError: SIGTERM or SIGUSR1 came, and a checkpoint was written.
    """
    accelerator, engine = build_accelerator(config)
    log = run_together(lambda: _begin(config, accelerator))
    with run_together(lambda: _hold_folder(config, accelerator)):
        summary = _train(config, accelerator, engine, log)
    accelerator.end_training()
    return summary


def _train(config: RunConfig, accelerator: Accelerator, engine: str, log: RunLog | None) -> dict[str, object]:
    """The run, once the folder is its own."""
    checkpoint = run_together(lambda: choose_checkpoint(config) if accelerator.is_main_process else None)
    ledger_dir = config.srlora.ledger_dir or str(Path(config.output_dir) / "ledger")
    config = replace(config, engine=engine, srlora=replace(config.srlora, ledger_dir=ledger_dir))
    set_seed(config.seed)
    # Under ZeRO-3 loading sends weights from rank to rank already.
    task = load_task(config) if engine == "zero3" else run_together(lambda: load_task(config))
    trainer = FineTuner(config, accelerator, task, log, checkpoint)
    summary = trainer.run()
    accelerator.wait_for_everyone()  # if a rank is lost until here, the run has not ended
    if log is not None:
        try:
            draw(log.folder, summary)
        except OSError as error:
            if config.checkpoint.if_disk_full == "stop":
                raise
            logger.warning("the figures cannot be written, srlora plot draws them once there is room: %s", error)
        log.summary(summary)
    return summary


def _begin(config: RunConfig, accelerator: Accelerator) -> RunLog | None:
    """What can fail is tried before anything that takes long; gives the main process its log."""
    check_task(config)
    return RunLog(Path(config.output_dir), config) if accelerator.is_main_process else None


def _hold_folder(config: RunConfig, accelerator: Accelerator) -> AbstractContextManager:
    """Keep others out of the output folder; a run that was restarted waits for the one before it to end."""
    if not accelerator.is_main_process:
        return nullcontext()
    # The other ranks wait as long.
    patience = min(PATIENCE_OF_A_RESTART, config.train.timeout / 2) if was_restarted() else None
    return FolderLock(config.output_dir, "output_dir", "choose another --output_dir", patience)


class FineTuner:
    """One run: model, data, optimizer and method, prepared for the engine.

    Args:
        config: The run, with the name of its engine.
        accelerator: On that engine.
        task: What is learnt.
        log: The output folder, on the main process; None elsewhere.
        checkpoint: To go on from, on the main process; None elsewhere, and for a new run.

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
        self.keeper = LoopCheckpointer(config, accelerator, task, checkpoint)
        self.steps_per_epoch = len(task.train) // options.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"the training split has {len(task.train)} samples, fewer than train.batch_size {options.batch_size}: "
                "choose a smaller batch"
            )
        self.num_steps = options.max_steps or max(1, round(options.epochs * self.steps_per_epoch))
        self.progress = self.keeper.progress
        self.resumes = self.keeper.saved is not None
        set_seed(config.seed)
        self.method = build_method(config, task.model, task.peft_type, self.num_steps, config.engine, task.heads)
        self.num_trainable = num_trainable(self.method.model)
        self.model_bytes = pretrained_bytes(self.method.model)
        postponed = log.postponed if log is not None else None
        self.adapters = BestAdapter(Path(config.output_dir), self.method, self.progress, postponed)
        keep_payloads_(self.method.model)
        # DeepSpeed keeps a float32 copy of its own, and cuts parameters of one type alone.
        cast_trainable_(self.method.model, config.model.dtype if config.engine.startswith("zero") else "float32")
        report = self._begin_or_put_back()
        set_seed(config.seed + self.progress.done, device_specific=True)  # dropout must differ between ranks
        self.window, self.loss_watch = Window(), LossWatch()
        if self.resumes:
            self.keeper.restore(self.scheduler, self.window, self.loss_watch)
            run_together(lambda: log.resume(self.progress.done) if log is not None else None)
        self._record_switch(report, self.progress.done)
        self.stop_request = StopRequest(accelerator)

    def _begin_or_put_back(self) -> SwitchReport | None:
        """Prepare for the engine, and perform switch 0 or resume; a run that was here before is lost only then."""
        replaces = self.log is not None and not self.resumes
        run_together(lambda: self.log.start() if replaces else None)
        try:
            self._prepare()
            require_precision(self.model, self.config.model)
            report = self.method.bind(self.model, self.optimizer, self.keeper.source)
            require_engine(self.config.engine, self.method.storage_name, "the model is held as")
        except BaseException:
            if replaces:
                self.log.put_back()
            raise
        run_together(lambda: self.log.begun() if replaces else None)
        return report

    def _prepare(self) -> None:
        options, task, accelerator = self.config.train, self.task, self.accelerator
        done = self.progress.done
        order = SampleOrder(len(task.train), options.batch_size, self.num_steps, self.config.seed, done)
        micro_batch_size = options.batch_size // options.accumulation_steps
        train_loader = DataLoader(
            task.train, batch_size=micro_batch_size, sampler=order, collate_fn=task.collate, drop_last=True
        )
        eval_loader = DataLoader(by_length(task.eval), batch_size=options.eval_batch_size, collate_fn=task.collate)
        model = self.method.model
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = build_optimizer(trainable, options)
        if self.config.engine == "zero0" and self.config.model.dtype == "float32":
            leave_out_bad_steps_(optimizer)
        if self.config.engine == "fsdp2":
            choose_layers_to_shard(accelerator, model)
        scheduler = LambdaLR(optimizer, warm_up_and_decay(self.num_steps, options.warmup_ratio, options.schedule))
        self.model, self.optimizer, self.train_loader, self.eval_loader, self.scheduler = accelerator.prepare(
            model, optimizer, train_loader, eval_loader, scheduler
        )
        self.token_mean = None
        if task.num_targets is not None:
            parts = options.accumulation_steps, accelerator.num_processes
            self.token_mean = TokenMean(task.num_targets, order, options.batch_size, *parts)
        # FSDP2 has put others in their place.
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def run(self) -> dict[str, object]:
        """Train to the last step; gives the summary.

        Collective: every rank calls it. Beside what training sends, each optimizer step sends one number, by which the
        ranks agree on whether to stop.
        """
        self.stop_request.listen()
        options, progress = self.config.train, self.progress
        evaluations = due_evaluations(self.num_steps, options.eval_every)
        checkpoints = due_checkpoints(self.num_steps, self.config.checkpoint.every, evaluations)
        if progress.done == 0:
            self._evaluate_and_export()
        elif self.resumes:
            self.adapters.export_missing(progress.done == self.num_steps, self.keeper.source)
        bar = self._progress_bar()
        self.window.resume()
        self.model.train()
        for number, batch in enumerate(self.train_loader if progress.done < self.num_steps else ()):
            if number == 0 and self.resumes:
                self._catch_up(batch)
            loss, figures = self._micro_step(batch)
            self.window.add(loss, batch)
            if not self.accelerator.sync_gradients:
                continue
            progress.done += 1
            self.window.num_steps += 1
            bar.update()
            self._require_good_steps()
            if progress.done % options.log_every == 0 or progress.done == self.num_steps:
                self._log_window(figures, bar)
            is_best = False
            if progress.done in evaluations:
                self.window.pause()
                is_best = self._evaluate_and_export()
                self.window.resume()
            if progress.done in checkpoints or (is_best and checkpoints):
                self._save_checkpoint()
            self._stop_if_asked()
        bar.close()
        self.adapters.require_written()
        return self._summary()

    def _micro_step(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """One micro-batch, and at the end of an accumulation the optimizer step and the switch if one is due."""
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
                self._record_switch(self.method.step(step), step)
            self.optimizer.zero_grad()
        return loss, figures

    def _require_good_steps(self) -> None:
        """Count the steps that were skipped, on every rank alike, and stop after too many in a row."""
        most, progress = self.config.train.max_bad_steps, self.progress
        progress.num_bad_in_a_row = progress.num_bad_in_a_row + 1 if self.skipped else 0
        if self.skipped:
            progress.num_skipped += 1
            logger.warning("step %d: the gradient is NaN or infinite, so the step was left out", progress.done)
        if progress.num_bad_in_a_row >= most:
            raise RunStoppedError(
                f"the gradient was NaN or infinite in {most} steps in a row (train.max_bad_steps), up to step "
                f"{progress.done}: lower train.learning_rate, or look at the data; checkpoints from before are good"
            )
        require_a_step(progress, self.num_steps)

    def _log_window(self, figures: dict[str, float], bar: tqdm) -> None:
        self.window.pause()
        self.progress.train_seconds += self.window.seconds
        figures |= self.window.means(self.accelerator)
        bar.set_postfix(loss=f"{figures['loss']:.4f}", refresh=False)
        self._record("train", figures)
        if self.config.method == "srlora":
            self._warn(self.loss_watch.update(self.progress.done, figures["loss"]))
        self.window.restart()

    def _progress_bar(self) -> tqdm:
        # A log file keeps every refresh, a terminal only the last.
        pause = 0.1 if sys.stderr.isatty() else 10.0
        numbers = {"total": self.num_steps, "initial": self.progress.done}
        return tqdm(**numbers, desc=self.config.method, unit="step", disable=self.log is None, mininterval=pause)

    def _record_switch(self, report: SwitchReport | None, step: int) -> None:
        """Note what a switch did, by the steps of the loop, which counts the skipped ones too."""
        if report is None:
            return
        if report.switch > 0 and not report.undone:
            self.loss_watch.switched(step)
        if self.log is not None:
            self.log.switch(step, report)
        for finding in report.findings:
            self._record_finding(replace(finding, step=step))

    def _record_finding(self, finding: Finding | None) -> None:
        if finding is not None:
            self.progress.findings.append(asdict(finding))
            if self.log is not None:
                self.log.finding(finding)

    def _warn(self, finding: Finding | None) -> None:
        if finding is not None and finding.kind not in {known["kind"] for known in self.progress.findings}:
            logger.warning("step %d: %s", finding.step, finding.message)
        self._record_finding(finding)

    def _record(self, split: str, figures: dict[str, object]) -> None:
        done = self.progress.done
        if self.log is not None:
            self.log.metrics({"step": done, "epoch": done / self.steps_per_epoch, "split": split, **figures})

    def _evaluate_and_export(self) -> bool:
        """Evaluate; export the adapter if it is the best so far, which is told, and after the last step in any case."""
        progress = self.progress
        judged = evaluate(self.accelerator, self.model, self.eval_loader, self.task)
        figures = judged.figures
        self._record("eval", figures)
        if progress.done == 0:
            require_finite_start(judged)
            progress.start = figures
            return False
        progress.final = figures
        self._warn(worse_than_start(progress.done, progress.start, figures))
        is_best = is_better(figures, progress.best)
        if is_best:
            progress.best = {"step": progress.done, **figures}
            self.adapters.export_best()
        if progress.done == self.num_steps:
            require_a_best(progress)
            for finding in doubts(progress, self.num_steps, judged):
                self._warn(finding)
            self.adapters.export_last()
        return is_best

    def _save_checkpoint(self) -> bool:
        """Write a checkpoint; tells whether it was written. Collective: see ``LoopCheckpointer.save``."""
        if not self.method.can_save:
            return False
        self.window.pause()
        self.adapters.note()
        written = self.keeper.save(self.method, self.scheduler, self.window, self.loss_watch)
        self.window.resume()
        return written

    def _catch_up(self, batch: dict[str, Tensor]) -> None:
        """Come into the state of a run that was never stopped.

        DDP adds gradients up in another order after its first two passes, so they are made and dropped.
        """
        if self.config.engine == "ddp":
            for _ in range(2):
                self.accelerator.backward(self.model(**batch).loss)
                self.optimizer.zero_grad()
        self.keeper.restore_random_state()

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
            **{f"{name}_seconds": value for name, value in self.keeper.method_seconds(self.method).items()},
            "peak_memory_bytes": peak_memory(self.accelerator),
            "extra_memory_bytes": self.method.extra_memory(),
            "checkpoint_bytes": self.keeper.num_bytes,
            "model_bytes": self.model_bytes,
            "versions": versions(),
        }


def _number(norm: Tensor | float) -> float:
    """A gradient's norm, of which every rank holds a part under FSDP2. Collective there: one all-reduce."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
