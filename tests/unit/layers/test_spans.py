"""The runs of all ranks, by the functions that storages and plans share, cover every tensor once."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import pytest
import torch

from srlora_dist.layers.spans import Span, fragment, fragment_numel, longest_padded, longest_rows, padded, rows, whole

SHAPES = [(16, 8192), (8192, 16), (1024, 16), (16, 28672), (1023, 7), (1025, 1), (3, 3), (1, 1), (5,), (8192,)]


def tile(spans: Iterable[Span], numel: int) -> None:
    stop = 0
    for span in spans:
        assert span.numel >= 0
        assert span.start == (stop if span.numel else span.start)
        stop += span.numel
    assert stop == numel


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 1000, 1024])
def test_spans_tile_every_tensor(world_size: int) -> None:
    for shape in SHAPES:
        numel = prod(shape)
        tile((padded(numel, world_size, rank) for rank in range(world_size)), numel)
        tile((rows(shape, world_size, rank) for rank in range(world_size)), numel)
        assert padded(numel, world_size, 0).numel == longest_padded(numel, world_size)
        assert rows(shape, world_size, 0).numel == longest_rows(shape, world_size)
        assert whole(numel) == (0, numel)


@pytest.mark.parametrize("world_size", [1, 2, 3, 1024])
def test_fragments_tile_every_parameter_of_the_buffer(world_size: int) -> None:
    sizes, offset = [prod(shape) for shape in SHAPES], 0
    length = fragment_numel(sizes, world_size)
    assert sum(sizes) <= length * world_size < sum(sizes) + 2 * world_size
    for size in sizes:
        tile((fragment(offset, size, length, rank) for rank in range(world_size)), size)
        offset += size


def test_rows_are_those_of_torch_chunk() -> None:
    for shape in SHAPES:
        whole_one = torch.arange(prod(shape)).view(shape)
        for world_size in (2, 3, 4, 1024):
            parts = whole_one.chunk(world_size)
            for rank in range(world_size):
                span = rows(shape, world_size, rank)
                mine = parts[rank].flatten() if rank < len(parts) else whole_one.flatten()[:0]
                assert torch.equal(whole_one.flatten()[span.start : span.start + span.numel], mine)
