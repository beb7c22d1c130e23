"""What is read off the lines of results: losses, steps to reach another run's loss, means with their intervals."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

SMOOTHED_OVER = 0.1
"""Share of a run over which the training loss is averaged: single points are of a few batches."""


@dataclass(frozen=True)
class Mean:
    """Of the seeds.

    Args:
        value: Their mean.
        half: Half the width of its 95% interval, by Student's t; None for one seed.
        count: How many.
    """

    value: float
    half: float | None
    count: int

    def __str__(self) -> str:
        """Mean ± half interval."""
        return format(self, "")

    def __format__(self, sign: str) -> str:
        """The same; ``+`` shows the sign of a difference."""
        return f"{self.value:{sign}.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


def mean_of(values: list[float]) -> Mean:
    """The mean and its 95% interval."""
    if len(values) < 2:
        return Mean(values[0], None, 1)
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return Mean(statistics.mean(values), float(half), len(values))


def smooth_curve(line: dict) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean training loss of the points up to each within ``SMOOTHED_OVER`` of the run."""
    steps, losses = np.array(line["curve"]).T
    width = max(1, round(SMOOTHED_OVER * len(steps)))
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    return steps[width - 1 :], (sums[width:] - sums[:-width]) / width


def final_loss(line: dict) -> float:
    """The training loss of the last steps."""
    return float(smooth_curve(line)[1][-1])


def share_to_reach(line: dict, loss: float) -> float | None:
    """After what share of its steps a run's training loss is down at this one; None if it never is."""
    steps, losses = smooth_curve(line)
    there = np.flatnonzero(losses <= loss)
    return float(steps[there[0]] / steps[-1]) if len(there) else None


def main_metric(line: dict) -> str:
    """The task's metric, or the loss where it has none: perplexity then says the same."""
    return next((name for name in ("accuracy", "f1", "pearson") if name in line["final"]), "loss")


def main_figure(line: dict) -> float:
    """The task's metric after the last step."""
    return line["final"][main_metric(line)]


def is_worse(difference: Mean, metric: str) -> bool:
    """Whether a difference from another method is worse than 0 by more than its interval; one seed has none."""
    return difference.half is not None and difference.value * (1 if metric == "loss" else -1) > difference.half


def recycled(line: dict) -> float | None:
    """Share of the fused pairs that the switch before had started."""
    shares = line["switches"]["recycled"]
    return statistics.mean(shares) if shares else None


def mean_lifetime(line: dict) -> float | None:
    """Intervals that a fused pair had lived."""
    counts = line["switches"]["lifetimes"]
    return sum((k + 1) * count for k, count in enumerate(counts)) / sum(counts) if counts else None
