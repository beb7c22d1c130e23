"""Builds an Accelerator that really runs on the engine that the launch asked for.

Accelerate falls back in silence: with ``use_cpu`` DeepSpeed becomes plain DDP, and several CPU processes become one. So
this module first reads the environment that ``accelerate launch`` has made, and then compares the Accelerator with it.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import nn

from srlora_dist.config.run import RunConfig
from srlora_dist.engine.deepspeed import compiled_operators, fill_auto, read_settings, require_nvme, wait_for_locks
from srlora_dist.engine.launched import flag, launched_engine, world_size
from srlora_dist.engine.precision import mixed_precision
from srlora_dist.storage.process_group import rejoin

T = TypeVar("T")


def build_accelerator(config: RunConfig) -> tuple[Accelerator, str]:
    """Build an Accelerator on the engine that the launch asked for; also returns the name of that engine.

    Collective: sets up the process group; every process must call it.

    Raises:
        ValueError: The launch, ``config.engine`` and what Accelerate made of it disagree, or the precision or a batch
            size cannot be honoured.
    """
    world_size()  # fails if the environment contradicts itself
    asked = launched_engine()
    require_engine(config.engine, asked, "the launch asks for")
    if config.method == "adalora" and asked not in ("plain", "ddp"):
        raise ValueError(f"method adalora needs whole gradients, which {asked} does not keep: use plain or ddp")
    accelerator = _connect(config, asked, _without_gpu())
    require_engine(asked, _accelerated_engine(accelerator), "Accelerate set up")
    _require_divisible(config, accelerator.num_processes)
    if asked.startswith("zero"):
        made = accelerator.state.deepspeed_plugin.deepspeed_config
        made.update(fill_auto(made, config, accelerator.num_processes))
    return accelerator, asked


def _connect(config: RunConfig, asked: str, without_gpu: bool) -> Accelerator:
    """Check what can be checked before the processes connect, and make the Accelerator, which connects them."""
    launched_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    settings, plugin = read_settings() if asked.startswith("zero") else None, None
    precision = mixed_precision(config.model, asked, launched_precision, settings, has_gpu=not without_gpu)
    if settings is None:
        _require_accumulation(config)
    else:
        plugin = _deepspeed_plugin(settings, config, world_size())
    handlers, timeout = [], timedelta(seconds=config.train.timeout)
    if asked != "plain":
        backend = {"backend": "gloo"} if without_gpu else {}
        # DeepSpeed's own limit is 10 minutes, less than rank 0 may need to factor a large weight.
        handlers.append(InitProcessGroupKwargs(timeout=timeout, **backend))
    try:
        if asked != "plain":
            rejoin("cpu" if without_gpu else torch.accelerator.current_accelerator().type, timeout)
        accelerator = Accelerator(
            # Under DeepSpeed cpu=True would turn DeepSpeed off.
            cpu=without_gpu and not asked.startswith("zero"),
            mixed_precision=precision,
            deepspeed_plugin=plugin,
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.train.accumulation_steps),
            kwargs_handlers=handlers,
        )
    except RuntimeError as error:
        if asked == "plain":
            raise
        raise ValueError(
            f"the {os.environ.get('WORLD_SIZE')} processes of the launch did not come together within train.timeout "
            f"{config.train.timeout} s ({error}): look at what the others print, or set train.timeout higher"
        ) from error
    if asked == "fsdp2" and without_gpu:
        _shard_on_cpu(accelerator)
    return accelerator


def _deepspeed_plugin(settings: dict[str, object], config: RunConfig, num_processes: int) -> DeepSpeedPlugin | None:
    """Fill in the settings and hand them to Accelerate, before the processes connect and it copies them for zero.Init.

    Returns:
        None if the launch names no file. Then Accelerate makes the settings, and they are filled in afterwards.
    """
    plugin = None
    if settings:
        filled = fill_auto(settings, config, num_processes)
        require_nvme(filled)
        plugin = DeepSpeedPlugin(hf_ds_config=filled)
    wait_for_locks(compiled_operators(settings))
    return plugin


def require_engine(asked: str, got: str, who: str) -> None:
    """Stop if an engine is not the one that was asked for.

    Raises:
        ValueError: They differ; the message names both.
    """
    if asked in ("auto", got):
        return
    files = {"plain": "cpu1.yaml or single.yaml", "ddp": "cpu2.yaml or ddp.yaml"}
    remedy = files.get(asked, f"{asked}_cpu.yaml or {asked}.yaml, with use_cpu false")
    raise ValueError(
        f"the engine asked for is {asked}, but {who} {got}: "
        f"use accelerate launch --config_file launch/accelerate/{remedy}"
    )


def choose_layers_to_shard(accelerator: Accelerator, model: nn.Module) -> None:
    """Choose the layers into which FSDP2 cuts a model, if the launch does not name them.

    Accelerate (1.15.0) takes every class that Transformers says not to split, and the input embeddings by themselves.
    Encoders such as BERT have their embeddings in one of these classes, but a weight can be in one group only.

    Args:
        accelerator: An Accelerator on FSDP2.
        model: The model, not prepared yet.
    """
    plugin, embeddings = accelerator.state.fsdp_plugin, model.get_input_embeddings()
    if plugin.transformer_cls_names_to_wrap is None:
        whole = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
        layers = [module for module in whole if all(part is not embeddings for part in module.modules())]
        plugin.transformer_cls_names_to_wrap = sorted({type(module).__name__ for module in layers})


def _accelerated_engine(accelerator: Accelerator) -> str:
    """The engine of the Accelerator, or the number of its processes if that is not the one that was launched."""
    launched = world_size()
    if accelerator.num_processes != launched:
        return f"{accelerator.num_processes} of {launched} processes"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"
    if accelerator.distributed_type == DistributedType.NO or accelerator.num_processes == 1:
        return "plain"
    multi_device = accelerator.distributed_type.value.startswith("MULTI_")
    return "ddp" if multi_device else accelerator.distributed_type.value.lower()


def _shard_on_cpu(accelerator: Accelerator) -> None:
    """Turn on FSDP for processes without a GPU, as AcceleratorState does for processes with one.

    AcceleratorState (``accelerate/state.py``, 1.15.0) leaves MULTI_CPU out of its list, although FSDP2 works there.
    """
    state = accelerator.state
    if state.distributed_type != DistributedType.MULTI_CPU:
        return
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def _without_gpu() -> bool:
    return flag("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def _require_divisible(config: RunConfig, num_processes: int) -> None:
    train = config.train
    for name, size, parts in (
        ("batch_size", train.batch_size, train.accumulation_steps * num_processes),
        ("eval_batch_size", train.eval_batch_size, num_processes),
    ):
        if size % parts:
            accumulation = f"{train.accumulation_steps} accumulation steps x " if parts != num_processes else ""
            raise ValueError(
                f"train.{name} {size} is not a multiple of {accumulation}{num_processes} processes: "
                f"choose a multiple of {parts}"
            )


def _require_accumulation(config: RunConfig) -> None:
    """Stop if the launch asks for another gradient accumulation than the run. Accelerate would drop one in silence."""
    theirs, ours = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto"), config.train.accumulation_steps
    if theirs not in ("auto", str(ours)):
        raise ValueError(
            f"the launch asks for {theirs} gradient accumulation steps, but train.accumulation_steps is {ours}: "
            "leave it out of the launch"
        )
