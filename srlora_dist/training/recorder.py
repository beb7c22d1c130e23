"""Records what a run does as it goes on: metrics, switches and findings in the output folder, and a progress bar."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict, replace

from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from srlora_dist.checkpoint.ledger import SwitchReport
from srlora_dist.method.diagnostics import Finding, LossWatch
from srlora_dist.training.loop_state import Progress
from srlora_dist.training.run_log import RunLog, Window

logger = logging.getLogger(__name__)


class Recorder:
    """Records a run; every rank has one, and that of the main process writes.

    Args:
        log: Writes into the output folder, on the main process; None elsewhere.
        progress: How far the run is. It gets the findings and the time of the training.
        method: Name of the method.
        num_steps: Optimizer steps of the whole run.
        steps_per_epoch: Optimizer steps of one pass over the training split.

    Attributes:
        window: Loss, tokens and time since the last line of the log.
        loss_watch: Looks for a loss that jumps at a switch.
    """

    def __init__(
        self, log: RunLog | None, progress: Progress, method: str, num_steps: int, steps_per_epoch: int
    ) -> None:
        self.log, self.progress, self.method = log, progress, method
        self.num_steps, self.steps_per_epoch = num_steps, steps_per_epoch
        self.window, self.loss_watch = Window(), LossWatch()

    def begin(self) -> None:
        """Show the progress bar and start the clock: the training begins now."""
        # A log file keeps every refresh, a terminal only the last.
        pause = 0.1 if sys.stderr.isatty() else 10.0
        numbers = {"total": self.num_steps, "initial": self.progress.done}
        self._bar = tqdm(**numbers, desc=self.method, unit="step", disable=self.log is None, mininterval=pause)
        self.window.resume()

    def end(self) -> None:
        """Close the progress bar."""
        self._bar.close()

    def micro_step(self, loss: Tensor, batch: dict[str, Tensor]) -> None:
        """Count a micro-batch."""
        self.window.add(loss, batch)

    def step(self) -> None:
        """Count an optimizer step."""
        self.window.num_steps += 1
        self._bar.update()

    def close_window(self, figures: dict[str, float], accelerator: Accelerator) -> None:
        """Write a line about the steps since the last one, and start a new window.

        Args:
            figures: What else belongs into the line.
            accelerator: That of the run.

        Collective: one all-reduce of two numbers.
        """
        self.window.pause()
        self.progress.train_seconds += self.window.seconds
        figures = figures | self.window.means(accelerator)
        self._bar.set_postfix(loss=f"{figures['loss']:.4f}", refresh=False)
        self.metrics("train", figures)
        if self.method == "srlora":
            self.warn(self.loss_watch.update(self.progress.done, figures["loss"]))
        self.window.restart()

    def metrics(self, split: str, figures: dict[str, object]) -> None:
        """Write a line of figures about the training or the evaluation split."""
        done = self.progress.done
        if self.log is not None:
            self.log.metrics({"step": done, "epoch": done / self.steps_per_epoch, "split": split, **figures})

    def switch(self, report: SwitchReport | None, step: int) -> None:
        """Write what a switch did.

        Args:
            report: None if there was no switch.
            step: Step of the loop, which counts the skipped steps too.
        """
        if report is None:
            return
        if report.switch > 0 and not report.undone:
            self.loss_watch.switched(step)
        if self.log is not None:
            self.log.switch(step, report)
        for finding in report.findings:
            self._finding(replace(finding, step=step))

    def warn(self, finding: Finding | None) -> None:
        """Write a finding, and print it if it is the first of its kind."""
        if finding is None:
            return
        if finding.kind not in {known["kind"] for known in self.progress.findings}:
            logger.warning("step %d: %s", finding.step, finding.message)
        self._finding(finding)

    def _finding(self, finding: Finding) -> None:
        self.progress.findings.append(asdict(finding))
        if self.log is not None:
            self.log.finding(finding)
