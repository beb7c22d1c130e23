"""Holds the prepared model and all that SRLoRA keeps beside it on one rank; set up once, by ``Switcher.bind``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from srlora_dist.checkpoint.export_parts import ExportParts
from srlora_dist.checkpoint.folder_lock import HeldFolders
from srlora_dist.checkpoint.format import AVERAGES, Checkpoint, require_same_base
from srlora_dist.checkpoint.hf_saves import mark_saves_
from srlora_dist.checkpoint.ledger import Ledger, SwitchReport
from srlora_dist.checkpoint.ledger_files import require_entries
from srlora_dist.checkpoint.save import SavedRun, open_run, save_run
from srlora_dist.checkpoint.training_state import require_same_training, restore_training_state_
from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.layers.adapter import find_peft_model
from srlora_dist.layers.discovery import find_sites
from srlora_dist.layers.site import Site
from srlora_dist.method.checks import AgreementCheck, OutputCheck
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
from srlora_dist.method.second_adapter import require_intact
from srlora_dist.method.statistics import PairStatistics
from srlora_dist.method.switch import SwitchExecutor
from srlora_dist.method.watch import Watch, require_same_model
from srlora_dist.storage.find import find_storage, release_gathered

logger = logging.getLogger(__name__)


class BoundModel:
    """A prepared model, how this rank holds it, and what a switch needs beside it.

    It is set up in this order: ``BoundModel()``, :meth:`open_files`, :meth:`prepare`, then switch 0 or
    :meth:`restore_`, then :meth:`follow_optimizer`.

    Args:
        model: What ``accelerator.prepare`` returned.
        optimizer: What ``accelerator.prepare`` returned for the optimizer.
        known_sites: The sites that were found before the model was prepared.
        config: Options.
        schedule: The switches to come.

    Collective: 16 bytes by which the ranks compare their models.

    Raises:
        ValueError: The ranks hold different models, or the storage or the optimizer is not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: object,
        known_sites: list[Site],
        config: SRLoRAConfig,
        schedule: SwitchSchedule,
    ) -> None:
        release_gathered(model)
        self.model, self.config, self.schedule = model, config, schedule
        self.sites = _find_same_sites(model, known_sites, config.adapter_name)
        self.storage = find_storage(model, optimizer, self.sites)
        require_same_model(model, self.storage, schedule.plan())
        self.agreement = AgreementCheck(model, self.storage)
        self.ledger: Ledger | None = None
        self.statistics: PairStatistics | None = None
        self.check: OutputCheck | None = None
        self.first_batch: FirstBatch | None = None
        self.hooks: list[RemovableHandle] = []

    def open_files(
        self, source: str | Path | Checkpoint | None, will_save: bool, folders: HeldFolders, if_disk_full: str
    ) -> SavedRun | None:
        """Open the checkpoint to resume from, or a new ledger, and refuse what could not be reset or saved later.

        Args:
            source: A checkpoint, its folder, or a folder of checkpoints; rank 0's counts.
            will_save: Whether the run writes checkpoints.
            folders: Folders that no other process may write to; gets the folder of checkpoints.
            if_disk_full: What the ledger does when it cannot be written, see :class:`Switcher`.

        Returns:
            The checkpoint, or None if the run starts anew.

        Collective: one broadcast, the rehearsal of :func:`rehearse`, and ``state.json`` (see :func:`open_run`).

        Raises:
            ValueError: The optimizer is not supported, the checkpoint is damaged, or the adapter has been trained.
        """
        self._if_disk_full = if_disk_full
        resumes = self.storage.rank_0_says(source is not None)
        rehearse(self.model, self.storage, self.config.optimizer_reset, will_save or resumes)
        require_intact(self.sites)
        saved = open_run(self.storage, source, folders) if resumes else None
        self.storage.require_usable(fresh=saved is None)
        if saved is None:
            self._open_ledger(None)  # what can fail is tried before the directions are computed
        return saved

    def prepare(self, num_steps: Callable[[], int]) -> float:
        """Find the directions, and allocate what is kept beside the model.

        Args:
            num_steps: Gives the optimizer steps that were reported so far.

        Returns:
            Seconds that the directions took.

        Collective: see :class:`Directions`.
        """
        storage, config = self.storage, self.config
        began = time.perf_counter()
        self.directions = Directions(storage, config)
        self.directions.prepare()
        seconds = time.perf_counter() - began
        pair_steps = PairSteps(storage) if config.optimizer_reset == "pair_steps" else None
        storage.allocate_residuals(config.residual_device)
        if config.residual_device == "cpu" and not storage.residuals:
            logger.warning("srlora.residual_device cpu is without effect: no 16-bit weight is edited in place")
        if self.schedule.due_steps:
            self.statistics = make_scores(storage, config)
        self.watch = Watch(storage, config.adapter_name)
        self.hooks += self.watch.hooks
        self.observer = Observer(self.statistics, pair_steps, self.watch, self.schedule, num_steps)
        self.executor = SwitchExecutor(storage, self.directions, self.ledger, self.statistics, config)
        return seconds

    def judge_directions(self) -> Finding | None:
        """Say whether switch 0 is about to use directions that are rounding noise; on rank 0, None elsewhere."""
        # The type of an original checkpoint is not looked at: most are in bfloat16.
        stored_as = "bfloat16" if self.config.directions_from is not None else None
        return self.storage.on_rank_0(
            "judge the directions",
            lambda: noise_level_directions(0, self.sites, self.directions.singular_values(), stored_as),
        )

    def restore_(self, saved: SavedRun) -> None:
        """Make the ledger's edits of the untouched base again, and put back what a checkpoint holds.

        Collective: the content of the checkpoint.

        Raises:
            ValueError: The checkpoint does not fit the model, the optimizer or the options.
        """
        state, storage = saved.state, self.storage
        require_same_base(state, self.sites, self.directions.digests)
        self.schedule.restore_(state)
        require_same_training(self.model, storage, state)
        listed = saved.checkpoint.listed_ledger if saved.checkpoint is not None else {}
        entries = list(listed)
        storage.on_rank_0("count the ledger", lambda: require_entries(entries, state["num_switches"]))
        self.executor.replay(entries)
        for site, theirs in zip(self.sites, state["sites"], strict=True):
            site.state.restore_(theirs)
        restore_training_state_(self.model, storage, state, saved.read)
        if self.observer.counts_next():
            self.statistics.restore_(lambda name: saved.read(AVERAGES, name))
        self.remember(state["num_switches"])
        self._open_ledger(listed)  # now that nothing can be wrong with the checkpoint any more
        self.executor.ledger = self.ledger

    def follow_optimizer(self, checks_first_batch: bool) -> None:
        """Add the hooks that observe each step of the optimizer and keep what is needed to compare outputs."""
        storage, config = self.storage, self.config
        if checks_first_batch:
            self.first_batch = FirstBatch(self.model, storage, config, self._leave_out)
        self.hooks += storage.on_optimizer_step(self._before_optimizer_step, self.observer.after)
        mark_saves_(find_peft_model(self.model), config.adapter_name)
        if config.check_switch:
            self.check = self.executor.check = OutputCheck(self.model, storage, config.switch_tolerance)
            self.hooks += self.check.hooks

    def count_extra_memory(self) -> ExtraMemory:
        """Count what this rank holds beside LoRA, and log that and when the switches will be."""
        due_steps, buckets = self.schedule.due_steps, list(self.executor.buckets())
        held = count_extra_memory(
            self.storage, self.statistics, self.ledger, len(due_steps), self.config, buckets, self.watch.num_bytes
        )
        when = "after" if self.config.switch_when == "due" else "at the latest after"
        logger.info("SRLoRA on %s: %d sites, switches %s steps %s", self.storage.name, len(self.sites), when, due_steps)
        logger.info("beside what LoRA needs this rank holds %s", held)
        return held

    def remember(self, num_switches: int) -> None:
        """Remember the model as it is now; the next switch, save or export requires that nothing else has changed it.

        Args:
            num_switches: Switches that have happened, switch 0 counted.
        """
        # Pairs that begin as nothing leave W at switch 0.
        self.watch.remember(num_switches > (self.config.start == "zero_b"))

    def record(self, report: SwitchReport, findings: Iterable[Finding | None]) -> None:
        """Write a switch to the ledger, and warn of what it shows. Collective: see ``on_rank_0``.

        Args:
            report: Gets the findings.
            findings: Findings from before the switch; None entries are skipped.
        """
        what = f"append switch {report.switch} to the ledger"
        self.storage.on_rank_0(what, lambda: self.ledger.close_switch(report))
        found = (*findings, even_scores(report), no_gradient(report), directions_exhausted(report, self.sites))
        report.findings = [finding for finding in found if finding is not None]
        for finding in report.findings:
            logger.warning("step %d: %s", finding.step, finding.message)

    def judge_first_batch(self) -> None:
        """Raise on every rank if switch 0 has moved the outputs of the first batch; at the first call alone."""
        if self.first_batch is not None and not self.first_batch.is_closed:
            tolerance = self.first_batch.judge()
            if self.check is not None:
                self.check.tolerance = tolerance

    def save(self, parent: Path, state: dict[str, object], parts: ExportParts, folders: HeldFolders) -> int | None:
        """Write a checkpoint; see :meth:`Switcher.save_checkpoint`.

        Args:
            parent: Folder of the checkpoints.
            state: Numbers of the run, for ``state.json``.
            parts: Knows what an export holds.
            folders: Gets the parent, so that no other process writes there.
        """
        averages = self.statistics.gather() if self.observer.counts_next() else {}
        return save_run(
            parent,
            self.model,
            self.storage,
            parts,
            digests=self.directions.digests,
            state=state,
            tensors={AVERAGES: averages},
            ledger=self.ledger,
            folders=folders,
        )

    def release(self) -> None:
        """Remove all hooks, and let other processes write the ledger's folder."""
        for hook in self.hooks:
            hook.remove()
        if self.first_batch is not None:
            self.first_batch.close()
        if self.ledger is not None:
            self.ledger.release()

    def _open_ledger(self, start_from: dict[Path, dict[str, object]] | None) -> None:
        folder, full = self.config.ledger_dir, self._if_disk_full
        self.ledger = self.storage.on_rank_0("open the ledger", lambda: Ledger(folder, start_from, full))

    def _before_optimizer_step(self, owners: list[Tensor]) -> None:
        self.judge_first_batch()
        self.observer.before(owners)

    def _leave_out(self, numbers: list[int]) -> None:
        leave_out_(self.model, self.storage, self.config, numbers)
        names = [self.sites[number].name for number in numbers]
        self.storage.on_rank_0("leave sites out of the ledger", lambda: self.ledger.leave_out(names))
        self.remember(num_switches=1)


def _find_same_sites(model: nn.Module, known_sites: list[Site], adapter_name: str) -> list[Site]:
    """The sites again, because preparing a model can replace its parameters."""
    sites = find_sites(model, adapter_name, [site.name for site in known_sites])
    if [(site.name, site.shape) for site in sites] != [(site.name, site.shape) for site in known_sites]:
        raise ValueError("bind() got another model than Switcher(): pass what prepare() made of the same one")
    for site, known in zip(sites, known_sites, strict=True):
        site.state = known.state
        site.state.forget_pairs_(site.rank)
    return sites
