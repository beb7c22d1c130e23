"""What a run does at which step: the samples it sees, the learning rate, the evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from datasets import Dataset
from torch.utils.data import Sampler

NUM_EVALUATIONS = 5


class SampleOrder(Sampler[int]):
    """The order of the samples of a whole run, a new permutation each epoch: the same for any engine and world size.

    One sampler for the run, so that an epoch never ends in the middle of an optimizer step; what is left of an epoch
    after its last whole batch is dropped.

    Args:
        num_samples: In the training split.
        batch_size: Samples of one optimizer step.
        num_steps: Optimizer steps of the run.
        seed: Decides the order alone.
    """

    def __init__(self, num_samples: int, batch_size: int, num_steps: int, seed: int) -> None:
        self.num_samples = num_samples
        self.epoch_length = num_samples - num_samples % batch_size
        self.length = batch_size * num_steps
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        left = self.length
        while left > 0:
            order = torch.randperm(self.num_samples, generator=generator)[: min(self.epoch_length, left)]
            yield from order.tolist()
            left -= len(order)


def by_length(rows: Dataset) -> Dataset:
    """The rows from short to long, which about halves the padding of an evaluation; as they are if not of tokens."""
    if "input_ids" not in rows.column_names:
        return rows
    lengths = [len(tokens) for tokens in rows["input_ids"]]
    return rows.select(sorted(range(len(lengths)), key=lengths.__getitem__))


def warm_up_and_decay(num_steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """Share of the peak learning rate at a step: linear up, then linear down to 0 after the last step."""
    num_warmup = round(warmup_ratio * num_steps)

    def share(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / num_warmup
        return max(0.0, (num_steps - step) / max(1, num_steps - num_warmup))

    return share


def due_evaluations(num_steps: int, eval_every: int | None) -> set[int]:
    """Steps after which to evaluate: every so many, or five times a run; the last step always."""
    if eval_every is not None:
        return {*range(eval_every, num_steps, eval_every), num_steps}
    return {math.ceil(num_steps * k / NUM_EVALUATIONS) for k in range(1, NUM_EVALUATIONS + 1)}
