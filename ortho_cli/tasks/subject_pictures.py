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

if TYPE_CHECKING:
    from PIL.Image import Image

    from ortho_cli.models.stable_diffusion import StableDiffusion

__all__ = ["MANIFEST", "Drawn", "draw", "draw_class"]

MANIFEST = "manifest.jsonl"
PART = 4  # pictures at a time


@dataclass(frozen=True)
class Drawn:
    """How pictures are drawn; the head of a folder's manifest."""

    base: str
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

    Pictures that nobody drew here, and no manifest, are taken as they are.

    Returns:
        How many were drawn.

    Raises:
        OutputError: the folder holds pictures that were drawn otherwise.
    """
    missing = [number for number in range(count) if not (folder / _name(number)).is_file()]
    head = {"prompt": prompt, **asdict(how)}
    path = folder / MANIFEST
    if path.is_file():
        _check_same(folder, json.loads(path.read_text("utf-8").partition("\n")[0]), head)
    elif missing:
        if folder.is_dir() and any(folder.iterdir()):
            raise OutputError(
                f"{folder} holds {count - len(missing)} of {count} class pictures, and no {MANIFEST} to go on by",
                hint="name another task.class_folder, or as many pictures as there are: task.class_pictures",
            )
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(path) as partial:
            partial.write_text(json.dumps(head) + "\n", "utf-8")
    for number, picture in zip(missing, draw(model, [prompt] * len(missing), missing, how), strict=True):
        with atomic(folder / _name(number)) as partial:
            picture.save(partial, format="PNG")
    return len(missing)


def _name(number: int) -> str:
    return f"{number:06d}.png"


def _check_same(folder: Path, found: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    for key, value in head.items():
        if found.get(key) != value:
            raise OutputError(
                f"{folder} holds class pictures drawn otherwise: {key} was {found.get(key)!r}, now {value!r}",
                hint="name another task.class_folder",
            )
