"""What a run has come to: how far it is, and what ``summary.json`` says of it at the end."""

from __future__ import annotations

import platform
import resource
from importlib import metadata

import torch
from accelerate import Accelerator
from torch import nn

from srlora_dist.layers.site import FUSED


def num_trainable(model: nn.Module) -> int:
    """Trained numbers of a model."""
    # Under ZeRO-3 a parameter is a placeholder that knows its size.
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def pretrained_bytes(model: nn.Module) -> int:
    """Size of the pretrained model as it is stored."""
    return sum(
        getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and f".{FUSED}." not in name
    )


def peak_memory(accelerator: Accelerator) -> int:
    """Peak memory of the rank that needed most, in bytes: of the GPU, or resident memory where there is none.

    Collective: one gather of a number.
    """
    if accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return int(accelerator.gather(torch.tensor([peak], dtype=torch.int64, device=accelerator.device)).max())


def versions() -> dict[str, str]:
    """Versions of Python and of each installed package that matters here."""
    names = ("torch", "accelerate", "deepspeed", "transformers", "peft", "bitsandbytes", "srlora_dist")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
