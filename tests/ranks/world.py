"""Real ranks (gloo processes) for tests: started once for each world size, given one job after the other.

All of them are forked from one process that has imported what they need (preload.py), which takes seconds. A job that
hangs or raises on any rank is a failure with a message; its world is then killed and a later job starts a new one.
"""

from __future__ import annotations

import atexit
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_worlds: dict[int, World] = {}


def run_ranks(
    function: Callable[..., dict], world_size: int, *args: object, timeout: float = 120, last: bool = False
) -> list[dict]:
    """Run ``function(rank, world_size, *args)`` on ``world_size`` gloo ranks and return their results in rank order.

    ``last`` ends the world after the job, which may have left settings behind in the process.

    Raises:
        TimeoutError: Some rank was still running after ``timeout`` seconds.
        RuntimeError: A rank raised; the message holds its traceback.
    """
    if world_size not in _worlds:
        _worlds[world_size] = World(world_size)
    try:
        return _worlds[world_size].run(function, args, timeout)
    except BaseException:
        last = True
        raise
    finally:
        if last:
            _worlds.pop(world_size).kill()


@atexit.register
def _kill_all() -> None:
    for world in _worlds.values():
        world.kill()


class World:
    """``world_size`` processes that share a process group and wait for jobs."""

    def __init__(self, world_size: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.ranks.preload"])
        self.jobs = [context.Queue() for _ in range(world_size)]
        self.done = context.Queue()
        self.processes = [
            context.Process(target=_rank, args=(rank, world_size, self.folder.name, jobs, self.done), daemon=True)
            for rank, jobs in enumerate(self.jobs)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., dict], args: tuple, timeout: float) -> list[dict]:
        for jobs in self.jobs:
            jobs.put((function, args))
        end = time.monotonic() + timeout
        for _ in self.processes:
            try:
                rank, error = self.done.get(timeout=max(0.1, end - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"{function.__name__} did not end on all ranks within {timeout} s") from None
            if error:
                raise RuntimeError(f"rank {rank} raised in {function.__name__}:\n{error}")
        paths = [Path(self.folder.name) / f"{rank}.pt" for rank in range(len(self.processes))]
        return [torch.load(path, weights_only=True) for path in paths]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _rank(rank: int, world_size: int, folder: str, jobs: mp.Queue, done: mp.Queue) -> None:
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in sizes.items()})
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    while True:
        function, args = jobs.get()
        error = ""
        try:
            torch.save(function(rank, world_size, *args), Path(folder) / f"{rank}.pt")
        except BaseException:
            error = traceback.format_exc()
        done.put((rank, error))
