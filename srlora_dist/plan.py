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
        num_done: Steps that were done before; the order goes on after them.
    """

    def __init__(self, num_samples: int, batch_size: int, num_steps: int, seed: int, num_done: int = 0) -> None:
        self.num_samples = num_samples
        self.epoch_length = num_samples - num_samples % batch_size
        self.length = batch_size * num_steps
        self.num_seen = batch_size * num_done
        self.seed = seed

    def __len__(self) -> int:
        return self.length - self.num_seen

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, self.length, self.epoch_length):  # of each epoch
            order = torch.randperm(self.num_samples, generator=generator)[: min(self.epoch_length, self.length - start)]
            yield from order[max(0, self.num_seen - start) :].tolist()


def by_length(rows: Dataset) -> Dataset:
    """The rows from short to long, which about halves the padding of an evaluation; as they are if not of tokens."""
    if "input_ids" not in rows.column_names:
        return rows
    lengths = [len(tokens) for tokens in rows["input_ids"]]
    return rows.select(sorted(range(len(lengths)), key=lengths.__getitem__))


def warm_up_and_decay(num_steps: int, warmup_ratio: float, schedule: str = "linear") -> Callable[[int], float]:
    """Share of the peak learning rate at a step: linear up, then as the schedule says.

    Args:
        num_steps: Of the run.
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


def due_evaluations(num_steps: int, eval_every: int | None) -> set[int]:
    """Steps after which to evaluate: every so many, or five times a run; before the first and after the last always."""
    if eval_every is not None:
        return {*range(0, num_steps, eval_every), num_steps}
    return {math.ceil(num_steps * k / NUM_EVALUATIONS) for k in range(NUM_EVALUATIONS + 1)}


def due_checkpoints(num_steps: int, every: int | None, evaluations: set[int]) -> set[int]:
    """Steps after which to write a checkpoint: every so many and the last, with each evaluation, or none."""
    if every is None:
        return evaluations - {0}
    return {*range(every, num_steps, every), num_steps} if every else set()
