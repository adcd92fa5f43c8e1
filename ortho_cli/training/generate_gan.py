"""Make pictures with a run's GAN: numbered ones, traversals of its code, or pairs to judge its code by.

Every picture is a function of the run, the seed and its number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ortho_cli import registry
from ortho_cli.errors import UsageError
from ortho_cli.tasks.gan_latents import codes, pairs, sefa_rotation, traversal
from ortho_cli.tasks.picture_grid import grid, save_grid
from ortho_cli.tasks.picture_video import check_video, save_video

from .evaluate import find_checkpoint, restore_for_judging
from .generate import Made, Maker, Progress, Source
from .generate_folder import OutputFolder
from .session import open_session

__all__ = ["MAKER", "GANMaking", "Wanted"]

PART = 64  # pictures at a time
LABELS = "labels.npy"
FRAMES = 48  # of a film from one end of a coordinate to the other; then it runs back
# The published defaults: traversals and the pairs' shared noise are truncated, samples are not.
NUMBER = {"pictures": 64, "traverse": 8}
# What an option is of, where not of all.
KINDS = {
    "steps": ("traverse",), "video": ("traverse",), "extent": ("traverse", "pairs"),
    "truncation": ("pictures", "traverse"),
}  # fmt: skip
TITLES = {"pictures": "pictures", "traverse": "a traversal", "pairs": "pairs"}
TRUNCATION = {"pictures": 1.0, "traverse": 0.7, "pairs": 1.0}


@dataclass(frozen=True)
class Wanted:
    """What is to be made; the first line of the manifest.

    `kind` is `pictures`, `traverse` or `pairs`. `number`: pictures or pairs; of a traversal the rows of a grid.
    `video`: of a traversal a film of each coordinate too, "mp4" or "gif".
    """

    kind: str
    number: int
    seed: int = 0
    steps: int = 9
    extent: float = 4.0
    truncation: float = 1.0
    sefa: bool = False
    video: str | None = None

    @property
    def head(self) -> dict[str, Any]:
        """What decides every file; more files may be asked for later."""
        open_ended = ("video", "number") if self.kind == "pictures" else ("video",)
        return {key: value for key, value in asdict(self).items() if key not in open_ended}


def wanted_of(asked: Mapping[str, Any]) -> Wanted:
    """The options that were typed, with the defaults of the others.

    Raises:
        UsageError: some of them contradict each other.
    """
    number, pairs, truncation, extent = (asked.get(key) for key in ("num", "pairs", "truncation", "extent"))
    if asked.get("traverse") and pairs is not None:
        raise UsageError("--traverse and --pairs make different things", hint="leave one of them out")
    if pairs is not None and number is not None:
        raise UsageError("--pairs says how many already", hint="leave out --num")
    if any(value is not None and value <= 0 for value in (extent, truncation)):
        raise UsageError("--extent and --truncation are above 0", hint="e.g. --extent 4 --truncation 0.7")
    if asked.get("steps", 2) < 2:
        raise UsageError("--steps: a traversal has 2 values at least", hint="e.g. --steps 9")
    kind = "traverse" if asked.get("traverse") else "pairs" if pairs is not None else "pictures"
    for option, kinds in KINDS.items():
        if asked.get(option) is not None and kind not in kinds:
            hint = "leave it out" if kind in asked else "add --traverse"
            raise UsageError(f"--{option} is of {' and '.join(TITLES[each] for each in kinds)}", hint=hint)
    if asked.get("video") is not None:
        check_video(asked["video"])
    same = {key: asked[key] for key in ("seed", "steps", "extent", "sefa", "video") if key in asked}
    return Wanted(kind, pairs or number or NUMBER[kind], truncation=truncation or TRUNCATION[kind], **same)


class GANMaking:
    """Pictures of a run's generator, averaged where the run averages.

    Args:
        source: the run.
        asked: the options that were typed.

    Raises:
        UsageError: they contradict each other.
    """

    def __init__(self, source: Source, asked: Mapping[str, Any]) -> None:
        self.source, self.checkpoint = source, asked.get("checkpoint")
        self.wanted = wanted_of(asked)

    def planned(self) -> dict[str, Any]:
        """How many files there will be, manifest excluded; the model is built without weights."""
        recipe, wanted = self.source.recipe, self.wanted
        if wanted.kind != "traverse":
            return {"kind": wanted.kind, "files": wanted.number + (wanted.kind == "pairs")}
        task = registry.resolve("tasks", recipe.task.name)(recipe.task, recipe.data, seed=recipe.train.seed)
        with torch.device("meta"):
            latents = task.build_model(recipe.model).generator.latents
        return {"kind": wanted.kind, "files": len(latents) * (1 if wanted.video is None else 2)}

    def make(self, output: Path, progress: Progress | None) -> Made:
        """Fill the folder.

        Raises:
            CheckpointError: no such checkpoint.
            OutputError: the folder holds what was made otherwise.
        """
        session = open_session(self.source.recipe, judging=True)
        state = find_checkpoint(self.source.folder, self.checkpoint)
        folder = OutputFolder(output, {**self.wanted.head, "run": self.source.folder.name, "checkpoint": state.name})
        restore_for_judging(session, state)
        with session.for_judging() as model:
            generator: Any = model.get_submodule("generator")
            files = [file for file in _files(generator, self.wanted) if folder.lacks(file[0], file[1])]
            if progress is not None:
                progress.start(len(files))
            for name, line, make in files:
                folder.write(name, line, make)
                if progress is not None:
                    progress.advance(1)
        return Made(folder.made, folder.skipped, state.name, also=[folder.manifest.name])


OPTIONS = "num", "traverse", "pairs", "checkpoint", "seed", "steps", "extent", "truncation", "sefa", "video"
MAKER = Maker(frozenset(OPTIONS), GANMaking)


Make = Callable[[Path], None]


def _files(generator: Any, wanted: Wanted) -> Iterator[tuple[str, dict[str, Any], Make]]:
    """Each file's name, its line in the manifest, and what writes it."""
    latents, columns = len(generator.latents), generator.noise_dim
    rotation = sefa_rotation(generator.latent_matrices()) if wanted.sefa else None

    def pictures(noise: Tensor) -> Tensor:
        noise = noise.to(next(generator.parameters()).device)
        if rotation is not None:
            noise = torch.cat([noise[:, :latents] @ rotation.T, noise[:, latents:]], dim=1)
        return torch.cat([_made(generator, part) for part in torch.split(noise, PART)])

    if wanted.kind == "traverse":
        held = codes(wanted.seed, torch.arange(wanted.number), columns, wanted.truncation)
        values = torch.linspace(-wanted.extent, wanted.extent, wanted.steps)
        for column, name in enumerate(generator.latents):
            moved = traversal(held, column, values)
            yield (
                f"traverse_{name}.png",
                {"coordinate": name, "values": values.tolist()},
                _grid(pictures, moved, wanted.steps),
            )
            if wanted.video is not None:
                yield f"traverse_{name}.{wanted.video}", {"coordinate": name}, _film(pictures, held, column, wanted)
        return
    index = torch.arange(wanted.number)
    if wanted.kind == "pictures":
        for number in range(wanted.number):
            noise = codes(wanted.seed, index[number : number + 1], columns, wanted.truncation)
            yield f"{number:06d}_0.png", {"number": number}, _grid(pictures, noise, 1, enlarge=False)
        return
    first, second, labels = pairs(wanted.seed, index, latents, columns, wanted.extent)
    for number in range(wanted.number):
        both = torch.stack([first[number], second[number]])
        yield f"pair_{number:06d}.jpg", {"number": number}, _grid(pictures, both, 2, enlarge=False)
    yield LABELS, {"shape": list(labels.shape)}, lambda path: _save(path, labels)


def _made(generator: nn.Module, noise: Tensor) -> Tensor:
    pictures: Tensor = generator(noise)
    return pictures


def _grid(pictures: Callable[[Tensor], Tensor], noise: Tensor, columns: int, *, enlarge: bool = True) -> Make:
    return lambda path: save_grid(pictures(noise), path, columns, enlarge=enlarge)


def _film(pictures: Callable[[Tensor], Tensor], held: Tensor, column: int, wanted: Wanted) -> Make:
    """All rows of a traversal at once, a value a frame, forth and back."""

    def make(path: Path) -> None:
        values = torch.linspace(-wanted.extent, wanted.extent, FRAMES)
        frames = [grid(pictures(traversal(held, column, value[None]))) for value in values]
        save_video([*frames, *frames[-2:0:-1]], path, wanted.video or "")

    return make


def _save(path: Path, values: Tensor) -> None:
    with path.open("wb") as file:  # numpy would add a suffix to a name
        np.save(file, values.numpy())
