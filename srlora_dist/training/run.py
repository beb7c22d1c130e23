"""A whole training run: hold the output folder, load the task, train, and write the summary and the figures."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from srlora_dist.checkpoint.folder_lock import PATIENCE_OF_A_RESTART, FolderLock, was_restarted
from srlora_dist.config.run import RunConfig
from srlora_dist.engine.accelerator import build_accelerator
from srlora_dist.storage.collectives import run_together
from srlora_dist.tasks.registry import check_task, load_task
from srlora_dist.training.figures import draw
from srlora_dist.training.resume import choose_checkpoint
from srlora_dist.training.run_log import RunLog
from srlora_dist.training.trainer import FineTuner

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> dict[str, object]:
    """Run a training, or the rest of an interrupted one, and leave its results in ``config.output_dir``.

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
    """Run the training, once the output folder is held."""
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
    """Check what can fail early, before anything that takes long; returns the log on the main process."""
    check_task(config)
    return RunLog(Path(config.output_dir), config) if accelerator.is_main_process else None


def _hold_folder(config: RunConfig, accelerator: Accelerator) -> AbstractContextManager:
    """Keep others out of the output folder; a run that was restarted waits for the one before it to end."""
    if not accelerator.is_main_process:
        return nullcontext()
    # The other ranks wait as long.
    patience = min(PATIENCE_OF_A_RESTART, config.train.timeout / 2) if was_restarted() else None
    return FolderLock(config.output_dir, "output_dir", "choose another --output_dir", patience)
