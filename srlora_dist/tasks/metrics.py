"""The figures that tasks report, by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats
from sklearn import metrics as sklearn_metrics


def _correlation(measure: Callable, outputs: np.ndarray, labels: np.ndarray) -> float:
    # A correlation with a constant is undefined; a model that answers the same to everything has learnt nothing. Two
    # points lie on a line whatever they are.
    if len(labels) < 3 or np.ptp(outputs) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(measure(outputs, labels).statistic)


_MEASURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda answers, labels: float(sklearn_metrics.accuracy_score(labels, answers)),
    "f1": lambda answers, labels: float(sklearn_metrics.f1_score(labels, answers, zero_division=0.0)),
    "matthews": lambda answers, labels: float(sklearn_metrics.matthews_corrcoef(labels, answers)),
    "pearson": lambda answers, labels: _correlation(stats.pearsonr, answers, labels),
    "spearman": lambda answers, labels: _correlation(stats.spearmanr, answers, labels),
}


class Scorer:
    """Named figures of a model's outputs, each between -1 and 1.

    Args:
        names: Of ``accuracy``, ``f1``, ``matthews`` (classification), ``pearson`` and ``spearman`` (regression).
    """

    def __init__(self, *names: str) -> None:
        self.names = names

    def __call__(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Compare outputs with the truth.

        Args:
            outputs: Scores of shape (rows, classes), or values of shape (rows, 1) for a regression.
            labels: Class indices or values, of shape (rows,).

        Returns:
            One figure per name; a correlation with constant values, or of fewer than three rows, is 0.
        """
        answers = outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(axis=1)
        return {name: _MEASURES[name](answers, labels) for name in self.names}
