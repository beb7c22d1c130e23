"""The harness itself: a hang and a failure on one rank are noticed, and the next job gets a new world."""

from __future__ import annotations

import time

import pytest
import torch

from tests.ranks.world import run_ranks


def hang(rank: int, world_size: int) -> dict:
    time.sleep(60 * rank)
    return {}


def fail(rank: int, world_size: int) -> dict:
    if rank == 1:
        raise KeyError("on rank 1")
    torch.distributed.barrier()  # would wait for ever
    return {}


def add(rank: int, world_size: int) -> dict:
    total = torch.tensor(rank + 1)
    torch.distributed.all_reduce(total)
    return {"total": int(total)}


def test_a_hang_and_a_failure_are_noticed() -> None:
    assert [seen["total"] for seen in run_ranks(add, 2)] == [3, 3]
    with pytest.raises(TimeoutError, match="hang did not end"):
        run_ranks(hang, 2, timeout=2)
    with pytest.raises(RuntimeError, match="rank 1 raised in fail(.|\n)*on rank 1"):
        run_ranks(fail, 2)
    assert [seen["total"] for seen in run_ranks(add, 2)] == [3, 3]
