"""Runs ``srlora train`` on several ranks that are forked after the imports, and kills one of them where it is told to.

What ``accelerate launch`` would put into the environment comes from Accelerate's own functions. There is no launcher to
end the other ranks: whether they end by themselves is a part of the test.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
OF_DEEPSPEED = ("deepspeed", "deepspeed.module_inject.auto_ep_layer", "deepspeed.ops.op_builder.all_ops")
"""What its engines import when they are made."""
sys.path.insert(0, str(ROOT))

from tests.launch.one_by_one import leave_out_figures, load_main, run_case  # noqa: E402 (after the path is set)


@dataclass
class Order:
    """One start of a run.

    Args:
        yaml: File of launch/accelerate.
        world_size: Ranks.
        arguments: Of ``srlora train``.
        rank: The rank that is killed; None kills no one.
        seconds: After so many seconds from the start;
        place: or after a call of this function, ``module:name`` or ``module:Class.name``,
        call: the how manieth.
        signal: By this signal.
        code: Python that each rank runs first.
        figures: Whether the run draws its figures.
        limit: Seconds until all ranks must have ended.
    """

    yaml: str
    world_size: int
    arguments: list[str]
    rank: int | None = None
    seconds: float | None = None
    place: str | None = None
    call: int = 1
    signal: int = signal.SIGKILL
    code: str = ""
    figures: bool = False
    limit: float = 60


def launch_options(yaml: str, *flags: str) -> Namespace:
    """What ``accelerate launch --config_file ... [flags]`` makes of a file of launch/accelerate."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    file = str(ROOT / "launch" / "accelerate" / f"{yaml}.yaml")
    args = launch_command_parser().parse_args(["--config_file", file, *flags, "launch/train.py"])
    return _validate_launch_command(args)[0]


def launch_environment(yaml: str, *flags: str) -> dict[str, str]:
    """What ``accelerate launch --config_file ... [flags]`` puts into the environment of a process."""
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    args = launch_options(yaml, *flags)
    args.deepspeed_fields_from_accelerate_config = ""
    if args.use_deepspeed:
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args) if args.multi_gpu or args.use_fsdp else prepare_simple_launcher_cmd_env(args)[1]


def start(main: Callable[[list[str]], int], order: Order) -> dict[str, object]:
    """Fork the ranks, kill one, wait for the others; gives the exit statuses and what each printed on stderr."""
    shared = launch_environment(order.yaml) if order.world_size > 1 else {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    errors = [tempfile.TemporaryFile() for _ in range(order.world_size)]  # noqa: SIM115 (closed with the process)
    began = time.perf_counter()
    children = {_fork(main, order, rank, shared, errors[rank]): rank for rank in range(order.world_size)}
    statuses: dict[int, int] = {}
    while children and time.perf_counter() - began < order.limit:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        elif order.seconds is not None and time.perf_counter() - began >= order.seconds:
            for pid in [pid for pid, rank in children.items() if rank == order.rank]:
                os.kill(pid, order.signal)
            order.seconds = None
        else:
            time.sleep(0.005)
    seconds, hung = time.perf_counter() - began, sorted(children.values())
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    texts = []
    for file in errors:
        file.seek(0)
        texts.append(file.read().decode())
    return {"statuses": statuses, "stderr": texts, "seconds": seconds, "hung": hung}


def _fork(main: Callable[[list[str]], int], order: Order, rank: int, shared: dict[str, str], errors: object) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(errors.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.environ.update(shared)
        if order.world_size > 1:
            sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order.world_size}
            sizes["LOCAL_WORLD_SIZE"] = order.world_size
            os.environ.update({name: str(value) for name, value in sizes.items()})
        if not order.figures:
            leave_out_figures()
        if order.place is not None and rank == order.rank:
            _kill_at(order)
        exec(order.code, {})
        status = main(["train", *order.arguments])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _kill_at(order: Order) -> None:
    """Put a call of ``kill`` behind a function."""
    module, _, name = order.place.partition(":")
    *path, name = name.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(module))
    original, calls = getattr(owner, name), iter(range(1, sys.maxsize))

    @functools.wraps(original)
    def deadly(*args: object, **kwargs: object) -> object:
        result = original(*args, **kwargs)
        if next(calls) == order.call:
            os.kill(os.getpid(), order.signal)
        return result

    setattr(owner, name, deadly)


def serve(lines: Iterator[str]) -> None:
    """One order per line, or the cases of conftest.py; one result per line."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no result
    main = load_main()
    for module in OF_DEEPSPEED:
        importlib.import_module(module)
    for line in lines:
        order = json.loads(line)
        if "cases" in order:
            result = {name: run_case(main, **case) for name, case in order["cases"].items()}
        else:
            result = start(main, Order(**order))
        out.write(json.dumps(result) + "\n")
        out.flush()


if __name__ == "__main__":
    serve(iter(sys.stdin.readline, ""))
