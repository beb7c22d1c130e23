"""Whether a run has learnt anything: one that has not is never reported as a good one."""

from __future__ import annotations

import logging
import math

from srlora_dist.errors import RunStoppedError
from srlora_dist.method.diagnostics import Finding
from srlora_dist.training.evaluation import Judged
from srlora_dist.training.loop_state import Progress

logger = logging.getLogger(__name__)

MANY_SKIPPED = 0.5
"""Share of the steps from which on it is worth a word that they were skipped."""


def require_finite_start(judged: Judged) -> None:
    """Stop before the first step where the untrained model cannot be judged.

    Raises:
        ValueError: Its validation loss is NaN or infinite.
    """
    loss = judged.figures["loss"]
    if not math.isfinite(loss):
        raise ValueError(
            f"the validation loss is {loss} before the first step: look for labels that are NaN or infinite, and for "
            "weights that are, or choose a wider model.dtype"
        )


def count_skipped(progress: Progress, was_skipped: bool, most: int) -> None:
    """Count a step that was skipped, on every rank alike, and stop after too many of them in a row.

    Args:
        progress: How far the run is; this step is counted in ``done`` already.
        was_skipped: Whether the step was skipped, because its gradient was NaN or infinite.
        most: ``train.max_bad_steps``.

    Raises:
        RunStoppedError: So many steps in a row were skipped.
    """
    progress.num_bad_in_a_row = progress.num_bad_in_a_row + 1 if was_skipped else 0
    if was_skipped:
        progress.num_skipped += 1
        logger.warning("step %d: the gradient is NaN or infinite, so the step was left out", progress.done)
    if progress.num_bad_in_a_row >= most:
        raise RunStoppedError(
            f"the gradient was NaN or infinite in {most} steps in a row (train.max_bad_steps), up to step "
            f"{progress.done}: lower train.learning_rate, or look at the data; checkpoints from before are good"
        )


def require_a_step(progress: Progress, num_steps: int) -> None:
    """Stop at the end of a run of which every step was left out, before it is exported as if it had learnt.

    Raises:
        RunStoppedError: No step was taken.
    """
    if progress.done == num_steps and progress.num_skipped >= num_steps:
        raise RunStoppedError(
            f"the gradient was NaN or infinite in all {num_steps} steps, so nothing was learnt: look at the data, "
            "lower train.learning_rate, or train for more steps where a loss scale has to settle"
        )


def is_better(figures: dict[str, float], best: dict[str, float] | None) -> bool:
    """Whether an evaluation is the best so far; one whose loss is not finite never is."""
    return math.isfinite(figures["loss"]) and (best is None or figures["loss"] < best["loss"])


def require_a_best(progress: Progress) -> None:
    """Stop after the last evaluation where none after a step had a finite loss.

    Raises:
        RunStoppedError: The run has diverged.
    """
    if progress.best is None:
        raise RunStoppedError(
            f"the validation loss is {progress.final['loss']} after the last step and was finite after none, so there "
            "is no adapter to keep: lower train.learning_rate, or look at the data"
        )


def doubts(progress: Progress, num_steps: int, judged: Judged) -> list[Finding]:
    """What the summary has to say beside the figures of the last evaluation."""
    found, step = [], progress.done
    if progress.num_skipped >= MANY_SKIPPED * num_steps:
        message = (
            f"{progress.num_skipped} of {num_steps} steps were left out, because their gradient was NaN or infinite"
        )
        figures = {"skipped": progress.num_skipped, "steps": num_steps}
        found.append(Finding("skipped_steps", step, f"{message}: look at the data, or lower the rate", figures))
    if judged.doubt:
        found.append(Finding("doubtful_figures", step, f"{judged.doubt}, so the figures say little", judged.figures))
    return found
