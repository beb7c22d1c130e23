"""Decides when the switches of a run happen, and which pairs each of them fuses."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict

from torch import Tensor

from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.config.option import free_on_resume
from srlora_dist.layers.site import Site
from srlora_dist.method.budget import choose_slots, num_next, plan_switches, window_length

FREE = free_on_resume(SRLoRAConfig)
"""Options of the method that may be others when a run is resumed."""

logger = logging.getLogger(__name__)


class SwitchSchedule:
    """The switches after switch 0: a list of steps, brought forward with ``switch_when: settled``.

    Args:
        sites: The sites, whose ranks decide the number of switches.
        config: Options.
        num_training_steps: Optimizer steps of the whole run.

    Raises:
        ValueError: There are more switches than steps.
    """

    def __init__(self, sites: list[Site], config: SRLoRAConfig, num_training_steps: int) -> None:
        self.config, self.num_training_steps = config, num_training_steps
        self.due_steps = plan_switches(sites, config, num_training_steps)
        self.settling: EarlySwitch | None = None
        self.window = window_length(config.importance_window, config.beta1, config.beta2)
        if config.switch_when == "settled":
            self.settling = EarlySwitch(self.due_steps[0] if self.due_steps else 0)
            self.window = None  # any step may come just before a switch

    def steps_to_next(self, num_steps: int) -> int | None:
        """Steps from this one to the next switch, at the latest; None after the last switch."""
        return next((due - num_steps for due in self.due_steps if due > num_steps), None)

    def is_due(self, num_steps: int, choice: Callable[[], list[list[int]]]) -> bool:
        """Whether to switch after this step.

        Args:
            num_steps: Optimizer steps that were done.
            choice: Gives the slots that a switch would fuse now; called only where that can bring a switch forward.
        """
        is_due, to_next = num_steps in self.due_steps, self.steps_to_next(num_steps)
        if self.settling is not None and not is_due and to_next is not None:
            since = num_steps - max((due for due in self.due_steps if due < num_steps), default=0)
            is_due = self.settling.looks_after(since) and self.settling.has_settled(choice(), since)
            if is_due:
                self.due_steps[self.due_steps.index(num_steps + to_next)] = num_steps
        if self.settling is not None and is_due:
            self.settling.before = None
        return is_due

    def choose(self, sites: list[Site], scores: list[Tensor], num_steps: int) -> list[list[int]]:
        """Eq. 8 at every site: the slots that a switch after this step fuses."""
        config, chosen = self.config, []
        for site, score in zip(sites, scores, strict=True):
            ages = [sum(born < due <= num_steps for due in self.due_steps) for born in site.state.born]
            count = num_next(site, config.fusion_ratio)
            slots = choose_slots(score, count, ages, config.choose, config.grace)
            chosen.append([] if site.state.left_out else slots)
        return chosen

    def warn_of_missing_switches(self, num_steps: int) -> None:
        """Warn if a run that ends after this step had switches still to come."""
        missing = [due for due in self.due_steps if due > num_steps]
        if missing:
            warnings.warn(
                f"{len(missing)} of {len(self.due_steps)} switches have not happened, for they were planned for "
                f"{self.num_training_steps} optimizer steps and there were {num_steps}: the loader was shorter, or "
                "num_training_steps counts micro-batches; in the middle of a run call export(..., is_last=False)",
                stacklevel=3,
            )

    def warn_of_overrun(self, num_steps: int) -> None:
        """Warn at the first step beyond those that the switches were planned for."""
        if num_steps == self.num_training_steps + 1:
            logger.warning(
                "this is step %d of %d: the switches were planned for too short a run",
                num_steps,
                self.num_training_steps,
            )

    def plan(self) -> dict[str, object]:
        """Settings that must be the same on every rank; only names of folders may differ."""
        options = {name: value for name, value in self._options().items() if name != "directions_from"}
        return {"num_training_steps": self.num_training_steps, **{f"srlora.{n}": v for n, v in options.items()}}

    def state(self) -> dict[str, object]:
        """For a checkpoint."""
        return {
            "num_training_steps": self.num_training_steps,
            "due_steps": self.due_steps,
            "options": self._options(),
            "choice_before": self.settling.before if self.settling is not None else None,
        }

    def restore_(self, state: dict[str, object]) -> None:
        """Continue the schedule of a checkpoint.

        Raises:
            ValueError: The checkpoint is of a run of another length, or with other options.
        """
        if state.get("num_training_steps") != self.num_training_steps:
            raise ValueError(
                f"the checkpoint is of a run of {state.get('num_training_steps')} optimizer steps, and this one has "
                f"{self.num_training_steps}, which moves the switches: resume with the same length"
            )
        ours = self._options()
        for name, theirs in state.get("options", {}).items():
            if theirs != ours.get(name):
                raise ValueError(
                    f"the checkpoint is of a run with srlora.{name} {theirs}, and this one has {ours.get(name)}: set "
                    "it back to go on"
                )
        if self.settling is not None:
            self.due_steps, self.settling.before = list(state["due_steps"]), state["choice_before"]

    def _options(self) -> dict[str, object]:
        """The options that decide what a run computes."""
        options = asdict(self.config) | {"target_rank": self.config.num_directions}
        return {name: value for name, value in options.items() if name not in FREE}


LOOKS_PER_INTERVAL = 8


EARLIEST = 0.5


SAME_SHARE = 0.9


class EarlySwitch:
    """Looks several times per interval at what a switch would choose, and switches early once the choice is stable.

    Args:
        interval: Steps between the switches of the fixed schedule.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.before: list[list[int]] | None = None  # slots of each site at the last look since the last switch

    def looks_after(self, steps: int) -> bool:
        """Whether to look this many steps after the last switch: from one look before half an interval on."""
        between = max(1, self.interval // LOOKS_PER_INTERVAL)
        return steps % between == 0 and steps >= EARLIEST * self.interval - between

    def has_settled(self, slots: list[list[int]], steps: int) -> bool:
        """Note a choice made this many steps after the last switch; true if it mostly repeats the choice before."""
        before, self.before = self.before, slots
        if before is None or steps < EARLIEST * self.interval:
            return False
        kept = sum(len(set(now) & set(then)) for now, then in zip(slots, before, strict=True))
        return kept >= SAME_SHARE * sum(map(len, slots))
