"""Pictures that a DreamBooth run draws: those of the class, before training, and samples of its prompts, during it.

Each picture is a function of the model, its prompt and its own seed, whatever the batch; what is there is not drawn
again, and a folder that was drawn otherwise is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ortho_cli.checkpoints.output import atomic
from ortho_cli.errors import OutputError
from ortho_cli.linalg.content import content_hash

from .pictures import PictureFiles, decoded

if TYPE_CHECKING:
    from PIL.Image import Image

    from ortho_cli.models.stable_diffusion import StableDiffusion

__all__ = ["MANIFEST", "Drawn", "class_pictures", "draw", "draw_class"]

MANIFEST = "manifest.jsonl"
PART = 4  # pictures at a time


@dataclass(frozen=True)
class Drawn:
    """How pictures are drawn; with what they are drawn of and by, the head of a folder's manifest."""

    size: int
    steps: int
    guidance: float


@torch.no_grad()
def draw(model: StableDiffusion, prompts: Sequence[str], seeds: Sequence[int], how: Drawn) -> Iterator[Image]:
    """Draw a picture of each prompt by DPM-Solver++ (arXiv:2211.01095), one seed a picture."""
    from diffusers import DPMSolverMultistepScheduler

    schedule: Any = DPMSolverMultistepScheduler
    pipeline = model.pipeline(schedule.from_config(model.scheduler.config))
    for start in range(0, len(prompts), PART):
        part = slice(start, start + PART)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]]
        yield from pipeline(
            list(prompts[part]), generator=generators, num_inference_steps=how.steps, guidance_scale=how.guidance,
            width=how.size, height=how.size,
        ).images  # fmt: skip


def draw_class(model: StableDiffusion, folder: Path, prompt: str, count: int, how: Drawn) -> int:
    """See that a folder holds pictures of a class, `000000.png` and on, and draw those that are missing.

    Pictures that nobody drew here, and no manifest, are taken as they are. All are decoded once.

    Returns:
        How many were drawn.

    Raises:
        OutputError: the folder holds pictures that were drawn otherwise, or by other weights.
        RecipeError: one of them is broken.

    Cost: hashes the model's weights, two seconds for a thousand million, where the folder has a manifest or gets one.
    """
    names = [_name(number) for number in range(count)]
    missing = [number for number, name in enumerate(names) if not (folder / name).is_file()]
    path = folder / MANIFEST
    head = {"prompt": prompt, **asdict(how)}
    if path.is_file() or missing:
        head["weights"] = content_hash(dict(model.named_parameters()))
    if path.is_file():
        _check_same(folder, json.loads(path.read_text("utf-8").partition("\n")[0]), head)
    elif missing:
        if folder.is_dir() and any(folder.iterdir()):
            raise OutputError(
                f"{folder} holds {count - len(missing)} of {count} class pictures, and no {MANIFEST} to go on by",
                hint=f"name one's own {_name(0)}, {_name(1)} and on, and their number: task.class_pictures; or another "
                "task.class_folder",
            )
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(path) as partial:
            partial.write_text(json.dumps(head) + "\n", "utf-8")
    for number, picture in zip(missing, draw(model, [prompt] * len(missing), missing, how), strict=True):
        with atomic(folder / _name(number)) as partial:
            picture.save(partial, format="PNG")
    for name in set(names) - {_name(number) for number in missing}:
        decoded(folder / name, str(folder / name))
    return len(missing)


def class_pictures(folder: Path, count: int) -> PictureFiles:
    """The pictures that `draw_class` left.

    Raises:
        OutputError: they are not to be seen from here.
    """
    names = [_name(number) for number in range(count)]
    lost = [name for name in names if not (folder / name).is_file()]
    if lost:
        raise OutputError(
            f"{folder} lacks {len(lost)} of {count} class pictures, first {lost[0]}",
            hint="processes on several machines need a task.class_folder that all of them see",
        )
    return PictureFiles(folder, names)


def _name(number: int) -> str:
    return f"{number:06d}.png"


def _check_same(folder: Path, found: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    for key, value in head.items():
        if found.get(key) != value:
            raise OutputError(
                f"{folder} holds class pictures drawn otherwise: {key} was {found.get(key)!r}, now {value!r}",
                hint="name another task.class_folder",
            )
