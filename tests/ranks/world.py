"""Starts real ranks (gloo processes) for a test and brings their results back; a hang is a failure with a message."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., dict], world_size: int, *args: object, timeout: float = 120) -> list[dict]:
    """Run ``function(rank, world_size, *args)`` on ``world_size`` gloo ranks and return their results in rank order.

    Raises:
        TimeoutError: Some rank was still running after ``timeout`` seconds.
        torch.multiprocessing.ProcessRaisedException: A rank raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _rank, (function, world_size, folder, args), nprocs=world_size, join=False, start_method="spawn"
        )
        end = time.monotonic() + timeout
        while not context.join(timeout=1):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} on {world_size} ranks did not end within {timeout} s")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _rank(rank: int, function: Callable[..., dict], world_size: int, folder: str, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        torch.save(function(rank, world_size, *args), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
