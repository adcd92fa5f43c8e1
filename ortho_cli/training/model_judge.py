"""What a task's models are judged by beyond their outputs on a split: metrics that ask the model for more.

Found through the registry by the task's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ortho_cli.analysis.evaluation import Evaluation, Missing, Skipped
from ortho_cli.analysis.picture_features import INCEPTION
from ortho_cli.analysis.report import Part
from ortho_cli.tasks.task import Batch

from .session import Session

__all__ = ["Drawing", "ModelJudge", "judge_model"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Drawing:
    """How a generator is judged.

    Attributes:
        features: the network that tells pictures apart: `inception`, a run that classifies, a hub id or a folder.
        number: of pictures, paths and pairs at most; None: as published.
        seed: of all that is drawn.
        extent: coordinates of pairs are drawn evenly from `[-extent, extent]`.
        sefa: turn the code to the directions that its first weights stretch, before anything is drawn.
    """

    features: str = INCEPTION
    number: int | None = None
    seed: int = 0
    extent: float = 4.0
    sefa: bool = False


class ModelJudge:
    """Metrics of one model; what they say beyond numbers gathers in `parts`, `data` and `notes`.

    Args:
        session: of the run.
        model: as it is judged.
        batches: makes this process's batches of the split, on the device.
        drawing: settings.
        say: takes lines of progress.
    """

    metrics: ClassVar[dict[str, Callable[[Any], dict[str, float]]]] = {}
    """By name; each takes the judge, and may raise `Missing`."""
    unasked: ClassVar[frozenset[str]] = frozenset()
    """Names of those that are computed only where they are asked for."""
    families: ClassVar[dict[str, Callable[[Any, str], dict[str, float]]]] = {}
    """Metrics with a word behind a colon, such as another library's task: `lm-eval:gsm8k`; only where asked for."""

    def __init__(
        self, session: Session, model: nn.Module, batches: Callable[[], Iterator[Batch]], drawing: Drawing, say: Say
    ) -> None:
        self.session, self.model, self.batches, self.drawing, self.say = session, model, batches, drawing, say
        self.parts: list[Part] = []
        self.data: dict[str, Any] = {}
        self.notes: list[str] = []

    @classmethod
    def has(cls, name: str) -> bool:
        """Whether there is such a metric."""
        family, colon, word = name.partition(":")
        return name in cls.metrics or bool(colon and word and family in cls.families)

    def measured(self, name: str) -> dict[str, float]:
        """A metric's values by name.

        Raises:
            Missing: a library or weights that it needs.
        """
        if name in self.metrics:
            return self.metrics[name](self)
        family, _, word = name.partition(":")
        return self.families[family](self, word)


def judge_model(judge: ModelJudge, wanted: list[str], evaluation: Evaluation) -> None:
    """Add what a judge finds to an evaluation; a metric whose library or weights are missing is skipped by name."""
    for name in wanted:
        try:
            evaluation.metrics |= judge.measured(name)
        except Missing as missing:
            evaluation.skipped.append(Skipped(name, missing.reason, missing.command))
    evaluation.parts += judge.parts
    evaluation.data |= judge.data
    evaluation.notes += judge.notes
