"""The seam: the only folder that knows how ranks hold tensors and talk to each other; one file a kind."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.optim import Optimizer

from srlora_dist.sites import Site, require_float32
from srlora_dist.storage.base import Run, Storage, deal_by_size
from srlora_dist.storage.plain import PlainStorage
from srlora_dist.storage.zero3 import Zero3Storage
from srlora_dist.storage.zero12 import Zero12Storage

__all__ = ["Run", "Storage", "deal_by_size", "find_storage"]


def find_storage(model: nn.Module, optimizer: object, sites: list[Site]) -> Storage:
    """Find out how the prepared model and optimizer hold the sites.

    Args:
        model: What ``accelerator.prepare`` or the engine returned.
        optimizer: Likewise; wrappers are followed through their ``optimizer`` attribute to the innermost one.
        sites: The sites of that model.

    Raises:
        ValueError: The storage is not supported; the message says what to use instead.
    """
    _refuse_fsdp(model, sites)
    require_float32(sites)
    layers = [optimizer]
    while hasattr(layers[-1], "optimizer"):
        layers.append(layers[-1].optimizer)
        if getattr(layers[-2], "scaler", None) is not None:
            raise ValueError("fp16 mixed precision with a GradScaler is not supported yet: train in fp32")
    innermost = layers[-1]
    if not isinstance(innermost, Optimizer):
        raise ValueError(
            f"found no torch.optim.Optimizer inside {type(optimizer).__name__}: pass what prepare returned"
        )
    for layer in layers:
        if _is_a(layer, "deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3"):
            return Zero3Storage(innermost, sites, layer)
        if _is_a(layer, "deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"):
            return Zero12Storage(innermost, sites, layer)
    return PlainStorage(innermost, sites)


def _is_a(thing: object, module: str, name: str) -> bool:
    """Whether a thing is of just this kind, without importing a package that the run does not use.

    Raises:
        ValueError: It is of a kind made from this one, which may hold its tensors in another way.
    """
    kind = getattr(sys.modules.get(module), name, None)
    if kind is None or not isinstance(thing, kind):
        return False
    if type(thing) is not kind:
        raise ValueError(f"{type(thing).__name__} is not supported: use DeepSpeed's own {name}")
    return True


def _refuse_fsdp(model: nn.Module, sites: list[Site]) -> None:
    fully_sharded = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    if fully_sharded or any(_is_dtensor(site.weight) or _is_dtensor(site.lora_a) for site in sites):
        raise ValueError("FSDP is not supported yet: launch with DDP or DeepSpeed ZeRO (see launch/accelerate/)")


def _is_dtensor(tensor: torch.Tensor) -> bool:
    return _is_a(tensor, "torch.distributed.tensor", "DTensor")
