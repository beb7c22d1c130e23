"""``srlora doctor`` tries on this machine what a run needs, and prints what to fix."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

from srlora_dist.commands.arguments import Arguments
from srlora_dist.commands.doctor.found import Found
from srlora_dist.engine.process import prepare_process

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
    if options.config_file is not None:
        from srlora_dist.commands.doctor.launch_file import num_launched

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
    # The packages come first: what the others import may be missing or of a version that cannot be imported.
    yield from _tried("packages", lambda: _packages().check_packages())
    yield from _tried("torch", _prepare)
    yield from _tried("libraries", _import_libraries)
    yield from _tried("devices", lambda: _machine().check_devices())
    yield from _tried("compiler", lambda: _machine().check_compiler())
    yield from _tried("DeepSpeed", lambda: _machine().check_deepspeed_types())
    yield from _tried("disks", lambda: _machine().check_disks(Path.cwd()))
    yield from _tried("bitsandbytes", lambda: _machine().check_quantisation())
    if not quick:
        yield from _tried("process group", _process_group)
        yield from _tried("three steps", lambda: _three_steps(file))


def _tried(name: str, check: Callable[[], Iterable[Found]]) -> Iterator[Found]:
    """What a check finds; it has failed if it raises whatever a package or a driver raises on this machine."""
    try:
        yield from check()
    except Exception as error:
        if os.environ.get("SRLORA_DEBUG"):
            raise
        reason = (str(error).strip().splitlines() or ["without a message"])[0]
        remedy = "fix what failed above, or that; SRLORA_DEBUG=1 shows where it came from"
        yield Found("failed", f"{name}: {type(error).__name__}: {reason}", remedy)


def _packages() -> ModuleType:
    from srlora_dist.commands.doctor import packages

    return packages


def _machine() -> ModuleType:
    from srlora_dist.commands.doctor import machine  # fails where torch cannot be imported, which is a finding

    return machine


def _prepare() -> Iterable[Found]:
    prepare_process()
    return ()


def _import_libraries() -> Iterable[Found]:
    import accelerate  # noqa: F401 (whether it can be imported)
    import peft  # noqa: F401
    import transformers  # noqa: F401

    return ()


def _num_processes() -> int:
    """One GPU takes one process, and the CPU any number."""
    import torch

    return min(2, torch.accelerator.device_count()) if torch.accelerator.is_available() else 2


def _process_group() -> Iterator[Found]:
    from srlora_dist.storage.process_group import try_process_group

    num_processes = _num_processes()
    problem = try_process_group(num_processes, GROUP_SECONDS)
    if problem is None:
        yield Found("ok", f"process group: {num_processes} processes on this machine add up a number")
    else:
        yield Found("failed", f"process group: {problem}", "see that processes may connect to 127.0.0.1")


def _three_steps(file: Path | None) -> Iterator[Found]:
    """On the given engine, or on ZeRO-2 and ZeRO-3, or where DeepSpeed is not installed on DDP."""
    from importlib.util import find_spec

    from srlora_dist.commands.doctor.runs import try_run, write_files, write_launch_file

    num_processes = _num_processes()
    with tempfile.TemporaryDirectory(prefix="srlora-doctor-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_files(folder)
        if file is not None:
            yield try_run(folder, file, None)
            return
        without = ["ddp" if num_processes > 1 else "plain"]
        engines = ["zero2", "zero3"] if find_spec("deepspeed") is not None else without
        for engine in engines:
            yield try_run(folder, write_launch_file(folder, engine, num_processes), engine)
