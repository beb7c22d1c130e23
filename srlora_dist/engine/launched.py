"""What was launched, according to what ``accelerate launch`` and others leave in the environment."""

from __future__ import annotations

import os

from srlora_dist.engine.deepspeed import read_settings, zero_stage
from srlora_dist.engine.process import launched_by_deepspeed
from srlora_dist.storage.unconnected import require_connected

PARALLELISM = {
    "DP_REPLICATE": "HSDP (copies of an FSDP2 model, on a mesh of two dimensions)",
    "TP": "tensor parallelism",
    "CP": "context parallelism",
    "SP": "sequence parallelism",
}
"""What the sizes of Accelerate's parallelism_config stand for; ``DP_SHARD`` alone is FSDP2."""


def launched_engine() -> str:
    """The engine that the environment asks for: ``plain``, ``ddp``, ``zero0`` to ``zero3``, or ``fsdp2``.

    Raises:
        ValueError: The launch asks for something that is not supported; the message says what to use instead.
    """
    if flag("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError(
            "the launch asks for Megatron-LM, which is not supported yet: "
            "use launch/accelerate/ddp.yaml or zero1.yaml, zero2.yaml, zero3.yaml there"
        )
    if flag("ACCELERATE_USE_PARALLELISM_CONFIG"):
        _refuse_parallelism()
    if launched_by_deepspeed() and not flag("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "the command deepspeed has started these processes, but without a word to Accelerate, so that they would "
            f"train without DeepSpeed: start accelerate launch --config_file launch/accelerate/zero2.yaml "
            f"--num_processes {os.environ.get('LOCAL_SIZE')} launch/train.py, or set ACCELERATE_USE_DEEPSPEED=true and "
            "ACCELERATE_DEEPSPEED_CONFIG_FILE=ds_configs/zero2.json before deepspeed"
        )
    _require_a_launcher_of_all()
    if flag("ACCELERATE_USE_DEEPSPEED"):
        return f"zero{zero_stage(read_settings())}"
    if flag("ACCELERATE_USE_FSDP"):
        return _fsdp_engine()
    return "ddp" if world_size() > 1 else "plain"


def world_size() -> int:
    """How many processes were launched, according to the environment.

    Raises:
        ValueError: What the launcher leaves in the environment is incomplete or contradicts itself.
    """
    size = _number("WORLD_SIZE", 1, least=1)
    for variable in ("RANK", "LOCAL_RANK"):
        _number(variable, 0, least=0, most=size - 1)
    _number("MASTER_PORT", 0, least=0, most=65535)
    missing = [variable for variable in ("RANK", "MASTER_ADDR", "MASTER_PORT") if variable not in os.environ]
    if size > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE is {size} in the environment, but {', '.join(missing)} not set: start with accelerate launch"
        )
    return size


def _refuse_parallelism() -> None:
    """Name what a parallelism_config of Accelerate asks for, by its sizes."""
    sizes = {name: os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1") for name in PARALLELISM}
    asked = [text for name, text in PARALLELISM.items() if sizes[name] not in ("", "1")]
    names = " and ".join(asked) or "a parallelism_config"
    raise ValueError(
        f"the launch asks for {names}, which is not supported: leave parallelism_config out of the Accelerate file; "
        "launch/accelerate/fsdp2.yaml cuts the model over all processes, zero3.yaml too"
    )


def _fsdp_engine() -> str:
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"the launch asks for FSDP version {version}, which is not supported: set fsdp_version: 2 in the "
            "Accelerate file, as in launch/accelerate/fsdp2.yaml"
        )
    return "fsdp2"


def flag(variable: str) -> bool:
    """Whether a variable of the environment says yes."""
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


def _number(variable: str, default: int, least: int, most: int | None = None) -> int:
    value = os.environ.get(variable, str(default))
    if not value.isdecimal() or int(value) < least or (most is not None and int(value) > most):
        span = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(
            f"{variable} is {value!r} in the environment, not a number {span}: start with accelerate launch"
        )
    return int(value)


def _require_a_launcher_of_all() -> None:
    """Stop where several processes were started that do not know of each other: each would train by itself."""
    if "WORLD_SIZE" in os.environ:
        return
    # Accelerate's launcher of one process sets the first, and the second where several were asked for.
    if {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= {*os.environ}:
        raise ValueError(
            "accelerate launch was asked for several processes, but with this file it starts one alone on each node: "
            "use --config_file launch/accelerate/ddp.yaml, or cpu2.yaml on the CPU"
        )
    require_connected()
