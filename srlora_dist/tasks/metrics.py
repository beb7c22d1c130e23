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
        names: Some of ``accuracy``, ``f1`` (of two classes), ``matthews`` (classification), ``pearson`` and
            ``spearman`` (regression).

    Raises:
        ValueError: A name is not known, or there is none.
    """

    def __init__(self, *names: str) -> None:
        unknown = [name for name in names if name not in _MEASURES]
        if unknown or not names:
            raise ValueError(f"Scorer knows {', '.join(_MEASURES)}: choose some of them, and not {unknown or 'none'}")
        self.names = names

    def require_labels(self, num_labels: int) -> None:
        """Refuse figures that cannot be computed of so many classes.

        Raises:
            ValueError: ``f1`` of other than two classes, or a figure of classes for a regression.
        """
        unfit = {"f1"} if num_labels > 2 else {"accuracy", "f1", "matthews"} if num_labels == 1 else set()
        wrong = [name for name in self.names if name in unfit]
        if wrong:
            what = "a regression" if num_labels == 1 else f"{num_labels} classes"
            raise ValueError(f"{', '.join(wrong)} cannot be computed of {what}: give the Scorer other names")

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
