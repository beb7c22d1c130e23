"""Finds out which storage a prepared model and its optimizer need."""

from __future__ import annotations

import sys

from torch import nn
from torch.optim import Optimizer

from srlora_dist.layers.site import Site
from srlora_dist.storage.base import Storage
from srlora_dist.storage.collectives import require_group
from srlora_dist.storage.replicated import PlainStorage
from srlora_dist.storage.zero0 import Zero0Storage
from srlora_dist.storage.zero3 import Zero3Storage
from srlora_dist.storage.zero12 import Zero12Storage


def find_storage(model: nn.Module, optimizer: object, sites: list[Site]) -> Storage:
    """Find out how the prepared model and optimizer hold the sites.

    Args:
        model: The model that ``accelerator.prepare`` or the engine returned.
        optimizer: The optimizer that it returned. Wrappers are followed through their ``optimizer`` attribute.
        sites: The sites of that model.

    Raises:
        ValueError: The storage is not supported, and the message says what to use instead. Or several processes were
            started that do not know of each other.
    """
    require_group()
    layers = [optimizer]
    while hasattr(layers[-1], "optimizer"):
        layers.append(layers[-1].optimizer)
    innermost = layers[-1]
    if not isinstance(innermost, Optimizer):
        raise ValueError(
            f"found no torch.optim.Optimizer inside {type(optimizer).__name__}: pass what prepare returned"
        )
    storage = _find_deepspeed(model, layers, sites)
    if storage is not None:
        return storage
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError("FSDP1 is not supported: set fsdp_version to 2, or use torch.distributed.fsdp.fully_shard")
    sharded = _sharded_modules(model)
    if sharded:
        from srlora_dist.storage.fsdp2 import Fsdp2Storage  # seconds of imports that other runs do without

        return Fsdp2Storage(innermost, sites, sharded)
    return PlainStorage(innermost, sites)


def _find_deepspeed(model: nn.Module, layers: list[object], sites: list[Site]) -> Storage | None:
    """The storage of a DeepSpeed engine; None where there is no DeepSpeed.

    Args:
        model: The prepared model.
        layers: The wrappers of the optimizer from outside to inside, the innermost optimizer last.
        sites: The sites of the model.

    Raises:
        ValueError: DeepSpeed holds the tensors in a way that is not supported.
    """
    innermost = layers[-1]
    for layer in layers:
        if _is_a(layer, "deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3"):
            if getattr(model, "is_deepcompile_enabled", lambda: False)():
                raise ValueError(
                    "DeepCompile under ZeRO-3 keeps copies of gathered weights that an edit of W does not reach: set "
                    "compile.deepcompile to false in the DeepSpeed file"
                )
            return Zero3Storage(innermost, sites, layer)
        if _is_a(layer, "deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"):
            return Zero12Storage(innermost, sites, layer)
        if _is_a(layer, "deepspeed.runtime.fp16.unfused_optimizer", "FP16_UnfusedOptimizer"):
            return Zero0Storage(innermost, sites, layer)
        if layer is not innermost and type(layer).__module__.startswith("deepspeed."):
            raise ValueError(
                f"DeepSpeed's {type(layer).__name__} is not supported: use ZeRO stage 1, 2 or 3, or stage 0 with "
                "torch.optim.AdamW, and leave data_types.grad_accum_dtype out"
            )
    # The HF Trainer hands over the model inside the engine, so the wrapper of the optimizer has to tell.
    wrapped = any(_is_a(layer, "accelerate.utils.deepspeed", "DeepSpeedOptimizerWrapper") for layer in layers)
    if wrapped or _is_a(model, "deepspeed.runtime.engine", "DeepSpeedEngine"):  # it leaves the optimizer as it is
        return Zero0Storage(innermost, sites, None)
    return None


def release_gathered(model: nn.Module) -> None:
    """Let FSDP2 modules drop the weights that they have gathered, so that their parameters are shards again."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> list[nn.Module]:
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return [module for module in model.modules() if isinstance(module, kind)]


def _is_a(thing: object, module: str, name: str) -> bool:
    """Whether an object is of exactly this class. Does not import the package of the class.

    Raises:
        ValueError: The object is of a subclass, which may hold its tensors in another way.
    """
    kind = getattr(sys.modules.get(module), name, None)
    if kind is None or not isinstance(thing, kind):
        return False
    if type(thing) is not kind:
        raise ValueError(f"{type(thing).__name__} is not supported: use DeepSpeed's own {name}")
    return True
