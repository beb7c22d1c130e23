"""SRLoRA as the paper's Algorithm 1, in terms of spans, storages and the ledger."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from srlora_dist.checkpoint.export import export_adapter
from srlora_dist.checkpoint.export_parts import ExportParts, warn_of_start
from srlora_dist.checkpoint.files import Put, fill_folder
from srlora_dist.checkpoint.folder_lock import HeldFolders
from srlora_dist.checkpoint.format import AVERAGES, Checkpoint, require_same_base
from srlora_dist.checkpoint.hf_saves import mark_saves_
from srlora_dist.checkpoint.ledger import Ledger, SwitchReport
from srlora_dist.checkpoint.ledger_files import require_entries
from srlora_dist.checkpoint.save import SavedRun, open_run, save_run
from srlora_dist.checkpoint.training_state import require_same_training, restore_training_state_
from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.layers.adapter import find_peft_model
from srlora_dist.layers.discovery import find_sites, keep_payloads_
from srlora_dist.layers.site import Site
from srlora_dist.method.budget import share_out_directions_
from srlora_dist.method.checks import OutputCheck, require_agreement
from srlora_dist.method.diagnostics import (
    Finding,
    directions_exhausted,
    even_scores,
    no_gradient,
    noise_level_directions,
)
from srlora_dist.method.directions import Directions
from srlora_dist.method.first_batch import FirstBatch
from srlora_dist.method.first_switch import leave_out_
from srlora_dist.method.memory import ExtraMemory, count_extra_memory
from srlora_dist.method.observer import Observer, make_scores
from srlora_dist.method.pair_steps import PairSteps
from srlora_dist.method.rehearsal import rehearse
from srlora_dist.method.schedule import SwitchSchedule
from srlora_dist.method.second_adapter import add_second_adapters_, require_intact
from srlora_dist.method.statistics import PairStatistics
from srlora_dist.method.switch import SwitchExecutor
from srlora_dist.method.watch import Watch, require_same_model
from srlora_dist.storage.base import Storage
from srlora_dist.storage.find import find_storage, release_gathered

logger = logging.getLogger(__name__)


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
            :meth:`plan`.
        if_disk_full: What a switch does that cannot be written to ``srlora.ledger_dir``: ``stop`` raises, ``go_on``
            warns. Either way it is kept in memory, and written once there is room.

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
        self._watch: Watch | None = None
        self.sites = find_sites(model, config.adapter_name)
        share_out_directions_(self.sites, config)
        self._parts = ExportParts(model, self.sites, config.adapter_name)
        warn_of_start(model, config.adapter_name)
        keep_payloads_(model)
        self._schedule: SwitchSchedule | None = None
        if num_training_steps is not None:
            self.set_num_steps(num_training_steps)
        hooks_of_adapters = add_second_adapters_(self.sites, config)
        self._if_disk_full, self._folders = if_disk_full, HeldFolders()
        self.num_steps = 0
        self.num_switches = 0
        self.svd_seconds = self.switch_seconds = 0.0
        self.storage: Storage | None = None
        self._ledger: Ledger | None = None
        self.extra_memory: ExtraMemory | None = None
        self._importance: PairStatistics | None = None
        self._check: OutputCheck | None = None
        self._first_batch: FirstBatch | None = None
        self.resumed: dict[str, object] | None = None
        self._warned_of_nothing = self._is_closed = False
        self._hooks: list[RemovableHandle] = hooks_of_adapters

    def set_num_steps(self, num_training_steps: int) -> None:
        """Share the switches out over a run of so many optimizer steps, before ``bind``.

        Raises:
            ValueError: There are more switches than steps.
            RuntimeError: ``bind`` was called before, and the switches are under way.
        """
        if self._watch is not None:
            raise RuntimeError("call switcher.set_num_steps() before switcher.bind(): the switches are under way")
        self._schedule = SwitchSchedule(self.sites, self.config, num_training_steps)

    @property
    def ledger(self) -> Ledger | None:
        """What was added to W so far; None on the ranks that do not keep it, and before :meth:`bind`."""
        return self._ledger

    @property
    def statistics(self) -> PairStatistics:
        """What this rank keeps for each element of the pairs that it tracks; set by :meth:`bind`."""
        return self._importance

    @property
    def due_steps(self) -> list[int]:
        """Optimizer steps after which the switches happen; with ``switch_when: settled``, at the latest."""
        return self._schedule.due_steps

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
            optimizer: Likewise.
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
        if self._watch is not None:
            raise RuntimeError("bind() was called before, and has edited the weights: load the model anew for another")
        release_gathered(model)
        self.sites = self._find_same_sites(model)
        self.storage = storage = find_storage(model, optimizer, self.sites)
        self._model = model
        require_same_model(model, storage, self._schedule.plan())
        resumes = storage.rank_0_says(resume_from is not None)
        rehearse(model, storage, self.config.optimizer_reset, will_save or resumes)
        require_intact(self.sites)
        saved = open_run(storage, resume_from, self._folders) if resumes else None
        self.resumed = saved.state if saved is not None else None
        storage.require_usable(fresh=saved is None)
        if saved is None:
            self._open_ledger(None)  # what can fail is tried before the directions are computed
        began = time.perf_counter()
        self._directions = Directions(storage, self.config)
        self._directions.prepare()
        self.svd_seconds = time.perf_counter() - began
        self._parts.bind(model, self.sites, self._directions.digests)
        pair_steps = PairSteps(storage) if self.config.optimizer_reset == "pair_steps" else None
        storage.allocate_residuals(self.config.residual_device)
        if self.config.residual_device == "cpu" and not storage.residuals:
            logger.warning("srlora.residual_device cpu is without effect: no 16-bit weight is edited in place")
        if self.due_steps:
            self._importance = make_scores(storage, self.config)
        self._watch = Watch(storage, self.config.adapter_name)
        parts = self._importance, pair_steps, self._watch, self._schedule
        self._observer = Observer(*parts, lambda: self.num_steps)
        report = self._start() if saved is None else self._resume(saved)
        if saved is None:
            self._first_batch = FirstBatch(model, storage, self.config, self._leave_out)
        self._hooks += storage.on_optimizer_step(self._before_optimizer_step, self._observer.after)
        mark_saves_(find_peft_model(model), self.config.adapter_name)
        if self.config.check_switch:
            self._check = OutputCheck(model, storage, self.config.switch_tolerance)
        self._announce()
        return report

    def step(self) -> SwitchReport | None:
        """Call after each ``optimizer.step()``; switches if that step was due.

        A call before which no optimizer step happened (accumulation, overflow) does nothing.

        Collective: nothing, or on a due step 8 bytes by which the ranks say that nothing was changed behind their back
            and the phases 1 to 4 of a switch; with ``agreement_every`` an all-reduce of 16 bytes for each tensor that
            ranks hold copies of; with ``check_switch`` two forward passes a switch.

        Returns:
            What the switch did, or None; it may have been undone.

        Raises:
            RuntimeError: The ranks no longer agree, the training has diverged, adapters were merged or switched, the
                model was changed behind the Switcher's back, or ``bind`` was not called.
        """
        self._require_bound()
        if self._is_closed:
            raise RuntimeError("switcher.step() came after switcher.close(), which has ended the training")
        if not self._observer.report():
            return None
        require_intact(self.sites)
        self.num_steps += 1
        planned = self._schedule.num_training_steps
        if self.num_steps == planned + 1:
            logger.warning(
                "this is step %d of %d: the switches were planned for too short a run", self.num_steps, planned
            )
        if self.config.agreement_every and self.num_steps % self.config.agreement_every == 0:
            self.require_agreement()
        return self._switch_now() if self._schedule.is_due(self.num_steps, self._choice) else None

    def require_agreement(self) -> None:
        """Compare all that ranks hold copies of: what is trained, under DDP its moments, and the weights.

        Collective: one all-reduce of 16 bytes per tensor.

        Raises:
            RuntimeError: Some rank holds something else; the message names the first such tensor.
        """
        if not require_agreement(self._model, self.storage, self.num_steps) and not self._warned_of_nothing:
            logger.warning(
                "srlora.agreement_every %d is without effect: on %s no rank holds a copy of what another one holds",
                *(self.config.agreement_every, self.storage.name),
            )
            self._warned_of_nothing = True

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
        self._require_bound()
        if self._observer.stepped:
            raise RuntimeError("call switcher.step() before switcher.save_checkpoint(): a step was not reported yet")
        self._watch.require_untouched()
        averages = self._importance.gather() if self._observer.counts_next() else {}
        state = {
            "step": self.num_steps if step is None else step,
            "num_steps": self.num_steps,
            "num_switches": self.num_switches,
            **self._schedule.state(),
            "extra": extra or {},
        }
        return save_run(
            *(Path(parent), self._model, self.storage, self._parts),
            digests=self._directions.digests,
            state=state,
            tensors={AVERAGES: averages},
            ledger=self._ledger,
            folders=self._folders,
        )

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
        self._require_bound()
        require_intact(self.sites)
        self._watch.require_untouched(in_step=bool(self._observer.stepped))
        missing = self._schedule.missing_switches(self.num_steps)
        if is_last and missing:
            warnings.warn(missing, stacklevel=2)
        about = self.sites, self._ledger, folder, self._parts, max_rank, put
        export_adapter(self._model, self.storage, *about)

    def write_ledger(self) -> None:
        """Write the entries of the ledger that could not be written to ``srlora.ledger_dir`` before, if there are any.

        Collective: every rank must call it; one all-reduce of 8 bytes.

        Raises:
            ValueError: Rank 0 still cannot write; raised on every rank.
        """
        self.storage.on_rank_0("write the ledger", lambda: self._ledger.write_rest(must=True))

    def close(self) -> None:
        """End the run: remove every hook from model and optimizer, and let other processes write into its folders.

        The weights stay as they were edited; ``export`` still works. The end of the process does as much.
        """
        watched = self._watch.hooks if self._watch is not None else []
        checked = self._check.hooks if self._check is not None else []
        for hook in (*self._hooks, *watched, *checked):
            hook.remove()
        if self._first_batch is not None:
            self._first_batch.close()
        self._is_closed = True
        self._folders.release()
        if self._ledger is not None:
            self._ledger.release()

    @property
    def tracking_seconds(self) -> float:
        """Time spent on the moving averages so far."""
        return self._importance.seconds if self._importance is not None else 0.0

    def _require_bound(self) -> None:
        if self._watch is None:
            raise RuntimeError("call switcher.bind(model, optimizer) first: after accelerator.prepare, before training")

    def _has_edited(self) -> bool:
        """Whether any W may be another than the pretrained one; pairs that begin as nothing leave it at switch 0."""
        return self.num_switches > (self.config.start == "zero_b")

    def _find_same_sites(self, model: nn.Module) -> list[Site]:
        """The sites again, because preparing a model can replace its parameters."""
        sites = find_sites(model, self.config.adapter_name, [site.name for site in self.sites])
        if [(site.name, site.shape) for site in sites] != [(site.name, site.shape) for site in self.sites]:
            raise ValueError("bind() got another model than Switcher(): pass what prepare() made of the same one")
        for site, known in zip(sites, self.sites, strict=True):
            site.target_rank, site.num_starts = known.target_rank, known.num_starts
            site.held, site.born = [-1] * site.rank, [0] * site.rank
        return sites

    def _open_ledger(self, start_from: dict[Path, dict[str, object]] | None) -> None:
        folder, full = self.config.ledger_dir, self._if_disk_full
        self._ledger = self.storage.on_rank_0("open the ledger", lambda: Ledger(folder, start_from, full))

    def _prepare_executor(self) -> None:
        self._executor = SwitchExecutor(self.storage, self._directions, self._ledger, self._importance, self.config)

    def _start(self) -> SwitchReport:
        """Switch 0."""
        self._prepare_executor()
        # The type of an original checkpoint is not looked at: most are in bfloat16.
        stored_as = "bfloat16" if self.config.directions_from is not None else None
        noisy = self.storage.on_rank_0(
            "judge the directions",
            lambda: noise_level_directions(0, self.sites, self._directions.singular_values(), stored_as),
        )
        return self._switch([list(range(site.num_first)) for site in self.sites], None, noisy)

    def _resume(self, saved: SavedRun) -> None:
        """Make the ledger's edits of the base again, and put back what a checkpoint holds."""
        state = saved.state
        require_same_base(state, self.sites, self._directions.digests)
        self._schedule.restore_(state)
        self.num_steps, self.num_switches = state["num_steps"], state["num_switches"]
        require_same_training(self._model, self.storage, state)
        listed = saved.checkpoint.listed_ledger if saved.checkpoint is not None else {}
        entries = list(listed)
        self.storage.on_rank_0("count the ledger", lambda: require_entries(entries, self.num_switches))
        self._ledger = None
        self._prepare_executor()
        self._executor.replay(entries)
        for site, theirs in zip(self.sites, state["sites"], strict=True):
            site.num_taken, site.held, site.born = theirs["num_taken"], list(theirs["held"]), list(theirs["born"])
            site.left_out = theirs.get("left_out", False)
        restore_training_state_(self._model, self.storage, state, saved.read)
        if self._observer.counts_next():
            self._importance.restore_(lambda name: saved.read(AVERAGES, name))
        self._watch.remember(self._has_edited())
        self._open_ledger(listed)  # now that nothing can be wrong with the checkpoint any more
        self._executor.ledger = self._ledger

    def _announce(self) -> None:
        """Count what is held beside LoRA, and tell the user."""
        self.extra_memory = count_extra_memory(
            *(self.storage, self._importance, self._ledger, len(self.due_steps), self.config),
            list(self._executor.buckets()),
            self._watch.num_bytes,
        )
        num_sites, name = len(self.sites), self.storage.name
        when = "after" if self.config.switch_when == "due" else "at the latest after"
        logger.info("SRLoRA on %s: %d sites, switches %s steps %s", name, num_sites, when, self.due_steps)
        logger.info("beside what LoRA needs this rank holds %s", self.extra_memory)

    def _before_optimizer_step(self, owners: list[Tensor]) -> None:
        self._judge_first_batch()
        self._observer.before(owners)

    def _judge_first_batch(self) -> None:
        if self._first_batch is not None:
            first_batch, self._first_batch = self._first_batch, None
            tolerance = first_batch.judge()
            if self._check is not None:
                self._check.tolerance = tolerance

    def _leave_out(self, numbers: list[int]) -> None:
        leave_out_(self._model, self.storage, self.config, numbers)
        names = [self.sites[number].name for number in numbers]
        self.storage.on_rank_0("leave sites out of the ledger", lambda: self._ledger.leave_out(names))
        self._watch.remember(self._has_edited())

    def _choice(self) -> list[list[int]]:
        return self._schedule.choose(self.sites, self._observer.finite_scores(), self.num_steps)

    def _switch_now(self) -> SwitchReport:
        self._watch.require_untouched()
        scores = self._observer.finite_scores()
        return self._switch(self._schedule.choose(self.sites, scores, self.num_steps), scores)

    def _switch(self, slots: list[list[int]], scores: list[Tensor] | None, *more: Finding | None) -> SwitchReport:
        began = time.perf_counter()
        report = SwitchReport(self.num_steps, self.num_switches, [])
        before = self._check.output() if self._check is not None else None
        put_back = self._executor.snapshot() if before is not None else None
        self._executor.run(report, slots, scores)
        if before is not None:
            report.relative_output_change = self._check.relative_change(before)
            report.undone = report.relative_output_change > self._check.tolerance
        if report.undone:
            put_back()
        else:
            self.num_switches += 1  # it has happened, whether it can be written or not
        self._watch.remember(self._has_edited())
        if report.undone:
            logger.warning(
                "switch %d after step %d changed the output by %.2e of its norm, more than srlora.switch_tolerance "
                "%.2e, and was undone: training goes on with the pairs it had",
                *(report.switch, report.step, report.relative_output_change, self._check.tolerance),
            )
        else:
            what = f"append switch {report.switch} to the ledger"
            self.storage.on_rank_0(what, lambda: self._ledger.close_switch(report))
            found = (*more, even_scores(report), no_gradient(report), directions_exhausted(report, self.sites))
            report.findings = [finding for finding in found if finding is not None]
            for finding in report.findings:
                logger.warning("step %d: %s", finding.step, finding.message)
        self.switch_seconds += time.perf_counter() - began
        return report
