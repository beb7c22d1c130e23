"""The DeepSpeed file of a launch: read, checked, and its ``"auto"`` filled in from the options of the run."""

from __future__ import annotations

import copy
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from srlora_dist.config.run import RunConfig
from srlora_dist.storage.zero3 import require_async_io

NVME_PATH = "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH"
"""Where Accelerate looks for an ``nvme_path`` that is ``"auto"`` in the file; it has no option that sets it."""


def read_settings() -> dict[str, object]:
    """The content of the DeepSpeed file; empty where the launch names none.

    Raises:
        ValueError: It cannot be read, or is not what DeepSpeed wants.
    """
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        return {}
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"deepspeed_config_file {path} cannot be read ({error}): start from the root of the repository"
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(f"deepspeed_config_file {path} is not a JSON object: see ds_configs for examples")
    for section in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(settings.get(section, {}), dict):
            raise ValueError(
                f"deepspeed_config_file {path} has {section} {json.dumps(settings[section])}, where DeepSpeed wants an "
                "object: see ds_configs for examples"
            )
    return settings


def zero_stage(settings: dict[str, object]) -> int:
    """The stage in the DeepSpeed file, or without one that on the command line of ``accelerate launch``.

    Raises:
        ValueError: There is no such stage, or the file names none.
    """
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if settings:
        stage = settings.get("zero_optimization", {}).get("stage")
    if str(stage) not in ("0", "1", "2", "3"):
        raise ValueError(f"DeepSpeed ZeRO stage {stage} is not supported: choose 0, 1, 2 or 3, see ds_configs")
    return int(stage)


def fill_auto(settings: dict[str, object], config: RunConfig, num_processes: int) -> dict[str, object]:
    """The settings with our batch size, accumulation and clipping, and what depends on the machine.

    Accelerate would clip at 1.0 whatever we ask for.

    Args:
        settings: Settings of the file, or as Accelerate made them; they are not changed.
        config: The run.
        num_processes: Processes of all nodes together.

    Raises:
        ValueError: They contradict the options of the run.
    """
    settings, train = copy.deepcopy(settings), config.train
    micro_batch_size = train.batch_size // train.accumulation_steps // num_processes
    for key, option, value in (
        ("train_batch_size", "train.batch_size", train.batch_size),
        ("train_micro_batch_size_per_gpu", "the share of train.batch_size of a rank", micro_batch_size),
        ("gradient_accumulation_steps", "train.accumulation_steps", train.accumulation_steps),
        ("gradient_clipping", "train.max_grad_norm", train.max_grad_norm),
    ):
        theirs = settings.get(key, "auto")
        if theirs not in ("auto", value):
            raise ValueError(
                f"the DeepSpeed configuration has {key} {theirs}, but {option} is {value}: "
                f'set {key} to "auto" or make them equal'
            )
        settings[key] = value
    if train.optimizer != "adamw":
        settings["zero_force_ds_cpu_optimizer"] = False  # with offload Accelerate makes Adam of any optimizer
    zero = settings.get("zero_optimization", {})
    if zero.get("zero_hpz_partition_size") == "auto":
        zero["zero_hpz_partition_size"] = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    return settings


def compiled_operators(settings: dict[str, object]) -> list[str]:
    """Operators that DeepSpeed compiles for such a run when they are first used, by the names of their folders."""
    zero = settings.get("zero_optimization", {})
    devices = {(zero.get(f"offload_{what}") or {}).get("device", "none") for what in ("optimizer", "param")}
    operators = ["deepspeed_shm_comm"]
    if devices != {"none"}:
        operators += ["cpu_adam", "pin_memory"]
    return operators + ["async_io"] * ("nvme" in devices)


def require_nvme(settings: dict[str, object]) -> None:
    """Stop where parameters are to go to an NVMe disk that is not there or that DeepSpeed cannot use.

    Raises:
        ValueError: No folder is named, it cannot be written, or libaio is missing.
    """
    place = settings.get("zero_optimization", {}).get("offload_param") or {}
    if place.get("device") != "nvme":
        return
    path = place.get("nvme_path", "auto")
    path = os.environ.get(NVME_PATH) if path == "auto" else path
    if not path:
        raise ValueError(
            f"the DeepSpeed file offloads parameters to NVMe, but names no folder: set {NVME_PATH} to one on a local "
            "disk, of this run alone"
        )
    if not (Path(path).is_dir() and os.access(path, os.W_OK)):
        raise ValueError(
            f"the DeepSpeed file offloads parameters to NVMe, but {path} is no folder that can be written: make it, or "
            f"set {NVME_PATH} to another one on a local disk"
        )
    require_async_io()


logger = logging.getLogger(__name__)


SILENT_SECONDS = 5.0


PATIENCE_SECONDS = 120.0
"""A lock that no process of this machine holds open may be that of another one, with the same home folder."""


def wait_for_locks(operators: Iterable[str], patience: float = PATIENCE_SECONDS) -> None:
    """Wait until none of these operators is being compiled, and remove the locks of processes that are gone.

    Torch itself waits for a lock for ever, so that after a kill no run would start again.

    Args:
        operators: Those that a run uses, as DeepSpeed names their folders.
        patience: Seconds from when a lock was made, after which it is removed if no process here holds it.
    """
    began, told = time.monotonic(), False
    while locks := [path for path in _locks(set(operators)) if path.exists()]:
        for path in locks:
            age = _age(path)
            if age is not None and age > patience and not _is_open(path):
                time.sleep(0.2)  # torch closes a lock before it removes it
                if path.exists():
                    logger.warning("removing %s: the process that was compiling there is gone", path)
                    path.unlink(missing_ok=True)
        if not told and time.monotonic() - began > SILENT_SECONDS:
            logger.warning("waiting for %s: another process compiles an operator, or was killed in it", locks[0])
            told = True
        time.sleep(0.2)


def _locks(operators: set[str]) -> Iterator[Path]:
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    locks = Path(chosen).glob("*/lock") if chosen else Path(get_default_build_root()).glob("*/*/lock")
    yield from (path for path in locks if path.parent.name in operators)


def _age(path: Path) -> float | None:
    """Seconds since a file was made; None if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return None


def _is_open(path: Path) -> bool:
    """Whether a process of this machine has a file open, as torch has while it holds a lock; Linux tells."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink() == path.resolve():
                return True
        except OSError:  # that process has ended, or is another user's
            continue
    return False
