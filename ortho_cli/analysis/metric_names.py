"""What the name of a metric tells: how to write its values, which direction is better, how to title it.

Names are those of `metrics.jsonl`: `eval/accuracy`, `train/loss`, `method/hra/defect_mean`.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable
from typing import Literal

__all__ = ["better", "is_share", "metric_title", "metric_value", "number_format", "scale", "slug", "tail"]

LESS_IS_BETTER = re.compile(
    r"(^|_)(loss|error|mse|mae|perplexity|ppl|fid|kid|lpips|nll|wer|penalty|defect|distance|failures)($|_|@)"
)
SHARES = re.compile(r"(^|_)(accuracy|f1|precision|recall|share|error|iou|failures|vp_score)($|_|@|\d)")


def tail(name: str) -> str:
    """The last part of a name.

    >>> tail("eval/accuracy")
    'accuracy'
    """
    return name.rpartition("/")[2]


def better(name: str) -> Literal["min", "max"]:
    """Whether less or more of a metric is better.

    >>> better("eval/loss"), better("eval/accuracy_top5")
    ('min', 'max')
    """
    return "min" if LESS_IS_BETTER.search(tail(name)) else "max"


def is_share(name: str) -> bool:
    """Whether a metric is a share of 1, which people read in percent."""
    return SHARES.search(tail(name)) is not None


def scale(name: str) -> float:
    """What values are multiplied by to be shown: 100 for shares."""
    return 100.0 if is_share(name) else 1.0


def metric_title(name: str, *, unit: bool = False) -> str:
    """A metric in words.

    >>> metric_title("eval/accuracy_top5", unit=True), metric_title("train/lr"), metric_title("method/hra/angle_mean")
    ('top-5 accuracy (%)', 'learning rate', 'hra angle mean')
    """
    parts = name.split("/")
    last = {"lr": "learning rate"}.get(parts[-1], parts[-1].replace("_", " "))
    match = re.fullmatch(r"(.+) top(\d+)", last)
    last = f"top-{match[2]} {match[1]}" if match else last
    text = " ".join([*parts[1:-1], last])
    text = f"train {text}" if parts[0] == "train" and parts[-1] not in ("lr", "gradient_norm") else text
    return f"{text} (%)" if unit and is_share(name) else text


def metric_value(name: str, value: float) -> str:
    """A value for people.

    >>> metric_value("eval/accuracy", 0.98333), metric_value("eval/loss", 0.0462233)
    ('98.33 %', '0.0462')
    """
    shown = format(value * scale(name), number_format(name, [value]))
    return f"{shown} %" if is_share(name) else shown


def number_format(name: str, values: Iterable[float]) -> str:
    """One format for all values of a metric, already multiplied by its scale: two decimals of a percentage, else
    three significant digits of the value in the middle.

    >>> number_format("eval/loss", [0.046, 0.021, 3.0]), number_format("method/gor/penalty", [4.5e-7])
    ('.4f', '.2e')
    """
    if is_share(name):
        return ".2f"
    sizes = [abs(value) for value in values if math.isfinite(value) and value != 0.0]
    if not sizes:
        return ".4f"
    middle = statistics.median(sizes)
    if not 1e-3 <= middle < 1e6:
        return ".2e"
    return f".{max(0, 2 - math.floor(math.log10(middle)))}f"


def slug(name: str) -> str:
    """A metric's name as a file's.

    >>> slug("eval/accuracy_top5")
    'eval-accuracy_top5'
    """
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "metric"
