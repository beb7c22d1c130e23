"""Computes how many switches there are, when each is due, and which pairs and directions it takes (Eq. 8, 13, 14)."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Iterable

from torch import Tensor

from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.errors import shorten_list
from srlora_dist.layers.adapter import is_used, used_adapter_error
from srlora_dist.layers.site import Site

NEGLIGIBLE = 1e-6
"""A share of a moving average this small moves a score by no more than a few roundings of float32."""


def num_fused(rank: int, fusion_ratio: float) -> int:
    """Eq. 13: the number of pairs that one switch fuses at a site of this rank, r' = gamma r, at least one."""
    return max(1, round(fusion_ratio * rank))


def num_to_fuse(rank: int, target_rank: int, num_taken: int, fusion_ratio: float) -> int:
    """Number of pairs that the next switch fuses at a site: r', or as many as there are directions left."""
    return min(num_fused(rank, fusion_ratio), target_rank - num_taken)


def count_switches(ranks: Iterable[tuple[int, int]], fusion_ratio: float) -> int:
    """Eq. 14's N_switch: the number of switches that use up the directions of all sites.

    Args:
        ranks: (rank, target rank) of each site.
        fusion_ratio: The paper's gamma.
    """
    counts = (math.ceil((target - rank) / num_fused(rank, fusion_ratio)) for rank, target in ranks if target > rank)
    return max(counts, default=0)


