"""Make pictures with a run's generator: numbered ones, traversals of its code, or pairs to judge its code by.

Every picture is a function of the run, the seed and its number: what is there already is skipped, so that a killed job
goes on, and a folder that was made otherwise is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ortho_cli import registry
from ortho_cli.analysis.run_folder import open_run
from ortho_cli.checkpoints.output import atomic
from ortho_cli.errors import OutputError, UsageError
from ortho_cli.recipe.train import load_train
from ortho_cli.tasks.gan_latents import codes, pairs, sefa_rotation, traversal
from ortho_cli.tasks.picture_grid import save_grid

from .evaluate import find_checkpoint, restore_for_judging
from .log import read_lines
from .run_folder import RECIPE
from .session import open_session

__all__ = ["MANIFEST", "Wanted", "generate_run", "planned"]

MANIFEST = "manifest.jsonl"
PART = 64  # pictures at a time
LABELS = "labels.npy"


@dataclass(frozen=True)
class Wanted:
    """What is to be made; the first line of the manifest.

    `kind` is `pictures`, `traverse` or `pairs`. `number`: pictures or pairs; of a traversal the rows of a grid.
    """

    kind: str
    number: int
    seed: int = 0
    steps: int = 9
    extent: float = 4.0
    truncation: float = 1.0
    sefa: bool = False


def generate_run(folder: Path, output: Path, wanted: Wanted, *, checkpoint: str | None = None) -> dict[str, Any]:
    """Make what is wanted with the generator of a run, averaged where the run averages.

    Args:
        folder: of the run.
        output: a folder, made where it is not there.
        wanted: kind, number and settings.
        checkpoint: `best`, `last` or a step; None: the best where there is one, else the last.

    Returns:
        `checkpoint`, `made` and `skipped` (file names).

    Raises:
        UsageError: the run has no generator.
        CheckpointError: no run, or no such checkpoint.
        OutputError: the folder holds what was made otherwise.
    """
    session = open_session(_recipe(folder), judging=True)
    state = find_checkpoint(folder, checkpoint)
    head = {**asdict(wanted), "run": folder.name, "checkpoint": state.name}
    if wanted.kind == "pictures":
        del head["number"]  # more of them may be asked for later
    _begin(output, head)
    restore_for_judging(session, state)
    made: list[str] = []
    skipped: list[str] = []
    with session.for_judging() as model, (output / MANIFEST).open("a", encoding="utf-8") as manifest:
        generator: Any = model.get_submodule("generator")
        for name, line, make in _files(generator, wanted):
            if (output / name).exists():
                skipped.append(name)
                continue
            with atomic(output / name) as partial:
                make(partial)
            manifest.write(json.dumps({"file": name, **line}) + "\n")
            made.append(name)
    return {"checkpoint": state.name, "made": made, "skipped": skipped}


def planned(folder: Path, wanted: Wanted) -> int:
    """How many files there will be, manifest excluded; the model is built without weights.

    Raises:
        UsageError: the run has no generator.
    """
    recipe = _recipe(folder)
    if wanted.kind != "traverse":
        return wanted.number + (wanted.kind == "pairs")
    task = registry.resolve("tasks", recipe.task.name)(recipe.task, recipe.data, seed=recipe.train.seed)
    with torch.device("meta"):
        return len(task.build_model(recipe.model).generator.latents)


def _recipe(folder: Path) -> Any:
    open_run(folder)
    recipe = load_train(folder / RECIPE)
    if recipe.task.name != "gan":
        raise UsageError(
            f"run {folder.name} is of the task {recipe.task.name}, which has no generator",
            hint="ortho generate takes runs of the task gan, e.g. of: ortho train digits-eigengan",
        )
    return recipe


def _begin(output: Path, head: dict[str, Any]) -> None:
    """Start the manifest, or see that the one that is there was made with the same settings."""
    path = output / MANIFEST
    if path.is_file():
        found = next(iter(read_lines(path)), {})
        differing = [key for key in head if found.get(key) != head[key]]
        if differing:
            key = differing[0]
            raise OutputError(
                f"{output} holds what was made otherwise: {key} was {found.get(key)!r}, now {head[key]!r}",
                hint="name another folder",
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} exists and holds no {MANIFEST}", hint="name a new or an empty folder")
    output.mkdir(parents=True, exist_ok=True)
    with atomic(path) as partial:
        partial.write_text(json.dumps(head) + "\n", "utf-8")


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


def _save(path: Path, values: Tensor) -> None:
    with path.open("wb") as file:  # numpy would add a suffix to a name
        np.save(file, values.numpy())
