"""What a process that runs a command sets before torch is imported, and which messages it shows."""

from __future__ import annotations

import logging
import os
import warnings

STARTED = os.getpid(), os.getppid()
"""This process and its parent, before the seconds of imports."""


def parent_is_gone() -> bool:
    """Whether the parent that this process was started by has ended."""
    process, parent = STARTED
    return os.getpid() == process and os.getppid() != parent  # a fork has another parent


def launched_by_deepspeed() -> bool:
    """Whether the command ``deepspeed`` has started this process; it leaves these three in the environment."""
    return {"CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE"} <= {*os.environ}


def without_local_rank(argv: list[str]) -> list[str]:
    """The command line without what ``deepspeed`` and the old ``torch.distributed.launch`` put in front of it."""
    added = argv[:1] and argv[0].startswith(("--local_rank=", "--local-rank=")) and "RANK" in os.environ
    return argv[1:] if added else argv


def prepare_process() -> bool:
    """Set what torch and DeepSpeed read when they are imported, and leave the messages to the main process.

    Returns:
        Whether this is the main process of its launch.
    """
    # On a machine with other work, threads that spin while they wait made CPU training three times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    is_main = os.environ.get("RANK", "0") == "0"
    # Torch, Transformers and DeepSpeed announce each other's deprecations every step, through the progress bar. What
    # the other ranks would warn of, the main process says too.
    warnings.filterwarnings("ignore", category=FutureWarning if is_main else Warning)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("srlora_dist").setLevel(logging.INFO if is_main else logging.ERROR)
    # PEFT imports it, and it warns of a kernel that is not used.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return is_main
