"""Computes which span of a flattened tensor a rank holds on each engine, for storages and for plans."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import prod
from typing import NamedTuple


class Span(NamedTuple):
    """A contiguous stretch of a row-major flattened tensor, in elements.

    Args:
        start: Offset of its first element.
        numel: Length, perhaps 0.
    """

    start: int
    numel: int


def whole(numel: int) -> Span:
    """The whole tensor on every rank: one process, DDP, and the model's parameters under ZeRO-1 and ZeRO-2."""
    return Span(0, numel)


def longest_padded(numel: int, world_size: int) -> int:
    """ZeRO-3: elements that every rank allocates for its span of a parameter, padding included."""
    return -(-numel // world_size)


def padded(numel: int, world_size: int, rank: int) -> Span:
    """ZeRO-3: equal spans of the flattened parameter; the last ones end with it, so padding is left out."""
    return _cut(numel, longest_padded(numel, world_size), rank)


def longest_rows(shape: Sequence[int], world_size: int) -> int:
    """FSDP2: elements of the most rows that a rank holds of a parameter."""
    return -(-shape[0] // world_size) * prod(shape[1:])


def rows(shape: Sequence[int], world_size: int, rank: int) -> Span:
    """FSDP2: whole rows, split as torch.chunk does: the first ranks get equal numbers, the last ones may get none."""
    return _cut(prod(shape), longest_rows(shape, world_size), rank)


def fragment(offset: int, numel: int, fragment_numel: int, rank: int) -> Span:
    """ZeRO-1 and ZeRO-2: the part of a parameter that falls into a rank's fragment of the flat buffer of a group.

    Args:
        offset: Offset of the parameter in the buffer.
        numel: Number of elements of the parameter.
        fragment_numel: Length of each rank's fragment, padding included.
        rank: The rank.
    """
    begin = rank * fragment_numel
    start = min(max(0, begin - offset), numel)
    stop = max(start, min(numel, begin + fragment_numel - offset))
    return Span(start, stop - start)


def fragment_numel(sizes: Sequence[int], world_size: int) -> int:
    """ZeRO-1 and ZeRO-2: the length of a fragment of the buffer in which DeepSpeed lays parameters end to end.

    DeepSpeed pads the buffer to a multiple of two elements per rank (``nccl_start_alignment_factor`` in its
    stage_1_and_2.py).
    """
    return 2 * -(-sum(sizes) // (2 * world_size))


def deal_by_size(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """DDP: the rank that each item goes to, largest first, each to the rank with the least so far."""
    loads = [(0, rank) for rank in range(num_ranks)]  # a heap
    ranks = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, rank = loads[0]
        ranks[item] = rank
        heapq.heapreplace(loads, (load + sizes[item], rank))
    return ranks


def _cut(numel: int, longest: int, rank: int) -> Span:
    start = min(longest * rank, numel)
    return Span(start, min(longest, numel - start))
