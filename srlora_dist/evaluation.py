"""Judges a model on a whole evaluation split."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from srlora_dist.tasks import Task


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader, task: Task) -> dict[str, float]:
    """Loss and figures over the whole evaluation split, each sample counted once on any world size.

    The loss is computed from the gathered outputs, not averaged over ranks: the last batch is filled up with repeated
    samples, which would weigh in.

    Collective: every rank calls it; gathers the task's answers batch by batch.
    """
    model.eval()
    gathered = []
    for batch in loader:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        answers = task.answers(model(**inputs), batch)
        answers = accelerator.gather_for_metrics(tuple(part.contiguous() for part in answers))
        gathered.append([part.cpu() for part in answers])
    model.train()
    outputs, labels = (torch.cat(parts) for parts in zip(*gathered, strict=True))
    outputs = outputs.double()
    return {"loss": task.loss(outputs, labels).item(), **task.metrics(outputs.numpy(), labels.numpy())}
