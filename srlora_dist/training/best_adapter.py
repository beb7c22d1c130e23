"""The adapters that a run leaves: ``adapter`` of its best step and ``adapter_last`` of its last one."""

from __future__ import annotations

import logging
from pathlib import Path

from accelerate.utils import broadcast_object_list

from srlora_dist.checkpoint.export import export_checkpoint
from srlora_dist.checkpoint.files import fill_folder
from srlora_dist.checkpoint.format import Checkpoint
from srlora_dist.checkpoint.postponed import Postponed
from srlora_dist.storage.collectives import run_together
from srlora_dist.training.loop_state import Progress
from srlora_dist.training.methods import Method

logger = logging.getLogger(__name__)

BEST, LAST, NEEDED = "adapter", "adapter_last", "adapter_config.json"


class BestAdapter:
    """Exports them, and on a full disk that a run goes on with, once there is room.

    Args:
        folder: The output folder.
        method: What exports.
        progress: Progress of the run; it notes which step's adapter is there.
        postponed: On the main process, what a full disk refuses; None elsewhere.
    """

    def __init__(self, folder: Path, method: Method, progress: Progress, postponed: Postponed | None) -> None:
        self.folder, self.method, self.progress, self.postponed = folder, method, progress, postponed
        self._put = fill_folder if postponed is None else postponed.put

    def export_best(self) -> None:
        """That of this step, which is the best so far. Collective: see :meth:`Method.export`."""
        self.method.export(self.folder / BEST, self._put)
        self.note()

    def export_last(self) -> None:
        """That of the last step. Collective: see :meth:`Method.export`."""
        self.method.export(self.folder / LAST, self._put)

    def note(self) -> None:
        """Remember, for a checkpoint, whether the best adapter is there or waits in memory."""
        if self.progress.best is not None and (
            self.postponed is None or not self.postponed.waits_for(self.folder / BEST)
        ):
            self.progress.exported_step = self.progress.best["step"]

    def export_missing(self, is_done: bool, saved: Checkpoint | str | None) -> None:
        """What a run that was resumed lacks, as in another folder than before, or after a full disk.

        Args:
            is_done: Whether the last step was done, so that its adapter can be written.
            saved: The checkpoint that was resumed, on the main process; that of the best step lies beside it.

        Collective: a broadcast of two numbers, and see :meth:`Method.export`.
        """
        there = run_together(lambda: [(self.folder / name / NEEDED).exists() for name in (BEST, LAST)])
        best_there, last_there = broadcast_object_list(there)
        if is_done and not last_there:
            self.export_last()
        best = self.progress.best
        if best is not None and not (best_there and self.progress.exported_step == best["step"]):
            run_together(lambda: self._export_saved(saved) if self.postponed is not None else None)

    def require_written(self) -> None:
        """Write what waits, the ledger too. Collective: one gather of a message, and see :meth:`Method.finish`.

        Raises:
            ValueError: The disk is still full.
        """
        run_together(lambda: self.postponed.require_written() if self.postponed is not None else None)
        self.method.finish()

    def _export_saved(self, saved: Checkpoint) -> None:
        step = self.progress.best["step"]
        try:
            export_checkpoint(Checkpoint(saved.folder.parent / f"step-{step}"), self.folder / BEST)
            self.progress.exported_step = step
        except ValueError as error:
            logger.warning("there is no adapter of the best step yet: %s", error)
