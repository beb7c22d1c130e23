"""SRLoRA as the paper's Algorithm 1, in terms of spans, storages and the ledger."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from srlora_dist.config import SRLoRAConfig
from srlora_dist.digest import combine, digest_run, to_int64
from srlora_dist.export import export_adapter
from srlora_dist.fused import add_second_adapters_, append_pairs_, require_intact
from srlora_dist.importance import Importance
from srlora_dist.ledger import Ledger, SiteSwitch, SwitchReport
from srlora_dist.memory import ExtraMemory, count_extra_memory
from srlora_dist.schedule import choose_slots, due_steps, num_fused
from srlora_dist.sites import Site, clamp_target_ranks, find_sites, keep_payloads_, warn_of_adapted_heads
from srlora_dist.storage import Storage, find_storage, release_gathered, require_resettable
from srlora_dist.svd import Directions

logger = logging.getLogger(__name__)

BUCKET_BYTES = 64 << 20
"""Sites are switched in groups of about this much of factors, so that few large messages are sent."""


class Switcher:
    """Retires the least important pairs into W at intervals and starts new ones along unused directions.

    Between switches nothing is sent. A switch, on every rank in the same order:

    1. One all-reduce adds up the pair scores; every rank chooses the same slots (Eq. 7-8).
    2. For each bucket of sites: rank 0 broadcasts the next directions; under ZeRO-3 and FSDP2 the small factors are
       gathered.
    3. Each rank edits the span of W it holds, ``W <- W + s B_k A_k - s B_new A_new`` (Eq. 8-12), or appends those pairs
       to the frozen second adapter; it writes the new pairs to every copy it holds, resets their moments and its
       statistics. No base weight is sent.
    4. One all-reduce compares a digest of slots, directions and factors; a difference stops the run.

    Args:
        model: A PEFT model with LoRA layers, not yet prepared; it gets the second adapter where one is needed.
        config: Options.
        num_training_steps: Optimizer steps of the whole run (N_all of Eq. 14).

    Raises:
        ValueError: The model or the options cannot be worked with; the message names the remedy.
    """

    def __init__(self, model: nn.Module, config: SRLoRAConfig, num_training_steps: int) -> None:
        self.config = config
        self.sites = find_sites(model, config.adapter_name)
        clamp_target_ranks(self.sites, config.target_rank)
        warn_of_adapted_heads(model, self.sites, config.adapter_name)
        keep_payloads_(model)
        ranks = [(site.rank, site.target_rank) for site in self.sites]
        self.due_steps = due_steps(num_training_steps, ranks, config.fusion_ratio)
        add_second_adapters_(self.sites, config.fusion, config.fused_rank)
        self.num_training_steps = num_training_steps
        self.num_steps = 0
        self.num_switches = 0
        self.svd_seconds = self.switch_seconds = 0.0
        self.storage: Storage | None = None
        self.extra_memory: ExtraMemory | None = None
        self._importance: Importance | None = None
        self._stepped: set[int] = set()

    def bind(self, model: nn.Module, optimizer: object) -> SwitchReport:
        """Find the storage, and perform switch 0: start every pair along the top directions (Eq. 2).

        Args:
            model: What ``accelerator.prepare`` returned.
            optimizer: Likewise.

        Collective: the directions (see :class:`Directions`), then the phases 2 to 4 of a switch.

        Raises:
            ValueError: The storage is not supported, or the adapter has been trained already.
        """
        release_gathered(model)
        self.sites = self._find_same_sites(model)
        self.storage = find_storage(model, optimizer, self.sites)
        self._model = model
        require_resettable(self.storage.optimizer, self.config.optimizer_reset)
        require_intact(self.sites)
        self.storage.require_fresh_adapter()
        began = time.perf_counter()
        self._directions = Directions(self.storage, self.config.svd_cache, self.config.directions_from)
        self._directions.prepare()
        self.svd_seconds = time.perf_counter() - began
        self._ledger = self.storage.on_rank_0("open the ledger", lambda: Ledger(self.config.ledger_dir))
        self.storage.allocate_residuals(self.config.residual_device)
        if self.config.residual_device == "cpu" and not self.storage.residuals:
            logger.warning("srlora.residual_device cpu is without effect: no 16-bit weight is edited in place")
        for site in self.sites:
            site.held = [-1] * site.rank
        report = self._switch([list(range(site.num_first)) for site in self.sites], scores=None)
        if self.due_steps:
            self._importance = Importance(self.storage, self.config.beta1, self.config.beta2)
        self.storage.on_optimizer_step(self._before_optimizer_step)
        self.extra_memory = count_extra_memory(
            *(self.storage, self._importance, self._ledger, len(self.due_steps), self.config.fusion_ratio),
            list(self._buckets()),
        )
        logger.info(
            "SRLoRA on %s: %d sites, switches after steps %s", self.storage.name, len(self.sites), self.due_steps
        )
        logger.info("beside what LoRA needs this rank holds %s", self.extra_memory)
        return report

    def step(self) -> SwitchReport | None:
        """Call after each ``optimizer.step()``; switches if that step was due.

        A call before which no optimizer step happened (accumulation, overflow) does nothing.

        Collective: nothing, or on a due step the phases 1 to 4 of a switch.

        Returns:
            What the switch did, or None.

        Raises:
            RuntimeError: The ranks no longer agree, the training has diverged, adapters were merged or switched, or
                ``bind`` was not called.
        """
        self._require_bound()
        if not self._stepped:
            return None
        self._stepped.clear()
        require_intact(self.sites)
        self.num_steps += 1
        if self.num_steps == self.num_training_steps + 1:
            logger.warning(
                "this is step %d of %d: the switches were planned for too short a run",
                self.num_steps,
                self.num_training_steps,
            )
        if self.num_steps not in self.due_steps:
            return None
        scores = self._importance.pair_scores()
        if not all(bool(score.isfinite().all()) for score in scores):
            raise RuntimeError(
                f"the pair scores of step {self.num_steps} are not finite, so the training has diverged: lower the "
                "learning rate, or clip the gradient"
            )
        slots = [choose_slots(score, self._num_to_fuse(site)) for site, score in zip(self.sites, scores, strict=True)]
        report = self._switch(slots, scores)
        num_exhausted = sum(site.num_taken >= site.target_rank for site in self.sites)
        if num_exhausted:
            logger.info(
                "step %d: %d of %d sites have used all their directions and train on without switches",
                *(self.num_steps, num_exhausted, len(self.sites)),
            )
        return report

    def export(self, folder: str | Path, max_rank: int | None = None) -> None:
        """Write a plain PEFT adapter that gives this model's outputs on the untouched base.

        Args:
            folder: Where to write.
            max_rank: Truncate each site to this rank by SVD and log the relative error; None keeps it exact.

        Collective: every rank must call it; under ZeRO-3 the trainable parameters are gathered.
        """
        self._require_bound()
        require_intact(self.sites)
        export_adapter(self._model, self.storage, self.sites, self._ledger, folder, max_rank, self.config.adapter_name)

    @property
    def tracking_seconds(self) -> float:
        """Time spent on the moving averages so far."""
        return self._importance.seconds if self._importance is not None else 0.0

    def _require_bound(self) -> None:
        if self.storage is None:
            raise RuntimeError("call switcher.bind(model, optimizer) first: after accelerator.prepare, before training")

    def _find_same_sites(self, model: nn.Module) -> list[Site]:
        """The sites again, because preparing a model can replace its parameters."""
        sites = find_sites(model, self.config.adapter_name)
        if [(site.name, site.shape) for site in sites] != [(site.name, site.shape) for site in self.sites]:
            raise ValueError("bind() got another model than Switcher(): pass what prepare() made of the same one")
        for site, known in zip(sites, self.sites, strict=True):
            site.target_rank = known.target_rank
        return sites

    def _before_optimizer_step(self, owners: list[Tensor]) -> None:
        owned = {id(owner) for owner in owners}
        if self._stepped & owned:
            raise RuntimeError("call switcher.step() after every optimizer.step(): the one before was not reported")
        self._stepped |= owned  # ZeRO steps one group after the other
        if self._importance is not None and self.num_steps < self.due_steps[-1]:
            self._importance.observe_(owners)

    def _num_to_fuse(self, site: Site) -> int:
        return min(num_fused(site.rank, self.config.fusion_ratio), site.target_rank - site.num_taken)

    @torch.no_grad()
    def _switch(self, slots: list[list[int]], scores: list[Tensor] | None) -> SwitchReport:
        """Fuse and restart the given slots of every site; switch 0 has no scores and fuses nothing."""
        began = time.perf_counter()
        self.storage.settle()
        report = SwitchReport(self.num_steps, self.num_switches, [])
        digests, self._compression = [], []
        for bucket in self._buckets():
            bucket = [number for number in bucket if slots[number]]
            if not bucket:
                continue
            starts = [self.sites[number].num_taken for number in bucket]
            wanted = [(number, start, start + len(slots[number])) for number, start in zip(bucket, starts, strict=True)]
            triplets = self._directions.take(wanted)
            factors = self.storage.gather_parameters(
                [self.sites[number].factor(name) for number in bucket for name in ("A", "B")]
            )
            for j, number in enumerate(bucket):
                score = scores[number].tolist() if scores is not None else []
                part = self._switch_site(number, slots[number], score, triplets[j], *factors[2 * j : 2 * j + 2])
                report.sites.append(part[0])
                digests.append(part[1])
        if any(self._compression):
            logger.warning(
                "switch %d: second adapters were compressed to srlora.fused_rank, largest relative error %.2e",
                *(report.switch, max(self._compression)),
            )
        self._compare(report, digests)
        self.storage.on_rank_0(
            f"append switch {report.switch} to the ledger", lambda: self._ledger.close_switch(report)
        )
        self.num_switches += 1
        self.switch_seconds += time.perf_counter() - began
        return report

    def _switch_site(
        self, number: int, slots: list[int], scores: list[float], triplet: tuple, a: Tensor, b: Tensor
    ) -> tuple[SiteSwitch, int]:
        """Eq. 8-12 at one site: one edit of W of rank 2 r', then the new pairs take the fused ones' slots."""
        site, config = self.sites[number], self.config
        left, values, right = triplet
        root = (values / site.scale).sqrt()
        # In the type of the factors, for what is taken out of W has to be what the forward pass will use.
        new_b, new_a = (left * root).to(b.dtype), (right * root[:, None]).to(a.dtype)
        chosen = torch.tensor(slots)
        fuses = bool(scores)
        index = chosen.to(a.device)
        lefts = torch.cat([b[:, index]] * fuses + [-new_b], 1)
        rights = torch.cat([a[index]] * fuses + [new_a], 0)
        self._add_to_weight_(number, lefts, rights)
        whole_a, whole_b = a.index_copy(0, index, new_a), b.index_copy(1, index, new_b)
        self.storage.write_pairs_(number, "A", chosen, whole_a, config.optimizer_reset)
        self.storage.write_pairs_(number, "B", chosen, whole_b, config.optimizer_reset)
        if self._importance is not None:
            self._importance.reset_(number, None if config.score_reset == "all" else chosen)
        taken = list(range(site.num_taken, site.num_taken + len(slots)))
        part = SiteSwitch(site.name, slots, [site.held[slot] for slot in slots] if fuses else [], taken, scores)
        for slot, direction in zip(slots, taken, strict=True):
            site.held[slot] = direction
        site.num_taken += len(slots)
        tensors = (chosen, lefts, rights, whole_a, whole_b)
        return part, combine(*slots, *taken, *(digest_run(tensor) for tensor in tensors))

    def _add_to_weight_(self, number: int, left: Tensor, right: Tensor) -> None:
        """Add ``scale * left @ right`` to a site's W, or to what stands for it. Collective: see ``append_pairs_``."""
        site = self.sites[number]
        if site.fused_a is None:
            self.storage.edit_weight_(number, left.float(), right.float())
        else:
            self._compression.append(append_pairs_(self.storage, number, left, right))
        if self._ledger is not None:
            self._ledger.add(site.name, site.scale * left.float(), right.float())

    def _buckets(self) -> Iterator[list[int]]:
        """Site numbers in order, cut where a bucket's factors reach ``BUCKET_BYTES``."""
        bucket, size = [], 0
        for number, site in enumerate(self.sites):
            bucket.append(number)
            size += 4 * site.rank * sum(site.shape)
            if size >= BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket

    def _compare(self, report: SwitchReport, digests: list[int]) -> None:
        """Raise on every rank if any rank fused, took or wrote something else. Collective: one all-reduce."""
        mine = torch.tensor([to_int64(digest) for digest in digests], dtype=torch.int64, device=self.storage.device)
        # ~x falls as x rises, so the largest ~x belongs to the smallest x: both in one all-reduce.
        highest = self.storage.all_reduce_(torch.stack([mine, ~mine]), "max")
        differs = (highest[0] != ~highest[1]).nonzero()
        if len(differs):
            name = report.sites[int(differs[0])].site
            raise RuntimeError(
                f"switch {report.switch} after step {report.step}: the ranks disagree on slots, directions or factors, "
                f"first at {name}; they have drifted apart, so the run stops. Restart from the last good state"
            )
