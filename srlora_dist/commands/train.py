"""``srlora train`` trains one model; ``accelerate launch -m srlora_dist train`` on several processes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from srlora_dist.engine.process import prepare_process, without_local_rank

# The launcher ends the other ranks within a moment of the main process, so that one message is enough.
GRACE_SECONDS = 5


def run(argv: list[str]) -> None:
    """Train, and report on the main process; without arguments the demo.

    What stops a run is one line, and the end of the process: status 1, or 75 where a signal asked for it and a
    checkpoint is written. ``SRLORA_DEBUG=1`` shows where an error came from.
    """
    is_main = prepare_process()
    from srlora_dist.config.parse import parse  # after the environment is set
    from srlora_dist.errors import STOPPED_BY_SIGNAL, RunStoppedError, StoppedBySignalError
    from srlora_dist.storage.process_group import lost_ranks
    from srlora_dist.training.run import train

    try:
        config = parse(without_local_rank(argv))
        summary = train(config)
    except StoppedBySignalError as stop:
        if is_main:
            print(f"srlora_dist: {stop}", file=sys.stderr)
        _leave(STOPPED_BY_SIGNAL)
    except (ValueError, OSError, RunStoppedError) as error:
        if os.environ.get("SRLORA_DEBUG"):
            raise
        _fail(str(error))
    except RuntimeError as error:
        lost = lost_ranks()
        if os.environ.get("SRLORA_DEBUG") or not lost:
            raise
        _fail(
            f"rank {', '.join(map(str, lost))} of {os.environ.get('WORLD_SIZE')} is gone or does not answer, so the "
            f"others end too; the same command goes on from the last checkpoint ({error})"
        )
    if is_main:
        _report(summary, Path(config.output_dir))


def _fail(message: str) -> None:
    """End this process with one line, which a rank other than 0 prints only if rank 0 has not failed as well."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(GRACE_SECONDS)
    where = "" if rank == "0" else f" (on rank {rank} of {os.environ.get('WORLD_SIZE')})"
    print(f"srlora_dist: error: {' '.join(message.split())}{where}", file=sys.stderr)
    _leave(1)


def _leave(status: int) -> None:
    """Not by sys.exit: leaving the interpreter can wait for ranks that are still in a collective."""
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(status)


def _report(summary: dict[str, object], folder: Path) -> None:
    """Print the results and where they are."""
    print(f"\n{summary['method']} on {summary['task']}: {summary['steps']} steps on {summary['world_size']} x", end=" ")
    print(f"{summary['storage']}, {summary['trainable_parameters']:,} trainable parameters")
    print(f"{'':8}{'best':>12}{'final':>12}")
    for name in summary["best"]:
        print(f"{name:8}{summary['best'][name]:12.4f}{summary['final'][name]:12.4f}")
    if summary["skipped_steps"]:
        print(f"skipped: {summary['skipped_steps']} of {summary['steps']} steps, whose gradient was NaN or infinite")
    for finding in summary["findings"]:
        print(f"noticed after step {finding['step']}: {finding['message']}")
    times = {name.removesuffix("_seconds"): value for name, value in summary.items() if name.endswith("_seconds")}
    print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in times.items()))
    if summary["checkpoint_bytes"] is not None:
        share = summary["checkpoint_bytes"] / summary["model_bytes"]
        print(f"checkpoint: {summary['checkpoint_bytes'] / 1e6:.1f} MB, {share:.1%} of the pretrained model")
    print(f"base: {summary['model']} in {summary['weights']}")
    for name, path in (("adapter", "adapter"), ("TensorBoard", "tensorboard"), ("figures", "figures")):
        print(f"{name}: {folder / path}")
