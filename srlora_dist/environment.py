"""What a run needed and on what it ran, for its summary."""

from __future__ import annotations

import platform
import resource
from importlib import metadata

import torch
from accelerate import Accelerator


def peak_memory(accelerator: Accelerator) -> int:
    """Of the rank that needed most, in bytes: of the GPU, or resident where there is none."""
    if accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return int(accelerator.gather(torch.tensor([peak], dtype=torch.int64, device=accelerator.device)).max())


def versions() -> dict[str, str]:
    """Of Python and of each package that matters here and is installed."""
    names = ("torch", "accelerate", "deepspeed", "transformers", "peft", "bitsandbytes", "srlora_dist")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
