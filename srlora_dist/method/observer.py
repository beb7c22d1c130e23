"""Follows each step of the optimizer between two switches: scores the pairs, and sends nothing."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.errors import RunStoppedError
from srlora_dist.method.importance import ChangeScore, Importance
from srlora_dist.method.pair_steps import PairSteps
from srlora_dist.method.schedule import SwitchSchedule
from srlora_dist.method.statistics import PairStatistics
from srlora_dist.method.watch import Watch
from srlora_dist.storage.base import Storage

IDLE_CALLS = {4 << k for k in range(30)}
"""Numbers of calls of ``Switcher.step`` in a row without an optimizer step after which the pairs are checked. That many
micro-batches or overflows are rare. If pairs have moved then, an optimizer that ``bind`` did not get moved them."""


def make_scores(storage: Storage, config: SRLoRAConfig) -> PairStatistics:
    """Make the statistics that ``srlora.score`` asks for."""
    if config.score == "change":
        return ChangeScore(storage)
    relative, resets_all = config.score == "relative", config.score_reset == "all"
    return Importance(storage, config.beta1, config.beta2, relative, resets_all)


class Observer:
    """Follows the steps of the innermost optimizer.

    Args:
        scores: The statistics of the pairs; None where no switch is to come.
        pair_steps: Corrects Adam's bias by the age of a pair; None where no option asks for it.
        watch: Notices pairs that something else has moved.
        schedule: Knows the next switch.
        num_steps: Gives the steps that were reported so far.

    Attributes:
        stepped: Ids of the tensors that were stepped since the last report.
    """

    def __init__(
        self,
        scores: PairStatistics | None,
        pair_steps: PairSteps | None,
        watch: Watch,
        schedule: SwitchSchedule,
        num_steps: Callable[[], int],
    ) -> None:
        self.scores, self.pair_steps, self.watch, self.schedule = scores, pair_steps, watch, schedule
        self._num_steps = num_steps
        self._num_idle = 0
        self.stepped: set[int] = set()

    def counts_next(self) -> bool:
        """Whether the next step counts for the choice of a switch that is still to come."""
        to_next = self.schedule.steps_to_next(self._num_steps())
        if to_next is None or self.scores is None:
            return False
        if not self.scores.needs_gradients:
            return True
        return self.schedule.window is None or to_next <= self.schedule.window

    def before(self, owners: list[Tensor]) -> None:
        """Observe the gradients: the optimizer is about to step these tensors. ZeRO steps one group after the other.

        Raises:
            RuntimeError: The step before was not reported.
        """
        owned = {id(owner) for owner in owners}
        if self.stepped & owned:
            raise RuntimeError("call switcher.step() after every optimizer.step(): the one before was not reported")
        if not self.stepped:
            self.watch.before_step()
        if self.counts_next():
            if not self.stepped and self.schedule.steps_to_next(self._num_steps()) == self.schedule.window:
                self.scores.clear_()
            self.scores.observe_(owners)
        if self.pair_steps is not None:
            self.pair_steps.before_(owned)
        self.stepped |= owned

    def after(self, owners: list[Tensor]) -> None:
        """Correct the updates of restarted pairs: the optimizer has stepped these tensors."""
        if self.pair_steps is not None:
            self.pair_steps.after_({id(owner) for owner in owners}, self._num_steps() + 1)

    def report(self) -> bool:
        """Whether there was a step since the last report.

        Collective: after many calls in a row without a step one all-reduce of 8 bytes, see
            :meth:`Watch.require_untouched`.

        Raises:
            RuntimeError: The pairs, or a weight, were changed by something else.
        """
        if not self.stepped:
            self._num_idle += 1
            if self._num_idle in IDLE_CALLS:
                self.watch.require_untouched()
            return False
        self.stepped.clear()
        self._num_idle = 0
        self.watch.remember_pairs()
        if self.watch.storage.world_size == 1 and self.watch.was_written():
            self.watch.require_untouched()
        return True

    def finite_scores(self) -> list[Tensor]:
        """The score of every pair of each site, the same on every rank. Collective: one all-reduce.

        Raises:
            RunStoppedError: A score is not a finite number.
        """
        scores = self.scores.pair_scores()
        if not all(bool(score.isfinite().all()) for score in scores):
            raise RunStoppedError(
                f"the pair scores of step {self._num_steps()} are not finite, so the training has diverged: lower the "
                "learning rate, or clip the gradient"
            )
        return scores
