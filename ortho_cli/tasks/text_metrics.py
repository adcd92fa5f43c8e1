"""The metrics of GLUE, by scikit-learn and scipy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["METRICS"]

Values = NDArray[np.float64]


def accuracy(labels: Values, predicted: Values) -> float:
    """The share of samples that are right.

    >>> accuracy(np.array([0.0, 1.0]), np.array([0.0, 0.0]))
    0.5
    """
    return float(np.mean(labels == predicted))


def f1(labels: Values, predicted: Values) -> float:
    """The harmonic mean of precision and recall of class 1; 0 where nothing is of it."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, zero_division=0.0))


def macro_f1(labels: Values, predicted: Values) -> float:
    """The mean over classes of the harmonic mean of precision and recall."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, average="macro", zero_division=0.0))


def matthews(labels: Values, predicted: Values) -> float:
    """The correlation of predicted and true classes; 0 where all predictions are the same."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def pearson(labels: Values, predicted: Values) -> float:
    """The linear correlation of scores; 0 where one side is constant, which has none."""
    from scipy.stats import pearsonr

    return 0.0 if np.ptp(labels) == 0 or np.ptp(predicted) == 0 else float(pearsonr(predicted, labels).statistic)


def spearman(labels: Values, predicted: Values) -> float:
    """The correlation of ranks; 0 where one side is constant."""
    from scipy.stats import spearmanr

    return 0.0 if np.ptp(labels) == 0 or np.ptp(predicted) == 0 else float(spearmanr(predicted, labels).statistic)


METRICS: dict[str, Callable[[Values, Values], float]] = {
    metric.__name__: metric for metric in (accuracy, f1, macro_f1, matthews, pearson, spearman)
}
"""By name; each takes labels and predictions `(N,)`: numbers of classes, or scores."""
