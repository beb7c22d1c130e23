"""Lets the ranks of a launch that was restarted find each other."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist


def rejoin(device: str, timeout: timedelta) -> None:
    """Set up the process group of a restart (``accelerate launch --max_restarts``); at the first start do nothing.

    The launcher keeps its store over a restart, and with torch 2.13 the ranks would read the addresses of those that
    are gone from it. So each restart has names of its own in the store.

    Args:
        device: ``cpu``, ``cuda`` and so on; decides by what the ranks talk.
        timeout: For a rank that waits for the others.

    Collective: every rank must call it.

    Raises:
        RuntimeError: The ranks did not come together in that time.
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
