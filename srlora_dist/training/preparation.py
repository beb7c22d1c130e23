"""Prepares a model, an optimizer and data for the engine of a run, with Accelerate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from srlora_dist.config.run import RunConfig
from srlora_dist.engine.accelerator import choose_layers_to_shard
from srlora_dist.storage.zero0 import leave_out_bad_steps_
from srlora_dist.tasks.task import Task
from srlora_dist.training.data_order import SampleOrder, TokenMean, by_length
from srlora_dist.training.optimization import build_optimizer, warm_up_and_decay


class Prepared(NamedTuple):
    """What the training loop works with.

    Args:
        model: The adapted model, as the engine holds it.
        optimizer: Steps its trainable parameters.
        scheduler: Sets the learning rate.
        train_loader: The micro-batches that are still to come, of this rank.
        eval_loader: The batches of the evaluation split, of this rank.
        trainable: The trainable parameters of ``model``.
        token_mean: Weighs the loss of a micro-batch; None where the samples count alike.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    train_loader: DataLoader
    eval_loader: DataLoader
    trainable: list[nn.Parameter]
    token_mean: TokenMean | None


def prepare(
    config: RunConfig, accelerator: Accelerator, task: Task, model: nn.Module, num_steps: int, num_done: int
) -> Prepared:
    """Prepare a run for its engine.

    Args:
        config: The run, with the name of its engine.
        accelerator: An Accelerator on that engine.
        task: The task that is learnt.
        model: The model with its adapter.
        num_steps: Optimizer steps of the whole run.
        num_done: Optimizer steps that were done before; the data goes on after them.

    Collective: every rank calls it; see ``Accelerator.prepare``.
    """
    options = config.train
    order = SampleOrder(len(task.train), options.batch_size, num_steps, config.seed, num_done)
    micro_batch_size = options.batch_size // options.accumulation_steps
    train_loader = DataLoader(
        task.train, batch_size=micro_batch_size, sampler=order, collate_fn=task.collate, drop_last=True
    )
    eval_loader = DataLoader(by_length(task.eval), batch_size=options.eval_batch_size, collate_fn=task.collate)
    optimizer = build_optimizer(_trainable(model), options)
    if config.engine == "zero0" and config.model.dtype == "float32":
        leave_out_bad_steps_(optimizer)
    if config.engine == "fsdp2":
        choose_layers_to_shard(accelerator, model)
    scheduler = LambdaLR(optimizer, warm_up_and_decay(num_steps, options.warmup_ratio, options.schedule))
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )
    token_mean = None
    if task.num_targets is not None:
        parts = options.accumulation_steps, accelerator.num_processes
        token_mean = TokenMean(task.num_targets, order, options.batch_size, *parts)
    # The parameters are looked up again, because FSDP2 has put others in their place.
    return Prepared(model, optimizer, scheduler, train_loader, eval_loader, _trainable(model), token_mean)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
