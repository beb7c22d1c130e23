"""Keeps a copy of everything that a switch changes, so that it can be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from srlora_dist.layers.site import PAIR_DIM
from srlora_dist.method.statistics import PairStatistics
from srlora_dist.storage.base import Storage


@torch.no_grad()
def take_snapshot(storage: Storage, statistics: PairStatistics | None) -> Callable[[], None]:
    """Copy all that a switch changes on this rank into host memory.

    Args:
        storage: How the ranks hold the sites.
        statistics: Statistics of the pairs; None where nothing is tracked.

    Returns:
        A function that puts everything back.

    Collective: under ZeRO-3 and FSDP2 an all-reduce of the factors, here and not when they are put back.
    """
    storage.to_rest_layout_()
    factors = [
        (parameter, PAIR_DIM[name], whole.clone())
        for site in storage.sites
        for name, parameter in (("A", site.lora_a), ("B", site.lora_b), ("A", site.fused_a), ("B", site.fused_b))
        if parameter is not None
        for whole in storage.gather_parameters([parameter])
    ]
    states = [site.state.copy() for site in storage.sites]
    kept = [
        [view.to("cpu", copy=True) for view in _changed_tensors(storage, statistics, number)]
        for number in range(len(storage.sites))
    ]

    @torch.no_grad()
    def put_back() -> None:
        storage.to_rest_layout_()
        for number, copies in enumerate(kept):
            for view, copy in zip(_changed_tensors(storage, statistics, number), copies, strict=True):
                view.copy_(copy)
        for parameter, pair_dim, whole in factors:
            storage.write_parameter_(parameter, pair_dim, torch.arange(whole.shape[pair_dim]), whole)
        for site, before in zip(storage.sites, states, strict=True):
            site.state = before

    return put_back


def _changed_tensors(storage: Storage, statistics: PairStatistics | None, number: int) -> Iterator[Tensor]:
    """What a switch changes in place at one site, beside its factors; valid until the next one is asked for."""
    with storage.changed_by_switch(number) as views:
        yield from views
        yield from statistics.of_site(number) if statistics is not None else ()
