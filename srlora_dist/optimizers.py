"""The optimizers that a run can choose; a switch resets the moments of each of them (see storage/moments.py)."""

from __future__ import annotations

import torch
from torch import nn

from srlora_dist.config.run import TrainOptions


def build_optimizer(parameters: list[nn.Parameter], options: TrainOptions) -> torch.optim.Optimizer:
    """The optimizer that ``options.optimizer`` names, at the peak learning rate.

    Args:
        parameters: All that is trained.
        options: Of the training loop.
    """
    both = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=options.momentum, **both)
    return torch.optim.AdamW(parameters, **both)
