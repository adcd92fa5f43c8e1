"""What a run of controllable generation is judged by: pictures drawn to the hints of its evaluation split.

They are drawn once, into a folder that is gone afterwards, and scored as two folders of pictures are. To keep them, or
to share them out over many GPUs, draw with `ortho generate` and score with `ortho evaluate --generated --reference`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

from accelerate.utils import broadcast_object_list

from ortho_cli import registry
from ortho_cli.analysis.evaluation import Missing, Skipped
from ortho_cli.analysis.picture_features import load_network
from ortho_cli.analysis.picture_folder import open_folder
from ortho_cli.analysis.picture_metrics import PictureOptions
from ortho_cli.tasks.picture_grid import save_grid

from .model_judge import ModelJudge
from .processes import on_main

__all__ = ["ControlJudge"]

KINDS = ("drawn", "real")


class ControlJudge(ModelJudge):
    """Draws as many pictures of the split as are asked for (all by default), when the first metric wants them."""

    _place: Path | None = None

    def score(self, name: str) -> dict[str, float]:
        """A metric of the registry's `picture_metrics`; every process draws its share, and the main one scores.

        Raises:
            Missing: its library or weights are not here, or processes of several machines ask.
        """
        accelerator = self.session.accelerator
        if int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)) < accelerator.num_processes:
            raise Missing("pictures are drawn into a folder of one machine", "run it on one")
        if self._place is None:
            self._place = self._drawn()
        found: list[dict[str, float] | Skipped] = [{}]
        on_main(accelerator, lambda: found.__setitem__(0, self._scored(name)))
        if accelerator.num_processes > 1:
            broadcast_object_list(found)
        if isinstance(found[0], Skipped):
            raise Missing(found[0].reason, found[0].command)
        return found[0]

    def _scored(self, name: str) -> dict[str, float] | Skipped:
        assert self._place is not None
        device = self.session.accelerator.device
        options = PictureOptions(partial(load_network, self.drawing.features, device), device, say=self.say)
        folders = (open_folder(self._place / kind) for kind in KINDS)
        try:
            found: dict[str, float] | Skipped = registry.resolve("picture_metrics", name)(*folders, options)
        except Missing as missing:
            return Skipped(name, missing.reason, missing.command)
        return found

    def _drawn(self) -> Path:
        """A folder with pictures as they were drawn, and the real ones that their hints are from, by the same names."""
        accelerator, task = self.session.accelerator, cast(Any, self.session.task)
        made = [tempfile.mkdtemp(prefix="ortho-control-") if accelerator.is_main_process else ""]
        root = Path(broadcast_object_list(made)[0] if accelerator.num_processes > 1 else made[0])
        if accelerator.is_main_process:
            weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)
            for kind in KINDS:
                (root / kind).mkdir()
        accelerator.wait_for_everyone()
        wanted = min(len(task.dataset("eval")), self.drawing.number or len(task.dataset("eval")))
        for batch in self.batches():
            chosen = (batch["index"] < wanted) & (batch["counted"] > 0)
            if not chosen.any():
                continue
            places = batch["index"][chosen].cpu()
            drawn = task.drawn(places, batch["hint"][chosen], self.drawing.seed)
            for place, mine, real in zip(places.tolist(), drawn, batch["image"][chosen], strict=True):
                for kind, picture in zip(KINDS, (mine, real), strict=True):
                    save_grid(picture[None], root / kind / f"{place:06d}.png", 1, enlarge=False)
            self.say(f"drew {len(list((root / KINDS[0]).iterdir())):,} of {wanted:,} pictures")
        accelerator.wait_for_everyone()
        steps, guidance = task.config.steps, task.config.guidance
        self.notes.append(f"{wanted:,} pictures were drawn, in {steps} steps at guidance {guidance:g}")
        return root

    metrics: ClassVar[dict[str, Any]] = {
        name: partial(lambda judge, name: judge.score(name), name=name)
        for name in ("canny", "landmarks", "segments", "fid", "kid")
    }
    unasked: ClassVar[frozenset[str]] = frozenset(metrics)
