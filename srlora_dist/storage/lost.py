"""Finds out which ranks are gone when a collective has failed."""

from __future__ import annotations

import time

import torch.distributed as dist

WAIT_SECONDS = 3.0
"""So long a rank that is still there may need to notice the failure as well."""


def lost_ranks() -> list[int]:
    """The ranks that do not answer any more; none if there is no process group.

    Each rank that calls this leaves a mark in the launcher's store, which outlives the ranks: collectives do not work
    any more then.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    names = [f"srlora_dist/still_here/{rank}" for rank in range(dist.get_world_size())]
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(names[dist.get_rank()], "1")
        time.sleep(WAIT_SECONDS)
        return [rank for rank, name in enumerate(names) if not store.check([name])]
    except RuntimeError:  # the rank that kept the store is gone
        return [0]
