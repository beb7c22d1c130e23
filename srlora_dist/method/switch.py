"""Performs a switch once the slots are chosen: fuses their pairs and starts the next directions in their place."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from srlora_dist.checkpoint.ledger import Ledger, SiteSwitch, SwitchReport
from srlora_dist.checkpoint.ledger_files import read_entries
from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.errors import RunStoppedError
from srlora_dist.layers.digest import combine, digest_span
from srlora_dist.layers.matmul import exact_matmul
from srlora_dist.method.budget import next_directions
from srlora_dist.method.checks import OutputCheck
from srlora_dist.method.directions import Directions
from srlora_dist.method.second_adapter import append_pairs_
from srlora_dist.method.snapshot import take_snapshot
from srlora_dist.method.statistics import PairStatistics, sum_by_pair
from srlora_dist.method.svd import Triplet, compute_directions
from srlora_dist.storage.base import Storage
from srlora_dist.storage.collectives import cut_into_buckets

logger = logging.getLogger(__name__)


class SwitchExecutor:
    """Performs phases 2 to 4 of a switch (see :class:`~.switcher.Switcher`); also undoes and replays them.

    Args:
        storage: How the ranks hold the weights; its sites are switched.
        directions: Gives the directions of every site.
        ledger: The ledger on rank 0; None elsewhere.
        statistics: Statistics of the pairs, reset where pairs restart; None where nothing is tracked.
        config: Options.

    Attributes:
        check: Compares the outputs before and after each switch; None for no comparison.
    """

    check: OutputCheck | None = None

    def __init__(
        self,
        storage: Storage,
        directions: Directions,
        ledger: Ledger | None,
        statistics: PairStatistics | None,
        config: SRLoRAConfig,
    ) -> None:
        self.storage, self.sites = storage, storage.sites
        self.directions, self.ledger, self.statistics, self.config = directions, ledger, statistics, config
        self._compression: list[float] = []

    def switch(self, report: SwitchReport, slots: list[list[int]], scores: list[Tensor] | None) -> SwitchReport:
        """Switch, and undo the switch if the check finds that it moved the outputs by too much.

        Args:
            report: Step and number of the switch; gets everything else.
            slots: Slots of each site that are fused and restarted.
            scores: All scores of each site; None for switch 0.

        Collective: see :meth:`fuse_and_restart`; with a check two forward passes, and see :func:`take_snapshot`.
        """
        before = self.check.output() if self.check is not None else None
        if before is None:
            return self.fuse_and_restart(report, slots, scores)
        put_back = take_snapshot(self.storage, self.statistics)
        self.fuse_and_restart(report, slots, scores)
        report.relative_output_change = self.check.relative_change(before)
        report.undone = report.relative_output_change > self.check.tolerance
        if not report.undone:
            return report
        put_back()
        if self.ledger is not None:
            self.ledger.forget_switch()
        logger.warning(
            "switch %d after step %d changed the output by %.2e of its norm, more than srlora.switch_tolerance "
            "%.2e, and was undone: training goes on with the pairs it had",
            report.switch,
            report.step,
            report.relative_output_change,
            self.check.tolerance,
        )
        return report

    @torch.no_grad()
    def fuse_and_restart(
        self, report: SwitchReport, slots: list[list[int]], scores: list[Tensor] | None
    ) -> SwitchReport:
        """Fuse and restart the given slots of every site; switch 0 has no scores and fuses nothing.

        Args:
            report: Step and number of the switch; gets the part of each site.
            slots: Slots of each site; a site without any is left alone.
            scores: All scores of each site.

        Collective: for each bucket, under ZeRO-3 and FSDP2, an all-reduce of the factors, then one broadcast of the
            directions; at last one all-reduce of 16 bytes per site. With ``optimizer_reset: survivors`` one of 16 bytes
            per pair before all that; with ``exhausted: renew`` see :meth:`_renew`.

        Raises:
            RunStoppedError: The ranks have fused, taken or written different things.
            ValueError: Rank 0 can no longer read its directions, or cannot factor a weight anew.
        """
        self.storage.to_rest_layout_()
        self._compression, digests = [], []
        seconds = self._surviving_moments(slots) if scores is not None else {}
        for bucket in self.buckets():
            bucket = [number for number in bucket if slots[number]]
            if not bucket:
                continue
            of_bucket = [self.sites[number].factor(name) for number in bucket for name in ("A", "B")]
            gathered = iter(self.storage.gather_parameters(of_bucket))
            factors = {number: (next(gathered), next(gathered)) for number in bucket}
            for number, numbers, triplet in self._take_directions(bucket, slots, factors):
                score = scores[number].tolist() if scores is not None else []
                more = seconds.get(number)
                part = self._switch_site(number, slots[number], numbers, score, triplet, *factors[number], more)
                for slot, direction in zip(slots[number], numbers, strict=True):
                    state = self.sites[number].state
                    state.held[slot], state.born[slot] = direction, report.step
                report.sites.append(part[0])
                digests.append(part[1])
        if any(self._compression):
            logger.warning(
                "switch %d: second adapters were compressed to srlora.fused_rank, largest relative error %.2e",
                report.switch,
                max(self._compression),
            )
        self._compare(report, digests)
        return report

    def _take_directions(
        self, bucket: list[int], slots: list[list[int]], factors: dict[int, tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[int, list[int], Triplet]]:
        """Choose the next directions of each site in a bucket: (site number, their numbers, the triplets).

        Collective: one broadcast of all of them; with ``exhausted: renew`` see :meth:`_renew`.
        """
        wanted, made = [], {}
        for number in bucket:
            site = self.sites[number]
            numbers, site.state.num_taken = next_directions(site, slots[number], self.config.exhausted)
            wanted.append((number, numbers))
            if numbers[-1] >= site.state.target_rank:
                made[number] = self._renew(number, slots[number], *factors[number])
        for (number, numbers), triplet in zip(wanted, self.directions.take(wanted, made), strict=True):
            yield number, numbers, triplet

    def _switch_site(
        self,
        number: int,
        slots: list[int],
        directions: list[int],
        scores: list[float],
        triplet: Triplet,
        a: Tensor,
        b: Tensor,
        second: tuple[float, float] | None,
    ) -> tuple[SiteSwitch, int]:
        """Eq. 8-12 at one site: one edit of W of rank 2 r', then the new pairs take the fused ones' slots."""
        site, config = self.sites[number], self.config
        left, values, right = triplet
        root = (values / site.scale).sqrt()
        # In the type of the factors, for what is taken out of W has to be what the forward pass will use.
        new_b, new_a = (left * root).to(b.dtype), (right * root[:, None]).to(a.dtype)
        if config.start == "zero_b":
            new_b, new_a = torch.zeros_like(new_b), right.to(a.dtype)
        chosen = torch.tensor(slots)
        fuses, index = bool(scores), chosen.to(a.device)
        fused_b, fused_a = (b[:, index], a[index]) if fuses else (b[:, :0], a[:0])
        lefts, rights = fused_b, fused_a
        if config.start == "pissa":
            lefts, rights = torch.cat([fused_b, -new_b], 1), torch.cat([fused_a, new_a], 0)
        if lefts.shape[1]:
            self._add_to_weight_(number, lefts, rights)
        if self.ledger is not None:
            self.ledger.add(site.name, lefts, rights)
        whole_a, whole_b = a.index_copy(0, index, new_a), b.index_copy(1, index, new_b)
        for factor, whole, moment in zip("AB", (whole_a, whole_b), second or (0.0, 0.0), strict=True):
            self.storage.write_pairs_(number, factor, chosen, whole, config.optimizer_reset, moment)
        if self.statistics is not None:
            self.statistics.reset_(number, chosen)
        before = [site.state.held[slot] for slot in slots] if fuses else []
        part = SiteSwitch(site.name, slots, before, directions, scores)
        written = torch.cat([tensor.flatten().float() for tensor in (lefts, rights, whole_a, whole_b)])
        return part, combine(*slots, *directions, digest_span(written))

    def _renew(self, number: int, slots: list[int], a: Tensor, b: Tensor) -> Triplet | None:
        """Compute the first directions of the W that a site will have once these pairs are fused, on rank 0; else None.

        That W does not contain what the other pairs started with, so these directions differ from theirs.

        Collective: a gather of W on rank 0; under ZeRO-3 and FSDP2 one of the second adapter on all; one all-reduce
            of 8 bytes.
        """
        storage, site = self.storage, self.sites[number]
        with storage.in_memory(number):
            stored = storage.gather_stored(number, 0)
        parts = [(b[:, slots], a[slots])]
        if site.fused_a is not None:
            fused_a, fused_b = storage.gather_parameters([site.fused_a, site.fused_b])
            parts.append((fused_b[:, : site.state.num_fused], fused_a[: site.state.num_fused]))

        @exact_matmul()
        def factor() -> Triplet:
            weight = storage.widen(number, stored)
            for left, right in parts:
                weight = weight + site.scale * (left.float() @ right.float())
            return compute_directions(weight, len(slots))

        return storage.on_rank_0(f"factor {site.name} anew", factor)

    def _surviving_moments(self, slots: list[list[int]]) -> dict[int, tuple[float, float]]:
        """The mean second moments in A and in B of the pairs that stay, by site; empty where no option asks for them.

        Collective: with that option one all-reduce of 16 bytes per pair.
        """
        if self.config.optimizer_reset != "survivors":
            return {}
        storage = self.storage
        sums = torch.stack([sum_by_pair(storage, storage.second_moment, factor) for factor in "AB"])
        means = storage.all_reduce_(sums).cpu().split([site.rank for site in self.sites], 1)
        stay = [[k for k in range(site.rank) if k not in gone] for site, gone in zip(self.sites, slots, strict=True)]
        found = ((number, means[number][:, kept]) for number, kept in enumerate(stay) if kept)
        return {number: tuple(of_site.mean(1).tolist()) for number, of_site in found}

    def _add_to_weight_(self, number: int, left: Tensor, right: Tensor) -> None:
        """Add ``scale * left @ right`` to a site's W, or to its second adapter. Collective: see ``append_pairs_``."""
        site = self.sites[number]
        if site.fused_a is None:
            self.storage.edit_weight_(number, left.float(), right.float())
        else:
            left, right = left.to(site.fused_b.dtype), right.to(site.fused_a.dtype)
            self._compression.append(append_pairs_(self.storage, number, left, right))

    @torch.no_grad()
    def replay(self, paths: list[Path]) -> None:
        """Make all edits of a ledger, in their order, on the untouched base.

        Args:
            paths: Files of the entries; those of rank 0 are read.

        Collective: for each entry a broadcast of the shapes, and its pairs (see ``Collectives.scatter_from_0``).

        Raises:
            ValueError: Rank 0 cannot read an entry.
        """
        storage = self.storage
        storage.to_rest_layout_()
        entries = read_entries(paths)
        while True:
            entry = storage.on_rank_0("read the ledger", lambda: next(entries, {}))
            shapes = storage.broadcast_object({name: list(tensor.shape) for name, tensor in (entry or {}).items()})
            if not shapes:
                return
            names = [f"{site.name}.{side}" for site in self.sites for side in ("left", "right")]
            names = [name for name in names if name in shapes]
            sizes = [torch.Size(shapes[name]).numel() for name in names]
            if not any(sizes):  # switch 0 of pairs that begin as nothing
                continue
            numbers = iter([number for number, site in enumerate(self.sites) if f"{site.name}.left" in shapes])
            left = None
            for j, whole in storage.scatter_from_0(sizes, lambda j, names=names, entry=entry: entry[names[j]].float()):
                whole = whole.view(shapes[names[j]])
                if left is None:
                    left = whole
                else:
                    self._add_to_weight_(next(numbers), left, whole)
                    left = None

    def buckets(self) -> Iterator[list[int]]:
        """Indices of the sites that are switched together."""
        return cut_into_buckets([site.num_factor_elements for site in self.sites])

    def _compare(self, report: SwitchReport, digests: list[int]) -> None:
        """Raise on every rank if any rank fused, took or wrote something else. Collective: one all-reduce."""
        number = self.storage.find_difference(digests)
        if number is not None:
            raise RunStoppedError(
                f"switch {report.switch} after step {report.step}: the ranks disagree on slots, directions or factors, "
                f"first at {report.sites[number].site}; they have drifted apart, so the run stops. Restart from the "
                "last good checkpoint"
            )
