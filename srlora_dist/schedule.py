"""When to switch and which pairs (Eq. 8, 13 and 14)."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Iterable

from torch import Tensor

NEGLIGIBLE = 1e-6
"""Share of a moving average that cannot move a score by more than a few roundings of float32."""


def num_fused(rank: int, fusion_ratio: float) -> int:
    """Eq. 13: pairs that one switch fuses at a site of this rank, r' = gamma r, at least one."""
    return max(1, round(fusion_ratio * rank))


def num_to_fuse(rank: int, target_rank: int, num_taken: int, fusion_ratio: float) -> int:
    """Pairs that the next switch fuses at a site: r', or what is left of its directions."""
    return min(num_fused(rank, fusion_ratio), target_rank - num_taken)


def count_switches(ranks: Iterable[tuple[int, int]], fusion_ratio: float) -> int:
    """Eq. 14's N_switch: how many use up the directions of all sites, each of a (rank, target rank)."""
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
        num_switches: How many there are, in place of those that the ranks ask for.
        may_be_fewer: Nobody has asked for the target ranks: where they ask for more switches than there are steps, make
            one after each step and warn.

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
    """Steps before a switch whose gradients are observed; None for all since the last one.

    With ``auto`` the steps before these weigh less than ``NEGLIGIBLE`` in either moving average: after N steps what was
    before weighs b^N in the mean, and in the deviation, which follows the mean, at most (1 + (1 - b) N) b^N.

    Args:
        setting: ``srlora.importance_window``.
        decays: Of the moving averages, b1 and b2.
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
        scores: (r,), one a slot.
        count: How many slots.
        ages: Intervals between switches that each slot's pair has lived.
        choose: ``lowest`` takes those of the lowest scores, ``highest`` of the highest, ``oldest`` those of the highest
            age and among them of the lowest scores. Of equals the lower slot goes first.
        grace: A pair that has lived fewer intervals is chosen only where there are not enough others.
    """
    values = scores.tolist()
    keys = {"lowest": lambda k: values[k], "highest": lambda k: -values[k], "oldest": lambda k: (-ages[k], values[k])}
    order = sorted(range(len(values)), key=lambda k: (ages[k] < grace, keys[choose](k), k))
    return sorted(order[:count])
