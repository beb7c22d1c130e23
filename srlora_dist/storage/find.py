"""The seam: the only folder that knows how ranks hold tensors and talk to each other; one file a kind."""

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
        model: What ``accelerator.prepare`` or the engine returned.
        optimizer: Likewise; wrappers are followed through their ``optimizer`` attribute to the innermost one.
        sites: The sites of that model.

    Raises:
        ValueError: The storage is not supported; the message says what to use instead. Or this process is one of
            several that do not know of each other.
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
    # The HF Trainer hands over the model that is in the engine.
    wrapped = any(_is_a(layer, "accelerate.utils.deepspeed", "DeepSpeedOptimizerWrapper") for layer in layers)
    if wrapped or _is_a(model, "deepspeed.runtime.engine", "DeepSpeedEngine"):  # it leaves the optimizer as it is
        return Zero0Storage(innermost, sites, None)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError("FSDP1 is not supported: set fsdp_version to 2, or use torch.distributed.fsdp.fully_shard")
    sharded = _sharded_modules(model)
    if sharded:
        from srlora_dist.storage.fsdp2 import Fsdp2Storage  # seconds of imports that other runs do without

        return Fsdp2Storage(innermost, sites, sharded)
    return PlainStorage(innermost, sites)


def release_gathered(model: nn.Module) -> None:
    """Make FSDP2 modules that hold gathered weights hold their shards again, so that parameters are what they were."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> list[nn.Module]:
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return [module for module in model.modules() if isinstance(module, kind)]


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
