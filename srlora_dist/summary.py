"""What a run has come to: how far it is, and what ``summary.json`` says of it at the end."""

from __future__ import annotations

import platform
import resource
from dataclasses import dataclass, field
from importlib import metadata

import torch
from accelerate import Accelerator
from torch import nn

from srlora_dist.layers.site import FUSED


@dataclass
class Progress:
    """How far a run has come; a checkpoint holds it.

    Args:
        done: Optimizer steps, those that were skipped too.
        start: Validation figures before the first step.
        best: Those of the lowest loss so far, with their ``step``.
        exported_step: Whose adapter lies in ``adapter``: not that of the best step where the disk was full.
        final: The last ones.
        train_seconds: Time of the training loop so far, over all starts.
        method_seconds: What the method added to it before the last start.
        num_skipped: Steps that were left out because their gradient was NaN or infinite.
        num_bad_in_a_row: Those up to now, without a good one after them.
        resumed_after: The steps after which the run was resumed.
        findings: What ``diagnostics.py`` noticed, each as a dictionary.
    """

    done: int = 0
    start: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] | None = None
    exported_step: int | None = None
    final: dict[str, float] = field(default_factory=dict)
    train_seconds: float = 0.0
    method_seconds: dict[str, float] = field(default_factory=dict)
    num_skipped: int = 0
    num_bad_in_a_row: int = 0
    resumed_after: list[int] = field(default_factory=list)
    findings: list[dict[str, object]] = field(default_factory=list)

    def results(self) -> dict[str, object]:
        """Its part of ``summary.json``."""
        best = dict(self.best)
        return {
            "skipped_steps": self.num_skipped,
            "resumed_after": self.resumed_after,
            "best_step": best.pop("step"),
            "start": self.start,
            "best": best,
            "final": self.final,
            "findings": self.findings,
            "train_seconds": self.train_seconds,
        }


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
    """Of the rank that needed most, in bytes: of the GPU, or resident where there is none.

    Collective: one gather of a number.
    """
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
