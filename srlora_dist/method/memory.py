"""Counts, before the first step, the memory that SRLoRA needs beside plain LoRA training."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from srlora_dist.checkpoint.ledger import Ledger
from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.layers.site import Site
from srlora_dist.method.budget import num_fused
from srlora_dist.method.statistics import PairStatistics
from srlora_dist.storage.base import Storage


@dataclass
class ExtraMemory:
    """Bytes that SRLoRA needs on this rank.

    Args:
        tracking: The statistics behind the scores.
        residual: The second terms of 16-bit weights.
        second_adapter: The frozen adapter that holds what is fused into quantised weights.
        ledger: The ledger on rank 0 at the end of the run; 0 where it is written to a folder.
        samples: The elements by which a change behind the Switcher's back is noticed.
        directions: What is held during a switch: next directions and gathered factors of a bucket of sites.
    """

    tracking: int
    residual: int
    second_adapter: int
    ledger: int
    samples: int
    directions: int

    def __str__(self) -> str:
        """For the log, in MiB."""
        held = {name.replace("_", " "): size / 2**20 for name, size in asdict(self).items()}
        for_a_moment = held.pop("directions")
        parts = ", ".join(f"{name} {size:.1f}" for name, size in held.items())
        return f"{sum(held.values()):.1f} MiB ({parts}), and {for_a_moment:.1f} MiB while it switches"


def count_extra_memory(
    storage: Storage,
    statistics: PairStatistics | None,
    ledger: Ledger | None,
    num_switches: int,
    config: SRLoRAConfig,
    buckets: list[list[int]],
    samples: int,
) -> ExtraMemory:
    """Count the extra memory from the sites and the schedule.

    Args:
        storage: How the sites are held, with residuals allocated.
        statistics: Statistics of the pairs; None where nothing is tracked.
        ledger: The ledger on rank 0; None elsewhere.
        num_switches: Number of switches that are planned after switch 0.
        config: Options.
        buckets: Indices of the sites that are switched together.
        samples: Bytes for the samples, see :class:`ExtraMemory`.
    """
    sites, in_memory = storage.sites, ledger is not None and ledger.folder is None
    with_second = [site for site in sites if site.fused_a is not None]
    return ExtraMemory(
        tracking=statistics.num_bytes if statistics is not None else 0,
        residual=sum(residual.nbytes for residual in storage.residuals.values()),
        second_adapter=sum(storage.held_bytes(f) for site in with_second for f in (site.fused_a, site.fused_b)),
        ledger=sum(ledger_bytes(site, num_switches, config) for site in sites) if in_memory else 0,
        samples=samples,
        directions=max(sum(switch_bytes(sites[number], storage.gathers) for number in bucket) for bucket in buckets),
    )


def ledger_bytes(site: Site, num_switches: int, config: SRLoRAConfig) -> int:
    """Bytes of a site's columns and rows in the ledger after switch 0 and this many others."""
    most = site.rank + num_switches * num_fused(site.rank, config.fusion_ratio)
    restarted = max(0, min(site.state.num_starts, most) - site.rank)
    pairs = restarted if config.start == "zero_b" else site.num_first + 2 * restarted
    return site.lora_a.element_size() * sum(site.shape) * pairs


def switch_bytes(site: Site, gathers: bool) -> int:
    """Bytes of a site in switch 0, the largest switch: its directions, and its factors where they are gathered."""
    directions = 4 * site.num_first * (sum(site.shape) + 1)
    return directions + (4 * site.num_factor_elements if gathers else 0)
