"""Judges a model on a whole evaluation split."""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from srlora_dist.tasks.task import Task


class Judged(NamedTuple):
    """What an evaluation says.

    Args:
        figures: ``loss``, and those of the task.
        doubt: Why they say little of the model; empty where nothing of that kind was seen.
    """

    figures: dict[str, float]
    doubt: str


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader, task: Task) -> Judged:
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
    figures = {"loss": task.loss(outputs, labels).item(), **task.metrics(outputs.numpy(), labels.numpy())}
    return Judged(figures, _doubt(figures, outputs, labels))


def _doubt(figures: dict[str, float], outputs: Tensor, labels: Tensor) -> str:
    undefined = [name for name, value in figures.items() if value != value]
    if undefined:
        return f"{', '.join(undefined)} cannot be computed: the outputs are NaN, or the metric is not defined for them"
    if outputs.dim() == 2 and labels.dim() == 1 and len(labels) > 1:
        answers = outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(1)
        for name, values in (("answers", answers), ("labels", labels)):
            if bool((values == values[0]).all()):
                return f"all {len(values)} {name} of the evaluation are the same ({values[0].item():g})"
    return ""
