"""What the machine has: devices, a compiler, room on its disks, and 4-bit and 8-bit weights that work."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from srlora_dist.commands.doctor.found import Found
from srlora_dist.config.paths import cache_dir, require_writable
from srlora_dist.storage.capabilities import deepspeed_types, quantised_error

LEAST_SPACE, LEAST_SHARED = 5e9, 2.5e8
"""Bytes: of a disk for directions and checkpoints of a small model, and of the shared memory of several processes."""


def check_devices() -> Iterator[Found]:
    """The accelerators that torch sees."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        build = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        names = [f"{torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())] if kind == "cuda" else []
        yield Found("ok", f"{torch.accelerator.device_count()} x {kind} ({build}): {', '.join(names) or kind}")
        if kind == "cuda" and not torch.cuda.is_bf16_supported():
            yield Found("warning", "the device has no bfloat16", "use --model.dtype float16 or float32")
        return
    if shutil.which("nvidia-smi") or shutil.which("rocm-smi"):
        yield Found(
            "warning",
            f"there is a driver for GPUs, but torch {torch.__version__} sees none",
            "install the build of torch for it, see pytorch.org, and look at CUDA_VISIBLE_DEVICES",
        )
        return
    yield Found("ok", f"no GPU: {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads a process")


def check_compiler() -> Iterator[Found]:
    """DeepSpeed compiles an operator at its first start on a CPU, and its own optimizer where that is offloaded.

    With a GPU it does without a compiler, but for that optimizer.
    """
    if find_spec("deepspeed") is None:
        return
    compiler = (shlex.split(os.environ.get("CXX", "")) or ["c++"])[-1]  # behind ccache, for example
    lacking = "warning" if torch.accelerator.is_available() else "failed"
    for tool, remedy in (
        (compiler, "install a C++ compiler, such as Debian's g++"),
        ("ninja", "activate the environment, whose bin/ has it, or pip install ninja"),
    ):
        path = shutil.which(tool)
        yield Found("ok", f"{tool}: {path}") if path else Found(lacking, f"{tool} is not on the PATH", remedy)


def check_deepspeed_types() -> Iterator[Found]:
    """The 16-bit types in which DeepSpeed trains here; not every processor and GPU has both."""
    if find_spec("deepspeed") is None:
        return
    found = deepspeed_types()
    yield Found("ok", f"DeepSpeed trains in {', '.join(sorted(found, reverse=True))}")
    for dtype in sorted({"float16", "bfloat16"} - found):
        others = " or ".join(name for name in ("bfloat16", "float32") if name in found)
        yield Found("warning", f"DeepSpeed does not train in {dtype} on this device", f"use --model.dtype {others}")


def check_disks(folder: Path) -> Iterator[Found]:
    """The folder of directions, files in it, the folder of the run, and shared memory.

    Args:
        folder: Where the run would write.
    """
    try:
        directions = cache_dir() / "svd"
        require_writable(directions, "the folder of directions (srlora.svd_cache)")
        yield _space(directions, "directions", "set SRLORA_CACHE or srlora.svd_cache to another disk")
        yield from _files_of_directions(directions)
    except ValueError as error:
        yield Found("failed", str(error), "set SRLORA_CACHE to a folder that can be written")
    try:
        require_writable(folder, "the folder")
        yield _space(folder, "runs", "choose another --output_dir")
        yield _tensorboard(folder)
    except ValueError as error:
        yield Found("warning", str(error), "choose another --output_dir")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        small = free < LEAST_SHARED
        remedy = "give a container --ipc=host or --shm-size=1g" if small else ""
        yield Found("warning" if small else "ok", f"shared memory: {free / 1e9:.2f} GB free in {shared}", remedy)


def _space(folder: Path, use: str, remedy: str) -> Found:
    free = shutil.disk_usage(folder).free
    text = f"{use}: {folder} can be written, {free / 1e9:.1f} GB free"
    return Found("ok", text) if free > LEAST_SPACE else Found("warning", text, remedy)


def _files_of_directions(folder: Path) -> Iterator[Found]:
    """Headers alone: a run compares the content of the file that it takes with its digest."""
    sizes = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                if "digest" not in (file.metadata() or {}):
                    raise ValueError("it has no digest")
            sizes.append(path.stat().st_size)
        except (SafetensorError, OSError, ValueError) as error:
            yield Found("warning", f"{path} is damaged ({error})", "remove it: a run computes it again")
    if sizes:
        yield Found("ok", f"{len(sizes)} files of directions, {sum(sizes) / 1e6:.1f} MB")


def _tensorboard(folder: Path) -> Found:
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory(dir=folder) as inner:
        with SummaryWriter(inner) as writer:
            writer.add_scalar("doctor", 1.0, 0)
        return Found("ok", "TensorBoard writes its log")


def check_quantisation() -> Iterator[Found]:
    """Quantise and de-quantise a small weight, and compare a forward pass with the product of what came back."""
    if find_spec("bitsandbytes") is None:
        return  # check_packages has said so
    for kind, most in (("nf4", 0.15), ("int8", 0.02)):
        try:
            stored, forward = quantised_error(kind)
        except Exception as error:  # whatever a foreign library raises on this machine
            yield Found("failed", f"bitsandbytes {kind}: {error}", "pip install -U bitsandbytes, or train unquantised")
            continue
        good = stored < most and forward < most
        text = f"bitsandbytes {kind}: stored to {stored:.1%}, a forward pass agrees to {forward:.1e}"
        yield Found("ok", text) if good else Found("failed", text, "pip install -U bitsandbytes")
