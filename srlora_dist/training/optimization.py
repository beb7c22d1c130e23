"""The optimizers that a run can choose; a switch resets their moments (see storage/optimizer_state.py)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from srlora_dist.config.run import TrainOptions


def build_optimizer(parameters: list[nn.Parameter], options: TrainOptions) -> torch.optim.Optimizer:
    """The optimizer that ``options.optimizer`` names, at the peak learning rate.

    Args:
        parameters: All that is trained.
        options: Options of the training loop.
    """
    both = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=options.momentum, **both)
    return torch.optim.AdamW(parameters, **both)


def warm_up_and_decay(num_steps: int, warmup_ratio: float, schedule: str = "linear") -> Callable[[int], float]:
    """Share of the peak learning rate at a step: linear up, then as the schedule says.

    Args:
        num_steps: Optimizer steps of the run.
        warmup_ratio: Share of them in which it rises.
        schedule: ``linear`` or ``cosine``, down to 0 after the last step, or ``constant``.
    """
    num_warmup = round(warmup_ratio * num_steps)
    decays = {
        "linear": lambda left: left,
        "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
        "constant": lambda _: 1.0,
    }
    decay = decays[schedule]

    def share(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / num_warmup
        return decay(max(0.0, (num_steps - step) / max(1, num_steps - num_warmup)))

    return share
