"""What a DreamBooth run is judged by: the samples of each of its epochs against the subject's pictures.

Half of the pictures choose the epoch and the other half is reported (`analysis/subject_metrics.py`). HRA's own choice,
by the scores that are reported, stands beside it in the table, so that its figures can be compared with the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from PIL.Image import Image

from ortho_cli.analysis.evaluation import Missing, Skipped
from ortho_cli.analysis.picture_features import INCEPTION, load_network
from ortho_cli.analysis.picture_folder import PictureFolder, open_folder
from ortho_cli.analysis.picture_metrics import PictureOptions, Settings, measure_pictures
from ortho_cli.analysis.subject_metrics import halves, select_epoch, select_epoch_as_published
from ortho_cli.analysis.table import Table
from ortho_cli.tasks.pictures import Pictures

from .model_judge import ModelJudge

__all__ = ["SubjectJudge"]

METRICS = ("dino", "clip-i", "clip-t", "lpips")
Scores = dict[str, float]


class _Subject(PictureFolder):
    """The subject's pictures, wherever they are, as references."""

    pictures: Pictures

    @classmethod
    def of(cls, pictures: Pictures, places: Sequence[int]) -> _Subject:
        """Those at some places."""
        made = cls(Path("subject"), tuple(map(str, places)))
        object.__setattr__(made, "pictures", pictures)  # a frozen dataclass
        return made

    def open(self, name: str) -> Image:
        return self.pictures.open(int(name)).convert("RGB")


class SubjectJudge(ModelJudge):
    """A run's samples; the model itself is not asked."""

    settings: ClassVar[Settings] = {}
    """Of the metrics; those of the published figures where there are none."""

    def subject(self) -> Scores:
        """Scores of the chosen epoch by the half of the pictures that did not choose it.

        Raises:
            Missing: the run kept no samples, or no metric's network is here.
        """
        steps = sorted(path for path in (self.session.folder / "samples").glob("step-*") if path.is_dir())
        if not steps:
            raise Missing("the run drew no samples", "train with: --set run.samples_every=1")
        pictures = self.session.task.dataset("eval").subject  # type: ignore[attr-defined]
        rows = [list(self._scores(open_folder(step), pictures)) for step in steps]
        chooses, reported, whole = ([row[part] for row in rows] for part in range(3))
        if not reported[0]:
            raise Missing("no network of its metrics is here", None)
        chosen = select_epoch({name: [row[name] for row in chooses] for name in chooses[0]})
        published = select_epoch_as_published({name: [row[name] for row in whole] for name in whole[0]})
        names = tuple(reported[0])
        marks = {chosen: "chosen", published: "as published"} | ({chosen: "both"} if chosen == published else {})
        self.parts.append(Table(
            "epochs", "Samples by step", ("step", *names, *(f"{name} of all" for name in names), "choice"),
            tuple((int(step.name.rpartition("-")[2]), *row.values(), *other.values(), marks.get(place, ""))
                  for place, (step, row, other) in enumerate(zip(steps, reported, whole, strict=True))),
            "Half of the pictures choose the step by its ranks, the other half is reported. As published, scores of "
            "all pictures over their ranges choose, and those of all are reported.",
        ))  # fmt: skip
        self.data["as_published"] = {"step": steps[published].name, **whole[published]}
        self.notes.append(f"reported is {steps[chosen].name}, chosen by pictures that are not reported")
        return reported[chosen]

    def _scores(self, made: PictureFolder, real: Pictures) -> Iterator[Scores]:
        """By the half that chooses, by the half that is reported, and by all pictures."""
        numbers = range(len(real))
        parts = [*zip(halves(made.names), halves(numbers), strict=True), (list(made.names), list(numbers))]
        device = self.session.accelerator.device
        for names, places in parts:
            options = PictureOptions(partial(load_network, INCEPTION, device), device, say=self.say)
            part = PictureFolder(made.root, tuple(names), {name: made.records.get(name, {}) for name in names})
            found, skipped = measure_pictures(part, _Subject.of(real, places), METRICS, options, self.settings)
            self._tell(skipped)
            yield found

    def _tell(self, skipped: Sequence[Skipped]) -> None:
        """Each metric that is left out, once."""
        self.notes += [text for text in map(str, skipped) if text not in self.notes]

    metrics: ClassVar[dict[str, Any]] = {"subject": subject}
