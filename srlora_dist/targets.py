"""How many directions each site uses, and which of them come next."""

from __future__ import annotations

import warnings

from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.errors import shorten_list
from srlora_dist.layers.adapter import is_used, used_adapter_error
from srlora_dist.layers.site import Site
from srlora_dist.schedule import count_switches, due_steps, num_fused, num_to_fuse


def clamp_target_ranks(sites: list[Site], target_rank: int) -> None:
    """Set each site's target rank, at most min(m, n), with one warning that lists the sites where that is less.

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
        site.target_rank = site.num_starts = min(target_rank, *site.shape)
        if site.target_rank < target_rank:
            clamped.append(f"{site.name} {site.shape}: {site.target_rank}")
    if clamped:
        warnings.warn(
            f"srlora.target_rank {target_rank} is more than these matrices hold, clamped: {'; '.join(clamped)}",
            stacklevel=3,
        )


def share_out_directions_(sites: list[Site], config: SRLoRAConfig) -> None:
    """Set each site's target rank, and how many pairs it may start.

    Raises:
        ValueError: The target is below the rank of a site.
    """
    clamp_target_ranks(sites, config.num_directions)
    num_switches = config.num_switches
    if num_switches is None:
        num_switches = count_switches(((site.rank, site.target_rank) for site in sites), config.fusion_ratio)
    for site in sites:
        # A matrix with fewer directions than the site has pairs has none to begin again with.
        if config.exhausted != "stop" and site.target_rank >= site.rank:
            in_all = site.rank + num_switches * num_fused(site.rank, config.fusion_ratio)
            site.num_starts = max(site.num_starts, in_all)


def plan_switches(sites: list[Site], config: SRLoRAConfig, num_training_steps: int) -> list[int]:
    """Eq. 14: the optimizer steps after which a switch is due; in a short run fewer, where no target rank was set.

    Raises:
        ValueError: There are more switches than steps.
    """
    ranks = [(site.rank, site.target_rank) for site in sites]
    num_switches, most = config.num_switches, count_switches(ranks, config.fusion_ratio)
    goes_on = any(site.num_starts > site.target_rank for site in sites)
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
    """Pairs that the next switch fuses at a site."""
    if site.num_starts > site.target_rank:  # it goes on
        return num_fused(site.rank, fusion_ratio)
    return num_to_fuse(site.rank, site.target_rank, site.num_taken, fusion_ratio)


def next_directions(site: Site, slots: list[int], exhausted: str) -> tuple[list[int], int]:
    """The directions that pairs in these slots are started along, and the site's ``num_taken`` after that.

    Args:
        site: Before it starts them.
        slots: Whose pairs are fused, so that their directions are free.
        exhausted: ``srlora.exhausted``. With ``wrap`` the numbers begin again at 0, without those of pairs that stay.
            With ``renew`` all that a switch needs have numbers from ``target_rank`` on once too few are left below.
    """
    count, first, target = len(slots), site.num_taken, site.target_rank
    if exhausted == "wrap":
        staying = {direction for slot, direction in enumerate(site.held) if slot not in slots}
        found: list[int] = []
        while len(found) < count:
            found += [first % target] if first % target not in staying else []
            first += 1
        return found, first
    if exhausted == "renew" and first + count > target:
        first = max(first, target)
    return list(range(first, first + count)), first + count
