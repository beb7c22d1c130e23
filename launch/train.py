"""Train one model: ``accelerate launch launch/train.py [--config FILE] [--section.option value ...]``.

Without arguments it runs the demo. ``--help`` lists the options; ``SRLORA_DEBUG=1`` shows where an error came from.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from pathlib import Path

# On a machine with other work, threads that spin while they wait made CPU training three times slower. Read at import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package may not be installed
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed decides when it is imported

IS_MAIN = os.environ.get("RANK", "0") == "0"
# Torch, Transformers and DeepSpeed announce each other's deprecations every step, through the progress bar. What the
# other ranks would warn of, the main process says too.
warnings.filterwarnings("ignore", category=FutureWarning if IS_MAIN else Warning)
logging.basicConfig(format="%(message)s")
logging.getLogger("srlora_dist").setLevel(logging.INFO if IS_MAIN else logging.ERROR)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it warns of a kernel that is not used

from srlora_dist.config import parse  # noqa: E402 (after the environment is set)
from srlora_dist.errors import STOPPED_BY_SIGNAL, RunStoppedError, StoppedBySignalError  # noqa: E402
from srlora_dist.storage import lost_ranks  # noqa: E402
from srlora_dist.trainer import train  # noqa: E402

# The launcher ends the other ranks within a moment of the main process, so that one message is enough.
GRACE_SECONDS = 5


def main() -> None:
    """Run, and report on the main process."""
    try:
        config = parse()
        summary = train(config)
    except StoppedBySignalError as stop:
        if IS_MAIN:
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
    if IS_MAIN:
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
    times = {name.removesuffix("_seconds"): value for name, value in summary.items() if name.endswith("_seconds")}
    print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in times.items()))
    if summary["checkpoint_bytes"] is not None:
        share = summary["checkpoint_bytes"] / summary["model_bytes"]
        print(f"checkpoint: {summary['checkpoint_bytes'] / 1e6:.1f} MB, {share:.1%} of the pretrained model")
    print(f"base: {summary['model']} in {summary['weights']}")
    for name, path in (("adapter", "adapter"), ("TensorBoard", "tensorboard"), ("figures", "figures")):
        print(f"{name}: {folder / path}")


if __name__ == "__main__":
    main()
