"""The public face of SRLoRA: performs the paper's Algorithm 1 on a model in training, on any engine."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor, nn

from srlora_dist.checkpoint.export import export_adapter
from srlora_dist.checkpoint.export_parts import ExportParts, warn_of_start
from srlora_dist.checkpoint.files import Put, fill_folder
from srlora_dist.checkpoint.folder_lock import HeldFolders
from srlora_dist.checkpoint.format import Checkpoint
from srlora_dist.checkpoint.ledger import Ledger, SwitchReport
from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.layers.discovery import find_sites, keep_payloads_
from srlora_dist.method.bound_model import BoundModel
from srlora_dist.method.budget import share_out_directions_
from srlora_dist.method.diagnostics import Finding
from srlora_dist.method.memory import ExtraMemory
from srlora_dist.method.schedule import SwitchSchedule
from srlora_dist.method.second_adapter import add_second_adapters_, require_intact
from srlora_dist.method.statistics import PairStatistics
from srlora_dist.storage.base import Storage


class Switcher:
    """Retires the least important pairs into W at intervals and starts new ones along unused directions.

    Between switches nothing is sent. A switch, on every rank in the same order:

    1. One all-reduce adds up the pair scores; every rank chooses the same slots (Eq. 7-8).
    2. For each bucket of sites: under ZeRO-3 and FSDP2 the small factors are gathered; rank 0 broadcasts the next
       directions.
    3. Each rank edits the span of W it holds, ``W <- W + s B_k A_k - s B_new A_new`` (Eq. 8-12), or appends those pairs
       to the frozen second adapter; it writes the new pairs to every copy it holds, resets their moments and its
       statistics. No base weight is sent.
    4. One all-reduce compares a digest of slots, directions and factors; a difference stops the run.

    Args:
        model: A PEFT model with LoRA layers, not yet prepared; it gets the second adapter where one is needed.
        config: Options.
        num_training_steps: Optimizer steps of the whole run (N_all of Eq. 14); None where that is known only later, see
            :meth:`set_num_steps`.
        if_disk_full: What happens when a switch cannot be written to ``srlora.ledger_dir``: ``stop`` raises, ``go_on``
            warns. Either way the switch is kept in memory, and written once there is room.

    Raises:
        ValueError: The model or the options cannot be worked with; the message names the remedy.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SRLoRAConfig,
        num_training_steps: int | None = None,
        *,
        if_disk_full: str = "stop",
    ) -> None:
        self.config = config
        self._bound: BoundModel | None = None
        self._is_bound = self._is_closed = False
        self.sites = find_sites(model, config.adapter_name)
        share_out_directions_(self.sites, config)
        self._parts = ExportParts(model, self.sites, config.adapter_name)
        warn_of_start(model, config.adapter_name)
        keep_payloads_(model)
        self._schedule: SwitchSchedule | None = None
        if num_training_steps is not None:
            self.set_num_steps(num_training_steps)
        self._hooks = add_second_adapters_(self.sites, config)
        self._if_disk_full, self._folders = if_disk_full, HeldFolders()
        self.num_steps = self.num_switches = 0
        self.svd_seconds = self.switch_seconds = 0.0
        self.storage: Storage | None = None
        self.extra_memory: ExtraMemory | None = None
        self.resumed: dict[str, object] | None = None

    def set_num_steps(self, num_training_steps: int) -> None:
        """Plan the switches for a run of this many optimizer steps; call it before ``bind``.

        Raises:
            ValueError: There are more switches than steps.
            RuntimeError: ``bind`` was called before, and the switches are under way.
        """
        if self._is_bound:
            raise RuntimeError("call switcher.set_num_steps() before switcher.bind(): the switches are under way")
        self._schedule = SwitchSchedule(self.sites, self.config, num_training_steps)

    @property
    def ledger(self) -> Ledger | None:
        """What was added to W so far; None on the ranks that do not keep it, and before :meth:`bind`."""
        return self._bound.ledger if self._bound is not None else None

    @property
    def statistics(self) -> PairStatistics | None:
        """Statistics of the pairs that this rank tracks; None before :meth:`bind`, and where no switch is to come."""
        return self._bound.statistics if self._bound is not None else None

    @property
    def first_batch_change(self) -> float | None:
        """Relative change of the first batch's outputs by switch 0; None where that was not measured."""
        first_batch = self._bound.first_batch if self._bound is not None else None
        return first_batch.change if first_batch is not None else None

    @property
    def due_steps(self) -> list[int]:
        """Optimizer steps after which the switches happen; with ``switch_when: settled``, at the latest."""
        return self._schedule.due_steps

    @property
    def tracking_seconds(self) -> float:
        """Host time spent on the statistics so far."""
        return self.statistics.seconds if self.statistics is not None else 0.0

    def bind(
        self,
        model: nn.Module,
        optimizer: object,
        resume_from: str | Path | Checkpoint | None = None,
        will_save: bool = False,
    ) -> SwitchReport | None:
        """Find the storage; then perform switch 0, which starts every pair along the top directions (Eq. 2), or resume.

        Args:
            model: What ``accelerator.prepare`` returned.
            optimizer: What ``accelerator.prepare`` returned for the optimizer.
            resume_from: A checkpoint, its folder, or a folder of checkpoints, of which the last good one is taken if
                there is one; rank 0's counts. The base has to be untouched; the engine and the number of ranks may be
                others.
            will_save: Refuse an optimizer whose state a checkpoint cannot hold, in place of a warning; a run that is
                resumed does so anyway.

        Returns:
            The report of switch 0, or None after a resume; then ``resumed`` is the content of ``state.json``.

        Collective: 16 bytes by which the ranks compare their models; the directions (see :class:`Directions`), then the
            phases 2 to 4 of a switch; or the content of the checkpoint.

        Raises:
            ValueError: The ranks hold different models, the storage or the optimizer is not supported, the adapter has
                been trained already, or the checkpoint does not fit.
        """
        if self._schedule is None:
            raise RuntimeError(
                "give Switcher() the number of optimizer steps, or call switcher.set_num_steps() before bind()"
            )
        if self._is_bound:
            raise RuntimeError("bind() was called before, and has edited the weights: load the model anew for another")
        self._bound = bound = BoundModel(model, optimizer, self.sites, self.config, self._schedule)
        self.sites, self.storage = bound.sites, bound.storage
        saved = bound.open_files(resume_from, will_save, self._folders, self._if_disk_full)
        self.resumed = saved.state if saved is not None else None
        self.svd_seconds = bound.prepare(lambda: self.num_steps)
        self._parts.bind(model, self.sites, bound.directions.digests)
        self._is_bound = True
        report = None
        if saved is None:
            report = self._switch([list(range(site.num_first)) for site in self.sites], None, bound.judge_directions())
        else:
            self.num_steps, self.num_switches = saved.state["num_steps"], saved.state["num_switches"]
            bound.restore_(saved)
        bound.follow_optimizer(checks_first_batch=saved is None)
        self.extra_memory = bound.count_extra_memory()
        return report

    def step(self) -> SwitchReport | None:
        """Call after each ``optimizer.step()``; switches if that step was due.

        A call before which no optimizer step happened (accumulation, overflow) does nothing.

        Collective: nothing, or on a due step 8 bytes by which the ranks say that nothing was changed behind their back
            and the phases 1 to 4 of a switch; with ``agreement_every`` an all-reduce of 16 bytes for each tensor that
            ranks hold copies of; with ``check_switch`` two forward passes per switch.

        Returns:
            What the switch did, or None; it may have been undone.

        Raises:
            RuntimeError: The ranks no longer agree, the training has diverged, adapters were merged or switched, the
                model was changed behind the Switcher's back, or ``bind`` was not called.
        """
        bound = self._require_bound()
        if self._is_closed:
            raise RuntimeError("switcher.step() came after switcher.close(), which has ended the training")
        if not bound.observer.report():
            return None
        require_intact(self.sites)
        self.num_steps += 1
        self._schedule.warn_of_overrun(self.num_steps)
        if self.config.agreement_every and self.num_steps % self.config.agreement_every == 0:
            self.require_agreement()
        return self._switch_now() if self._schedule.is_due(self.num_steps, lambda: self._choose()[0]) else None

    def require_agreement(self) -> None:
        """Compare whatever several ranks hold copies of, and raise where it differs; see :class:`AgreementCheck`.

        Collective: one all-reduce of 16 bytes per tensor.
        """
        self._require_bound().agreement.require(self.num_steps, self.config.agreement_every)

    def save_checkpoint(
        self, parent: str | Path, extra: dict[str, object] | None = None, step: int | None = None
    ) -> int | None:
        """Write ``step-N`` into a folder of checkpoints, whole or not at all.

        Args:
            parent: Folder of the run's checkpoints; rank 0 writes.
            extra: What belongs to your loop, such as the state of the scheduler; whatever JSON can hold.
            step: N, where your loop counts in another way; else the optimizer steps that were done.

        Returns:
            The size in bytes on rank 0, None elsewhere.

        Collective: every rank must call it; what is trained, its moments and the moving averages are collected on rank
            0 (see ``Collectives.gather_to_0``).

        Raises:
            ValueError: Rank 0 could not write; the checkpoints that were there are still good. Raised on every rank.
            RuntimeError: The model was changed behind the Switcher's back; raised on every rank.
        """
        bound = self._require_bound()
        if bound.observer.stepped:
            raise RuntimeError("call switcher.step() before switcher.save_checkpoint(): a step was not reported yet")
        bound.watch.require_untouched()
        state = {
            "step": self.num_steps if step is None else step,
            "num_steps": self.num_steps,
            "num_switches": self.num_switches,
            **self._schedule.state(),
            "extra": extra or {},
        }
        return bound.save(Path(parent), state, self._parts, self._folders)

    def export(
        self, folder: str | Path, max_rank: int | None = None, is_last: bool = True, *, put: Put = fill_folder
    ) -> None:
        """Write a plain PEFT adapter that gives this model's outputs on the untouched base.

        Args:
            folder: Where to write.
            max_rank: Truncate each site to this rank by SVD and log the relative error; None keeps it exact.
            is_last: False in the middle of a run; else there is a warning if switches are still to come.
            put: Gets the folder and the files on rank 0, to write them.

        Collective: every rank must call it; under ZeRO-3 the trainable parameters are gathered.

        Raises:
            RuntimeError: The model was changed behind the Switcher's back; raised on every rank.
        """
        bound = self._require_bound()
        require_intact(self.sites)
        bound.watch.require_untouched(in_step=bool(bound.observer.stepped))
        if is_last:
            self._schedule.warn_of_missing_switches(self.num_steps)
        export_adapter(bound.model, bound.storage, self.sites, self.ledger, folder, self._parts, max_rank, put)

    def write_ledger(self) -> None:
        """Write the entries of the ledger that could not be written to ``srlora.ledger_dir`` before, if there are any.

        Collective: one all-reduce of 8 bytes. Raises ValueError on every rank if rank 0 still cannot write.
        """
        self.storage.on_rank_0("write the ledger", lambda: self.ledger.write_rest(must=True))

    def close(self) -> None:
        """End the run: remove every hook from model and optimizer, and let other processes write into its folders.

        The weights stay as they were edited; ``export`` still works. The end of the process does as much.
        """
        self._is_closed = True
        for hook in self._hooks:
            hook.remove()
        if self._bound is not None:
            self._bound.release()
        self._folders.release()

    def _require_bound(self) -> BoundModel:
        if not self._is_bound:
            raise RuntimeError("call switcher.bind(model, optimizer) first: after accelerator.prepare, before training")
        return self._bound

    def _choose(self) -> tuple[list[list[int]], list[Tensor]]:
        """Eq. 7-8: the slots that a switch fuses now, and all scores. Collective: one all-reduce."""
        scores = self._bound.observer.finite_scores()
        return self._schedule.choose(self.sites, scores, self.num_steps), scores

    def _switch_now(self) -> SwitchReport:
        self._bound.watch.require_untouched()
        return self._switch(*self._choose())

    def _switch(self, slots: list[list[int]], scores: list[Tensor] | None, *findings: Finding | None) -> SwitchReport:
        began, bound = time.perf_counter(), self._bound
        report = bound.executor.switch(SwitchReport(self.num_steps, self.num_switches, []), slots, scores)
        self.num_switches += not report.undone  # it has happened, whether it can be written or not
        bound.remember(self.num_switches)
        if not report.undone:
            bound.record(report, findings)
        self.switch_seconds += time.perf_counter() - began
        return report
