"""What a run of controllable generation is judged by: pictures drawn to the hints of its evaluation split.

They are drawn once, into a folder that is gone afterwards, and scored as two folders of pictures are. To keep them, or
to share them out over many GPUs, draw with `ortho generate` and score with `ortho evaluate --generated --reference`.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ortho_cli import registry
from ortho_cli.analysis.evaluation import Missing, Skipped
from ortho_cli.analysis.picture_features import load_network
from ortho_cli.analysis.picture_folder import PictureFolder, open_folder
from ortho_cli.analysis.picture_metrics import PictureOptions
from ortho_cli.tasks.picture_grid import save_grid

from .model_judge import ModelJudge

__all__ = ["ControlJudge"]

EVERY = 20  # pictures between two lines of progress


class ControlJudge(ModelJudge):
    """Draws as many pictures of the split as are asked for (all by default), when the first metric wants them."""

    _place: Path | None = None

    def score(self, name: str) -> dict[str, float]:
        """A metric of the registry's `picture_metrics`.

        Raises:
            Missing: its library or weights are not here, or several processes ask.
        """
        if self.session.accelerator.num_processes > 1:
            raise Missing("pictures are drawn to be judged by one process", "run it without accelerate launch")
        device = self.session.accelerator.device
        options = PictureOptions(partial(load_network, self.drawing.features, device), device, say=self.say)
        found: dict[str, float] | Skipped = registry.resolve("picture_metrics", name)(*self._folders(), options)
        if isinstance(found, Skipped):
            raise Missing(found.reason, found.command)
        return found

    def _folders(self) -> tuple[PictureFolder, PictureFolder]:
        """Pictures as they were drawn, and the real ones that their hints are from, by the same names."""
        if self._place is None:
            self._place = Path(tempfile.mkdtemp(prefix="ortho-control-"))
            weakref.finalize(self, shutil.rmtree, self._place, ignore_errors=True)
            self._draw(self._place)
        return open_folder(self._place / "drawn"), open_folder(self._place / "real")

    def _draw(self, root: Path) -> None:
        task: Any = self.session.task
        wanted = min(len(task.dataset("eval")), self.drawing.number or len(task.dataset("eval")))
        for kind in ("drawn", "real"):
            (root / kind).mkdir()
        done = 0
        for batch in self.batches():
            chosen = slice(0, wanted - done)
            places = batch["index"][chosen].cpu()
            drawn = task.drawn(places, batch["hint"][chosen], self.drawing.seed)
            for place, mine, real in zip(places.tolist(), drawn, batch["image"][chosen], strict=True):
                _save(mine, root / "drawn" / f"{place:06d}.png")
                _save(real, root / "real" / f"{place:06d}.png")
            if done // EVERY != (done + len(places)) // EVERY:
                self.say(f"drew {done + len(places):,} of {wanted:,} pictures")
            done += len(places)
            if done >= wanted:
                break
        self.notes.append(
            f"{done:,} pictures were drawn, in {task.config.steps} steps at guidance {task.config.guidance:g}"
        )

    metrics: ClassVar[dict[str, Any]] = {
        name: partial(lambda judge, name: judge.score(name), name=name)
        for name in ("canny", "landmarks", "segments", "fid", "kid")
    }
    unasked: ClassVar[frozenset[str]] = frozenset(metrics)


def _save(picture: Tensor, path: Path) -> None:
    save_grid(picture[None], path, 1, enlarge=False)
