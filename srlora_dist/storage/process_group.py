"""Sets up the process group after a restart, finds lost ranks, and tries a process group on this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist

WAIT_SECONDS = 3.0
"""How long the ranks that are left may take to notice a failure."""


def rejoin(device: str, timeout: timedelta) -> None:
    """Set up the process group after a restart (``accelerate launch --max_restarts``). Does nothing at the first start.

    The launcher keeps its store over a restart, and with torch 2.13 the ranks would read the addresses of the ended
    processes from it. So each restart uses keys of its own in the store.

    Args:
        device: ``cpu``, ``cuda`` and so on; it decides the backend.
        timeout: How long a rank waits for the others.

    Collective: every rank must call it.

    Raises:
        RuntimeError: The ranks did not find each other in that time.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or dist.is_initialized():
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        store=dist.PrefixStore(f"srlora_dist/restart_{attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timeout,
    )


def lost_ranks() -> list[int]:
    """The ranks that no longer answer; none if there is no process group.

    Collectives do not work after a failure, so each rank that calls this leaves a mark in the launcher's store, which
    outlives the ranks.
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


def try_process_group(num_processes: int, timeout: float) -> str | None:
    """Start processes on this machine and let them add up a number.

    Args:
        num_processes: Number of processes, each on a GPU; without GPUs, all on the CPU with gloo.
        timeout: Seconds for the whole attempt.

    Returns:
        A description of the failure, or None.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The processes run this file alone, because importing the package takes seconds.
    command, end = [sys.executable, __file__, str(num_processes), str(port), str(timeout)], time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        printed = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(num_processes)]
        processes = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.DEVNULL, stderr=file)
            for rank, file in enumerate(printed)
        ]
        try:
            # Stop at the first failure: the other processes would wait for it.
            while None in (statuses := [process.poll() for process in processes]) and not any(statuses):
                if time.monotonic() > end:
                    return f"{num_processes} processes did not come together in {timeout:g} s"
                time.sleep(0.05)
            failed = [rank for rank, status in enumerate(statuses) if status]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if not failed:
            return None
        printed[failed[0]].seek(0)
        return (printed[failed[0]].read().strip().splitlines() or ["it ended without a message"])[-1]


def _add_up(num_processes: int, port: int, timeout: float, rank: int) -> None:
    """Join the process group and add up a number; run by each process. Collective: one all-reduce of a number."""
    on_gpu = torch.accelerator.is_available()
    if on_gpu:
        torch.accelerator.set_device_index(rank)
    device = torch.accelerator.current_accelerator().type if on_gpu else "cpu"
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=num_processes,
        timeout=timedelta(seconds=timeout),
    )
    total = torch.tensor([rank + 1.0], device=device)
    dist.all_reduce(total)
    if total.item() != num_processes * (num_processes + 1) / 2:
        raise RuntimeError(f"the sum over {num_processes} processes is {total.item()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    _add_up(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
