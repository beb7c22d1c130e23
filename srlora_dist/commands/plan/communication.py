"""What a rank hands to collectives in each phase of a run, message by message as the phases send them."""

from __future__ import annotations

from typing import NamedTuple

from srlora_dist.commands.plan.blueprint import Blueprint
from srlora_dist.method.budget import num_to_fuse
from srlora_dist.storage.collectives import cut_into_buckets

WORD = 8
"""Bytes of an answer or of a count of failures, ``Collectives.rank_0_says`` and ``Collectives.raise_together``."""


class Message(NamedTuple):
    """One collective.

    Args:
        kind: ``all-reduce``, ``broadcast``, ``gather`` or ``all-gather``.
        num_bytes: Bytes of the tensor that each rank hands over.
        what: It is for.
    """

    kind: str
    num_bytes: int
    what: str


def start_up(blueprint: Blueprint, cold: bool) -> list[Message]:
    """List the messages from ``bind`` to switch 0, without it.

    Args:
        blueprint: Blueprint of the run.
        cold: There is no file of directions yet.
    """
    if blueprint.engine == "plain":
        return []
    messages = [
        Message("all-reduce", 2 * WORD, "digest of the model"),
        Message("broadcast", WORD, "resume or not"),
        Message("all-reduce", WORD, "the optimizer is supported"),
        Message("all-reduce", WORD, "the adapter is fresh"),
        Message("all-reduce", WORD, "the ledger is open"),
        Message("all-reduce", 2 * WORD * len(blueprint.sites), "digests of W"),
        Message("all-reduce", WORD, "looked for directions"),
        Message("broadcast", WORD, "found or not"),
    ]
    if cold:
        factored = Message("all-reduce", WORD, "a site is factored")
        for number, stored in enumerate(blueprint.weights):
            if blueprint.gathers:
                num_bytes = stored.element_size * blueprint.longest_run(stored)
                messages.append(Message("gather", num_bytes, "W to rank 0, one site after the other"))
            messages += [factored] * (number > 0)  # the one before
        messages += [factored, Message("all-reduce", WORD, "directions are written")]
    kept = zip(blueprint.sites, blueprint.weights, strict=True)
    whole = [stored for site, stored in kept if blueprint.is_persistent(stored) and not site.quantised]
    if whole:  # in place of what the first forward pass would send
        num_bytes = sum(stored.element_size * blueprint.longest_run(stored) for stored in whole)
        messages.append(Message("all-gather", num_bytes, "W of small sites, which stay whole"))
    return [*messages, Message("all-reduce", WORD, "directions are judged")]


def switches(blueprint: Blueprint) -> list[list[Message]]:
    """Each switch of the run, switch 0 first."""
    if blueprint.engine == "plain":
        return [[] for _ in range(1 + len(blueprint.due_steps))]
    return [_switch(blueprint, number, counts) for number, counts in enumerate(restarted_pairs(blueprint))]


def restarted_pairs(blueprint: Blueprint) -> list[list[int]]:
    """For each switch, switch 0 first, the pairs that it starts at each site."""
    sites = blueprint.sites
    taken = [site.num_first for site in sites]
    switches = [list(taken)]
    for _ in blueprint.due_steps:
        counts = [
            num_to_fuse(site.rank, site.state.num_starts, done, blueprint.options.fusion_ratio)
            for site, done in zip(sites, taken, strict=True)
        ]
        taken = [done + count for done, count in zip(taken, counts, strict=True)]
        switches.append(counts)
    return switches


def _switch(blueprint: Blueprint, number: int, counts: list[int]) -> list[Message]:
    sites = blueprint.sites
    messages = []
    if number > 0:
        messages.append(Message("all-reduce", WORD, "nothing was changed"))
        messages.append(Message("all-reduce", 8 * sum(site.rank for site in sites), "pair scores"))
    for bucket in cut_into_buckets([site.num_factor_elements for site in sites]):
        switched = [(sites[j], counts[j]) for j in bucket if counts[j]]
        if not switched:
            continue
        if blueprint.gathers:
            factors = sum(site.num_factor_elements for site, _ in switched)
            messages.append(Message("all-reduce", 4 * factors, "factors"))
        directions = sum(count * (sum(site.shape) + 1) for site, count in switched)
        messages.append(Message("broadcast", 4 * (directions + 1), "directions"))  # and whether they could be read
    num_switched = sum(count > 0 for count in counts)
    messages.append(Message("all-reduce", 2 * WORD * num_switched, "digests of what was done"))
    return [*messages, Message("all-reduce", WORD, "the ledger is written")]