def due_steps(
    num_training_steps: int,
    ranks: Iterable[tuple[int, int]],
    fusion_ratio: float,
    until: float = 1.0,
    num_switches: int | None = None,
    may_be_fewer: bool = False,
) -> list[int]:
    """Eq. 14: the optimizer steps after which a switch is due, t_interval = N_all / N_switch apart.

    A last, smaller switch takes the remainder of the directions. A switch that no training would follow is left out:
    with the paper's interval that is always the last one.

    Args:
        num_training_steps: Optimizer steps of the whole run, N_all.
        ranks: (rank, target rank) of each site; the site with the most switches sets the pace.
        fusion_ratio: The paper's gamma.
        until: Share of the run in which all switches happen; the paper's is 1.
        num_switches: Number of switches; None for as many as the ranks need.
        may_be_fewer: Whether to warn and switch after each step where the ranks need more switches than there are
            steps. Else that raises.

    Raises:
        ValueError: There are more switches than steps, and there may not be fewer.
    """
    length = round(until * num_training_steps)
    count = count_switches(ranks, fusion_ratio)
    if num_switches is not None:
        count = num_switches + (length == num_training_steps)  # one more falls on the end, and is left out
    wanted = count
    if may_be_fewer and num_switches is None:
        count = min(count, length)
    if count > length:
        asked_by, remedy = "target_rank", "lower target_rank or raise fusion_ratio"
        if num_switches is not None:
            asked_by, remedy, count = "num_switches", "lower it", num_switches
        raise ValueError(f"srlora.{asked_by} asks for {count} switches in {length} steps: train longer, {remedy}")
    steps = [(k + 1) * length // count for k in range(count)]
    steps = [step for step in steps if step < num_training_steps]
    if count < wanted:
        warnings.warn(
            f"the default srlora.target_rank asks for {wanted} switches in {length} steps, and as many as fit are "
            f"made: {len(steps)}. Train longer for all of them, or set srlora.target_rank",
            stacklevel=2,
        )
    return steps


def window_length(setting: int | str, *decays: float) -> int | None:
    """Number of steps before a switch whose gradients are observed; None for all since the last switch.

    With ``auto`` all earlier steps weigh less than ``NEGLIGIBLE`` in either moving average. After N steps, whatever
    came before weighs b^N in the mean. In the deviation, which follows the mean, it weighs at most (1 + (1 - b) N) b^N.

    Args:
        setting: ``srlora.importance_window``.
        decays: Decays of the moving averages, b1 and b2.
    """
    if setting == "all":
        return None
    if setting != "auto":
        return int(setting)
    b = max(decays)
    return 1 + bisect_left(range(1, 10**12), True, key=lambda n: (1 + (1 - b) * n) * b**n <= NEGLIGIBLE)


def choose_slots(scores: Tensor, count: int, ages: list[int], choose: str = "lowest", grace: int = 0) -> list[int]:
    """Eq. 8: the slots that a switch fuses, sorted.

    Args:
        scores: (r,), one score per slot.
        count: Number of slots to choose.
        ages: For each slot the number of intervals between switches that its pair has lived.
        choose: ``lowest`` takes those of the lowest scores, ``highest`` of the highest, ``oldest`` those of the highest
            age and among them of the lowest scores. Of equals the lower slot goes first.
        grace: A pair that has lived fewer intervals is chosen only where there are not enough others.
    """
    values = scores.tolist()
    keys = {"lowest": lambda k: values[k], "highest": lambda k: -values[k], "oldest": lambda k: (-ages[k], values[k])}
    order = sorted(range(len(values)), key=lambda k: (ages[k] < grace, keys[choose](k), k))
    return sorted(order[:count])


def clamp_target_ranks(sites: list[Site], target_rank: int) -> None:
    """Set each site's target rank, at most min(m, n); one warning lists the sites where it had to be lowered.

    Raises:
        ValueError: The target is below the rank of a site, which may be that of an adapter that was exported.
    """
    too_large = [site for site in sites if target_rank < site.rank]
    low = [f"{site.name} (r={site.rank})" for site in too_large]
    if any(is_used(site.lora_b) for site in too_large):  # an exported adapter, of several times the rank
        raise used_adapter_error(shorten_list(low))
    if low:
        raise ValueError(
            f"srlora.target_rank {target_rank} is below the LoRA rank of {shorten_list(low)}: raise it, or lower r "
            "(lora.rank)"
        )
    clamped = []
    for site in sites:
        site.state.target_rank = site.state.num_starts = min(target_rank, *site.shape)
        if site.state.target_rank < target_rank:
            clamped.append(f"{site.name} {site.shape}: {site.state.target_rank}")
    if clamped:
        warnings.warn(
            f"srlora.target_rank {target_rank} is more than these matrices hold, clamped: {'; '.join(clamped)}",
            stacklevel=3,
        )


def share_out_directions_(sites: list[Site], config: SRLoRAConfig) -> None:
    """Set the target rank of each site, and the number of pairs that it may start.

    Raises:
        ValueError: The target is below the rank of a site.
    """
    clamp_target_ranks(sites, config.num_directions)
    num_switches = config.num_switches
    if num_switches is None:
        num_switches = count_switches(((site.rank, site.state.target_rank) for site in sites), config.fusion_ratio)
    for site in sites:
        # A matrix with fewer directions than the site has pairs has none to begin again with.
        if config.exhausted != "stop" and site.state.target_rank >= site.rank:
            in_all = site.rank + num_switches * num_fused(site.rank, config.fusion_ratio)
            site.state.num_starts = max(site.state.num_starts, in_all)


def plan_switches(sites: list[Site], config: SRLoRAConfig, num_training_steps: int) -> list[int]:
    """Eq. 14: the optimizer steps after which a switch is due. A short run gets fewer if no target rank was set.

    Raises:
        ValueError: There are more switches than steps.
    """
    ranks = [(site.rank, site.state.target_rank) for site in sites]
    num_switches, most = config.num_switches, count_switches(ranks, config.fusion_ratio)
    goes_on = any(site.state.num_starts > site.state.target_rank for site in sites)
    if num_switches is not None and num_switches > most and not goes_on:
        warnings.warn(
            f"srlora.num_switches is {num_switches}, but the directions of srlora.target_rank {config.num_directions} "
            f"are used up by {most}, so there are no more: raise target_rank, or set srlora.exhausted to wrap or renew",
            stacklevel=4,
        )
        num_switches = most
    more = config.switch_until, num_switches, config.target_rank is None
    return due_steps(num_training_steps, ranks, config.fusion_ratio, *more)


def num_next(site: Site, fusion_ratio: float) -> int:
    """Number of pairs that the next switch fuses at a site."""
    state = site.state
    if state.num_starts > state.target_rank:  # it goes on
        return num_fused(site.rank, fusion_ratio)
    return num_to_fuse(site.rank, state.target_rank, state.num_taken, fusion_ratio)


def next_directions(site: Site, slots: list[int], exhausted: str) -> tuple[list[int], int]:
    """Choose the directions for the new pairs in these slots; also gives the site's ``num_taken`` afterwards.

    Args:
        site: The site before it starts them.
        slots: Slots whose pairs are fused, so that their directions are free.
        exhausted: ``srlora.exhausted``. With ``wrap`` the numbers begin again at 0, without those of pairs that stay.
            With ``renew``, once too few are left below ``target_rank``, all that a switch needs are counted from there.
    """
    count, first, target = len(slots), site.state.num_taken, site.state.target_rank
    if exhausted == "wrap":
        staying = {direction for slot, direction in enumerate(site.state.held) if slot not in slots}
        found: list[int] = []
        while len(found) < count:
            found += [first % target] if first % target not in staying else []
            first += 1
        return found, first
    if exhausted == "renew" and first + count > target:
        first = max(first, target)
    return list(range(first, first + count)), first + count
