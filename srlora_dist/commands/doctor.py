"""``srlora doctor`` tries on this machine what a run needs, and prints what to fix."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from srlora_dist.arguments import Arguments
from srlora_dist.process import prepare_process

if TYPE_CHECKING:
    from srlora_dist.health import Found

GROUP_SECONDS = 120


def run(argv: list[str]) -> int:
    """Print each finding as it is made; gives 1 if something failed.

    Raises:
        ValueError: The command line or the Accelerate file cannot be read.
    """
    parser = Arguments("doctor", "Try on this machine what a run needs, and print what to fix.")
    parser.add_argument("--config_file", type=Path, help="try this Accelerate file, in place of ZeRO-2 and ZeRO-3")
    parser.add_argument("--quick", action="store_true", help="start no processes")
    options = parser.parse(argv)
    prepare_process()
    if options.config_file is not None:
        from srlora_dist.health.runs import num_launched

        num_launched(options.config_file)
    count = {"ok": 0, "warning": 0, "failed": 0}
    for found in _findings(options.config_file, options.quick):
        count[found.status] += 1
        print(f"{found.status:9}{found.what}", flush=True)
        if found.remedy:
            print(f"{'':9}-> {found.remedy}", flush=True)
    print(", ".join(f"{number} {status}" for status, number in count.items()))
    return 1 if count["failed"] else 0


def _findings(file: Path | None, quick: bool) -> Iterator[Found]:
    from srlora_dist.health.machine import check_compiler, check_devices, check_disks, check_quantisation
    from srlora_dist.health.packages import check_packages

    yield from check_packages()
    yield from check_devices()
    yield from check_compiler()
    yield from check_disks(Path.cwd())
    yield from check_quantisation()
    if not quick:
        yield from _process_findings(file)


def _process_findings(file: Path | None) -> Iterator[Found]:
    """A process group, and three steps on ZeRO-2 and ZeRO-3, or where DeepSpeed is not installed on DDP."""
    from importlib.util import find_spec

    import torch

    from srlora_dist.health import Found
    from srlora_dist.health.runs import try_run, write_files, write_launch_file
    from srlora_dist.storage import try_process_group

    # One GPU takes one process, and the CPU any number.
    num_processes = min(2, torch.accelerator.device_count()) if torch.accelerator.is_available() else 2
    problem = try_process_group(num_processes, GROUP_SECONDS)
    if problem is None:
        yield Found("ok", f"process group: {num_processes} processes on this machine add up a number")
    else:
        yield Found("failed", f"process group: {problem}", "see that processes may connect to 127.0.0.1")
    with tempfile.TemporaryDirectory(prefix="srlora-doctor-") as name:
        folder = Path(name)
        write_files(folder)
        if file is not None:
            yield try_run(folder, file, None)
            return
        without = ["ddp" if num_processes > 1 else "plain"]
        engines = ["zero2", "zero3"] if find_spec("deepspeed") is not None else without
        for engine in engines:
            yield try_run(folder, write_launch_file(folder, engine, num_processes), engine)
