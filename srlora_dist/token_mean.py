"""The mean over all tokens of an optimizer step, however ranks and micro-batches share them out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from torch import Tensor

from srlora_dist.plan import SampleOrder
from srlora_dist.tasks.labels import IGNORED


class TokenMean:
    """Weighs the losses of micro-batches, each the mean over its own tokens, so that each token of a step counts alike.

    Nothing is sent: every process knows the order of the samples, and how many tokens of each are learnt.

    Args:
        num_targets: Tokens of each training sample that are learnt, as ``weigh`` counts them.
        order: Of the samples of the run, from where it goes on.
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
