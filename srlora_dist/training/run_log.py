"""What a run leaves in its output folder while it goes on: metrics, switches, the TensorBoard log, the summary."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from srlora_dist.checkpoint.files import write_whole
from srlora_dist.checkpoint.ledger import SwitchReport
from srlora_dist.checkpoint.postponed import Postponed
from srlora_dist.config.parse import to_yaml
from srlora_dist.config.paths import require_writable
from srlora_dist.config.run import RunConfig
from srlora_dist.method.diagnostics import Finding
from srlora_dist.training.earlier_run import make_room

logger = logging.getLogger(__name__)


class RunLog:
    """Writes into the output folder, on the main process alone.

    Args:
        folder: Made if it is not there.
        config: Saved as ``config.yaml``.

    Raises:
        ValueError: The folder cannot be written.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config = folder, config
        require_writable(folder, "output_dir")
        self.postponed = Postponed(goes_on=config.checkpoint.if_disk_full == "go_on")

    def start(self) -> None:
        """Begin a new run; what an earlier one has left in the folder is moved out of it.

        Raises:
            ValueError: It cannot be moved.
        """
        make_room(self.folder, self.config.srlora.ledger_dir)
        self._write_config()
        self._writer = SummaryWriter(str(self.folder / "tensorboard"))

    def resume(self, step: int) -> None:
        """Go on after a step: what was logged after it will be logged again."""
        (self.folder / "summary.json").unlink(missing_ok=True)
        self._write_config()
        for name in ("metrics.jsonl", "switches.jsonl", "findings.jsonl"):
            path = self.folder / name
            if not path.exists():
                continue
            kept = [json.dumps(line) + "\n" for line in read_jsonl(path) if line["step"] <= step]
            write_whole(path, lambda beside, kept=kept: beside.write_text("".join(kept)))
        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def _write_config(self) -> None:
        write_whole(self.folder / "config.yaml", lambda beside: beside.write_text(to_yaml(self.config)))

    def metrics(self, record: dict[str, object]) -> None:
        """Append one line to ``metrics.jsonl`` and the same figures to TensorBoard."""
        self._append("metrics.jsonl", record)
        split, step = record["split"], record["step"]
        for name, value in record.items():
            if name not in ("step", "split", "epoch"):
                self._board(lambda writer, name=name, value=value: writer.add_scalar(f"{split}/{name}", value, step))

    def switch(self, step: int, report: SwitchReport) -> None:
        """Append one line a site to ``switches.jsonl``; a switch that was undone is left out.

        Args:
            step: Step of the loop, which counts the steps that were skipped too.
            report: What the switch did.
        """
        if report.undone:
            return
        measured = {}
        if report.relative_output_change is not None:
            measured["relative_output_change"] = report.relative_output_change
        for site in report.sites:
            self._append("switches.jsonl", {"step": step, "switch": report.switch, **site.as_dict(), **measured})
        self._board(lambda writer: writer.add_scalar("train/switch", report.switch, step))

    def finding(self, finding: Finding) -> None:
        """Append one line to ``findings.jsonl``, and the text and the figures to TensorBoard."""
        self._append("findings.jsonl", asdict(finding))
        kind, step = f"findings/{finding.kind}", finding.step
        self._board(lambda writer: writer.add_text(kind, finding.message, step))
        for name, value in finding.figures.items():
            self._board(lambda writer, name=name, value=value: writer.add_scalar(f"{kind}/{name}", value, step))

    def summary(self, summary: dict[str, object]) -> None:
        """Write ``summary.json`` and close the TensorBoard log."""
        text = json.dumps(_finite(summary), indent=2) + "\n"
        write_whole(self.folder / "summary.json", lambda beside: beside.write_text(text))
        self._board(SummaryWriter.close)

    def _append(self, name: str, record: dict[str, object]) -> None:
        self.postponed.append(self.folder / name, json.dumps(_finite(record)) + "\n")

    def _board(self, write: Callable[[SummaryWriter], None]) -> None:
        """Write to the TensorBoard log, which cannot go on once it could not be written."""
        try:
            if self._writer is not None:
                write(self._writer)
        except OSError as error:
            if not self.postponed.goes_on:
                raise
            logger.warning("the TensorBoard log ends here, and metrics.jsonl has what follows: %s", error)
            self._writer = None


class Window:
    """What has been seen since the last line of the log: loss, tokens and time."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget everything and start the clock."""
        self.num_batches = self.num_steps = self.tokens = 0
        self.loss: Tensor | float = 0.0
        self.seconds = 0.0
        self.resume()

    def pause(self) -> None:
        """Stop the clock: what follows is not training."""
        self.seconds += time.perf_counter() - self.began

    def resume(self) -> None:
        """Start the clock again."""
        self.began = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for what is not training, and start it again afterwards."""
        self.pause()
        yield
        self.resume()

    def add(self, loss: Tensor, batch: dict[str, Tensor]) -> None:
        """Count one micro-batch; nothing is read back from the device."""
        self.num_batches += 1
        self.loss = self.loss + loss.detach().double()
        if "attention_mask" in batch and batch["attention_mask"].dim() == 2:  # not of pictures, nor of packed rows
            self.tokens = self.tokens + batch["attention_mask"].sum()

    def state_dict(self, accelerator: Accelerator) -> dict[str, float]:
        """What a checkpoint keeps, the same on every rank. Collective: one all-reduce of two numbers."""
        loss, tokens = self._reduced(accelerator)
        numbers = {"num_batches": self.num_batches, "num_steps": self.num_steps, "seconds": self.seconds}
        return {"loss": loss / accelerator.num_processes, "tokens": tokens, **numbers}

    def load_state_dict(self, state: dict[str, float], is_main_process: bool) -> None:
        """Put back what :meth:`state_dict` gave, so that sums over any number of ranks are what they were."""
        self.loss, self.tokens = state["loss"], int(state["tokens"]) if is_main_process else 0
        self.num_batches, self.num_steps, self.seconds = state["num_batches"], state["num_steps"], state["seconds"]

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Loss over all ranks, seconds a step, tokens a second of all ranks.

        Collective: one all-reduce of two numbers.
        """
        loss, tokens = self._reduced(accelerator)
        figures = {
            "loss": loss / self.num_batches / accelerator.num_processes,
            "step_time": self.seconds / self.num_steps,
        }
        return figures | ({"tokens_per_second": tokens / self.seconds} if tokens else {})

    def _reduced(self, accelerator: Accelerator) -> list[float]:
        """Loss and tokens, summed over the ranks."""
        totals = (torch.as_tensor(x, dtype=torch.float64).to(accelerator.device) for x in (self.loss, self.tokens))
        return accelerator.reduce(torch.stack([*totals]), "sum").tolist()


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a ``.jsonl`` file; none if there is no file. A last line that was cut by a crash is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _finite(value: object) -> object:
    """NaN and infinity become null, because JSON knows neither."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
