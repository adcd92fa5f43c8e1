"""What a classifier's outputs say beyond its accuracy: class by class, what it confuses, how sure it is.

Every metric is a library's: scikit-learn's, or torchmetrics' where that is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .evaluation import Judge, Metric
from .figure import Bars, Heatmap
from .report import Part
from .table import Spread, Table

__all__ = ["JUDGE", "Predictions", "class_data", "class_parts", "confusion"]

MOST_CLASSES = 60  # more are not drawn one by one: only the worst, and no matrix
NUMBERED_CLASSES = 20  # up to that many, the matrix has its numbers in its cells
MOST_CONFUSED = 15
CALIBRATION_BINS = 15  # as Guo et al. 2017, arXiv:1706.04599


@dataclass(frozen=True)
class Predictions:
    """A split's outputs and labels.

    Attributes:
        logits: `(N, C)` float.
        labels: `(N,)` of 0 to C - 1.
        classes: C names.
        kept: the classes that metrics are over; None: all.
    """

    logits: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    kept: tuple[int, ...] | None = None

    @property
    def of_kept(self) -> Predictions:
        """Those of the kept classes' samples."""
        if self.kept is None:
            return self
        chosen = torch.isin(self.labels, torch.tensor(self.kept))
        return Predictions(self.logits[chosen], self.labels[chosen], self.classes, self.kept)

    @property
    def arrays(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Labels, and the classes that were predicted."""
        return self.labels.numpy(), self.logits.argmax(-1).numpy()


def balanced_accuracy(predictions: Predictions) -> float:
    """Average over classes the share of their samples that is right."""
    from sklearn.metrics import recall_score

    labels, predicted = predictions.of_kept.arrays
    return float(recall_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0.0))


def f1_macro(predictions: Predictions) -> float:
    """Average over classes the harmonic mean of precision and recall."""
    from sklearn.metrics import f1_score

    labels, predicted = predictions.of_kept.arrays
    return float(f1_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0.0))


def calibration_error(predictions: Predictions) -> float:
    """Average over bins of confidence how far it is from the share that is right (expected calibration error)."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    own = predictions.of_kept
    probabilities, count = own.logits.softmax(-1), own.logits.shape[-1]
    return float(multiclass_calibration_error(probabilities, own.labels, count, n_bins=CALIBRATION_BINS, norm="l1"))


def confusion(predictions: Predictions) -> NDArray[np.int64]:
    """Count for each class (row) as what (column) its samples were predicted: `(C, C)`."""
    from sklearn.metrics import confusion_matrix

    labels, predicted = predictions.arrays
    counts: NDArray[np.int64] = confusion_matrix(labels, predicted, labels=np.arange(len(predictions.classes)))
    return counts


def class_data(predictions: Predictions) -> dict[str, Any]:
    """The classes one by one, for `evaluation.json`; the whole matrix up to `MOST_CLASSES` classes."""
    counts = confusion(predictions)
    classes = [
        {"class": name, "samples": samples, "accuracy": share, "kept": kept}
        for name, samples, share, kept in _classes(predictions, counts)
    ]
    return {"classes": classes, **({"confusion": counts.tolist()} if len(counts) <= MOST_CLASSES else {})}


def class_parts(predictions: Predictions) -> Iterator[Part]:
    """Pictures and tables: accuracy by class, the confusion matrix, the commonest confusions."""
    counts = confusion(predictions)
    rows = [row for row in _classes(predictions, counts) if row[1]]
    shown = rows if len(rows) <= MOST_CLASSES else sorted(rows, key=lambda row: row[2] or 0.0)[:MOST_CLASSES]
    yield Bars(
        "accuracy-by-class", "Accuracy by class", tuple(row[0] for row in shown),
        tuple(100 * (row[2] or 0.0) for row in shown), value_label="accuracy (%)", value_format=".2f",
        note="" if len(shown) == len(rows) else f"The {len(shown)} worst of {len(rows)} classes.",
    )  # fmt: skip
    if len(counts) <= MOST_CLASSES:
        totals = np.maximum(counts.sum(1, keepdims=True), 1)
        names = predictions.classes
        yield Heatmap(
            "confusion", "Confusion matrix", names, names,
            tuple(tuple(float(share) or None for share in row) for row in counts / totals),
            x_label="predicted", y_label="true", value_label="share of the class", low=0.0, high=1.0,
            cell_format=".2f" if len(counts) <= NUMBERED_CLASSES else None,
        )  # fmt: skip
    yield Table(
        "classes", "Classes", ("class", "samples", "accuracy (%)"),
        tuple((name, samples, None if share is None else Spread(100 * share, None, ".2f"))
              for name, samples, share, _ in _classes(predictions, counts)),
        note=_which(predictions),
    )  # fmt: skip
    wrong = [(int(counts[a, b]), a, b) for a, b in zip(*np.nonzero(counts), strict=True) if a != b]
    worst = sorted(wrong, key=lambda item: -item[0])[:MOST_CONFUSED]
    if worst:
        named = tuple((predictions.classes[a], predictions.classes[b], count) for count, a, b in worst)
        yield Table("confusions", "Most often confused", ("true", "predicted", "samples"), named)


def _classes(predictions: Predictions, counts: NDArray[np.int64]) -> Iterator[tuple[str, int, float | None, bool]]:
    """Name, samples, share that is right (None without samples), and whether metrics are over it."""
    for place, name in enumerate(predictions.classes):
        samples = int(counts[place].sum())
        share = float(counts[place, place] / samples) if samples else None
        yield name, samples, share, predictions.kept is None or place in predictions.kept


def _which(predictions: Predictions) -> str:
    if predictions.kept is None:
        return ""
    names = ", ".join(predictions.classes[place] for place in predictions.kept)
    return f"The metrics above are over the classes {names} alone; here are all."


JUDGE: Judge[Predictions] = Judge(
    own=("accuracy", "accuracy_top5", "accuracy_other_classes", "accuracy_among_other_classes", "loss"),
    target="label",
    collect=lambda task, outputs, labels: Predictions(outputs, labels, task.images("eval").classes, task.data.classes),
    metrics={
        "balanced_accuracy": Metric(balanced_accuracy),
        "f1_macro": Metric(f1_macro),
        "calibration_error": Metric(calibration_error, "torchmetrics", "pip install 'ortho-cli[eval]'"),
    },
    parts=class_parts,
    data=class_data,
)
