"""The process group before and after a run uses it: tried out, joined again, and which of its ranks are lost."""

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


def try_process_group(num_processes: int, timeout: float) -> str | None:
    """Start processes on this machine, and add up a number over them.

    Args:
        num_processes: On as many GPUs, or without GPUs on the CPU with gloo.
        timeout: Seconds for all of it.

    Returns:
        What went wrong, or None.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # This file alone, without the package and its seconds of imports.
    command, end = [sys.executable, __file__, str(num_processes), str(port), str(timeout)], time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        printed = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(num_processes)]
        processes = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.DEVNULL, stderr=file)
            for rank, file in enumerate(printed)
        ]
        try:
            # Those that are left would wait for one that has failed.
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
    """What a process does. Collective: an all-reduce of a number."""
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


def deepspeed_types() -> set[str]:
    """The types in which DeepSpeed trains on this device, by the names of ``model.dtype``.

    Processors differ: float16 needs instructions that most of them lack, and bfloat16 is missing on old GPUs.
    """
    from deepspeed.accelerator import get_accelerator

    device, found = get_accelerator(), {"float32"}
    found |= {"float16"} if device.is_fp16_supported() else set()
    return found | ({"bfloat16"} if device.is_bf16_supported() else set())


def quantised_error(kind: str) -> tuple[float, float]:
    """Quantise a small linear layer with bitsandbytes and call it.

    Args:
        kind: ``nf4`` or ``int8``.

    Returns:
        Relative errors: of the weight that comes back, and of the call against the product with that weight.
    """
    import bitsandbytes as bnb

    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 128, generator=generator), torch.randn(8, 128, generator=generator).to(device)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False)
        layer = layer.to(device)
        back = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).float()
    else:
        layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type=kind, compute_dtype=torch.float32)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, module=layer)
        layer = layer.to(device)
        back = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    called, product = layer.train()(x).float(), x @ back.T
    stored = (back.cpu() - weight).norm() / weight.norm()
    return stored.item(), ((called - product).norm() / product.norm()).item()


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


if __name__ == "__main__":
    _add_up(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
