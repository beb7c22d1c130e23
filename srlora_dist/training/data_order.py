"""What a run does at which step: the samples it sees, the learning rate, the evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler

from srlora_dist.tasks.labels import IGNORED


class SampleOrder(Sampler[int]):
    """The order of the samples of a whole run, a new permutation each epoch: the same for any engine and world size.

    One sampler for the run, so that an epoch never ends in the middle of an optimizer step; what is left of an epoch
    after its last whole batch is dropped.

    Args:
        num_samples: Samples in the training split.
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


class TokenMean:
    """Weighs the losses of micro-batches, each the mean over its own tokens, so that each token of a step counts alike.

    Nothing is sent: every process knows the order of the samples, and how many tokens of each are learnt.

    Args:
        num_targets: Tokens of each training sample that are learnt, as ``weigh`` counts them.
        order: Order of the samples, from where the run goes on.
        batch_size: Samples of one optimizer step.
        accumulation_steps: Micro-batches of one optimizer step on each rank.
        num_processes: Ranks, over which gradients are averaged.
    """

    def __init__(
        self,
        num_targets: Sequence[int],
        order: SampleOrder,
        batch_size: int,
        accumulation_steps: int,
        num_processes: int,
    ) -> None:
        samples = iter(order)
        steps = range(len(order) // batch_size)
        self._totals = (sum(num_targets[sample] for sample in islice(samples, batch_size)) for _ in steps)
        self._accumulation_steps, self._num_parts = accumulation_steps, accumulation_steps * num_processes
        self._num_weighed = 0

    def weigh(self, loss: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Multiply a loss by its tokens' share of the step; to be called once for each micro-batch, in their order.

        Args:
            loss: The mean over the tokens of this rank's micro-batch.
            batch: With ``labels`` of shape (rows, tokens), of which the first is predicted from nothing.

        Returns:
            A loss whose mean over ranks and accumulation steps is the mean over all tokens of the step.
        """
        if self._num_weighed % self._accumulation_steps == 0:
            self._total = next(self._totals)
        self._num_weighed += 1
        return loss * (batch["labels"][:, 1:] != IGNORED).sum() * (self._num_parts / self._total)
