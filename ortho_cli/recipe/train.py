"""The schema of training recipes, and what a run does with them: load, resolve, write again, compare on `--resume`.

A recipe is one task, one model, its data, an ordered list of methods, an optimizer with its schedule, and one loop.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.data import Data
from ortho_cli.recipe.exports import export_problems
from ortho_cli.recipe.load import inspect, read_recipe, validate
from ortho_cli.recipe.matrix import Cell, cells, matrix_problems
from ortho_cli.recipe.methods import Method
from ortho_cli.recipe.models import Model
from ortho_cli.recipe.optim import Constant, Optimizer, Schedule
from ortho_cli.recipe.overrides import apply_sets, matrix_paths
from ortho_cli.recipe.parse import Positions, Problem, refusal
from ortho_cli.recipe.run import Run, Train
from ortho_cli.recipe.section import Rejection, Section, Version
from ortho_cli.recipe.shipped import find
from ortho_cli.recipe.tasks import Classify, Task
from ortho_cli.recipe.write import plain_data, to_yaml

__all__ = [
    "MAY_CHANGE", "MAY_GROW", "TrainRecipe", "cell_recipes", "check_train", "difference", "load_train", "may_change",
    "recipe_data", "resolved_yaml",
]  # fmt: skip

# What a resumed run may do differently without being another run; lengths may only grow.
MAY_CHANGE = frozenset({
    "data.path", "data.workers", "run.dir", "run.export", "run.keep", "run.log_every", "run.samples_every",
    "run.samples_every_steps", "run.save_every", "run.save_every_steps", "run.trackers",
})  # fmt: skip
MAY_GROW = frozenset({"train.epochs", "train.steps"})

KEEP_ALL = frozenset({"oialr", "track_stability"})  # what they find is seen in a series of checkpoints
KEPT = 2

HINT = "all keys: ortho recipe schema --verb train"
MAX_REFUSED = 20  # cells of a matrix that are looked into; one wrong value spoils many


class TrainRecipe(Section):
    """Train a model: `ortho train RECIPE`."""

    version: Version
    task: Task = Field(description="What is trained.")
    model: Model = Field(description="The architecture and the weights it starts from.")
    data: Data = Field(description="The samples.")
    methods: tuple[Method, ...] = Field(default=(), description="What is done to the model, in this order.")
    optimizer: Optimizer = Field(description="How gradients become updates.")
    schedule: Schedule = Field(default=Constant(name="constant"), description="The learning rate over time.")
    train: Train = Field(description="How long, from which seed, in which arithmetic.")
    run: Run = Field(description="The run's folder, what it keeps and whom it tells.")
    matrix: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] | None = Field(
        default=None,
        min_length=1,
        description="Lists of values by key (train.seed, or several keys with commas): every combination is one run.",
    )

    @property
    def kept(self) -> int | Literal["all"]:
        """How many of the last checkpoints stay: `run.keep`, or what its null stands for."""
        if self.run.keep is not None:
            return self.run.keep
        return "all" if any(method.name in KEEP_ALL for method in self.methods) else KEPT

    def problems(self) -> Iterator[Rejection]:
        """Rules between the sections."""
        if self.data.batch % self.train.accumulate:
            reason = f"a batch of {self.data.batch} cannot be split into {self.train.accumulate} equal parts"
            yield ("train", "accumulate"), reason
        for key, section, kind in (("model", self.model, self.task.model_kind), ("data", self.data, self.task.kind)):
            if section.kind != kind:
                reason = f"{section.name} is for {section.kind}, and the task {self.task.name} for {kind}"
                yield (key, "name"), reason
        first: dict[str, int] = {}
        for index, method in enumerate(self.methods):
            if method.name in first and method.once:
                yield ("methods", index), f"{method.name} is already methods.{first[method.name]}; a recipe has it once"
            first.setdefault(method.name, index)
            if method.name != "distill":
                continue
            if not isinstance(self.task, Classify):
                yield ("methods", index), f"distill is for classes, and the task {self.task.name} has none"
            elif method.alpha and self.task.label_smoothing:
                reason = "the labels' share of methods.distill is of plain cross-entropy; give 0 here, or alpha 0 there"
                yield ("task", "label_smoothing"), reason
        yield from export_problems(self)
        yield from matrix_problems(recipe_data(self, given_only=True))


def load_train(name_or_path: str | PathLike[str], sets: Iterable[str] = ()) -> TrainRecipe:
    """Read and check a training recipe, with every default filled in; all cells of its matrix are checked too.

    Args:
        name_or_path: a file, or a shipped recipe's name.
        sets: changes, as `--set` gives them: `["methods.hra.rank=16"]`.

    Raises:
        RecipeError: no such recipe, one for another verb, or all that is wrong with it.
    """
    path = find(str(name_or_path))
    data, positions = read_recipe(path)
    if "verb" in data:
        verb = data["verb"]
        raise RecipeError(
            f"this recipe is for `ortho {verb}`, not for `ortho train`",
            hint=f"ortho {verb} --recipe {shlex.quote(str(name_or_path))}",
            where=f"{path}:{positions.place(('verb',)).value}",
        )
    return check_train(apply_sets(data, positions, sets), positions, path)


def check_train(data: dict[str, object], positions: Positions, path: Path) -> TrainRecipe:
    """A recipe's data as an instance, every cell of its matrix checked.

    Raises:
        RecipeError: all that is wrong with it; a wrong value of the matrix with the line where it stands there.
    """
    recipe = validate(TrainRecipe, data, positions, path, hint=HINT)
    if recipe.matrix is None:
        return recipe
    places = matrix_paths(data)
    found: list[Problem] = []
    refused = 0
    for cell in cells(data):
        moved = Positions(dict(positions.places))
        for (key, locations), chosen in zip(places.items(), cell.choice, strict=True):
            for location in locations:
                moved.put(location, positions.place(("matrix", key, chosen)))
        problems = inspect(TrainRecipe, cell.data, moved)[1]
        found += problems
        refused += bool(problems)
        if refused == MAX_REFUSED:
            break
    if found:
        raise refusal(str(path), found, HINT)
    return recipe


def recipe_data(recipe: TrainRecipe, *, given_only: bool = False) -> dict[str, object]:
    """A recipe as plain data: lists and mappings, keys in the schema's order.

    Args:
        recipe: any.
        given_only: leave out what nobody gave, so that sections can still be replaced whole.
    """
    data = plain_data(recipe.model_dump(exclude_unset=given_only))
    assert isinstance(data, dict)
    return data


def cell_recipes(recipe: TrainRecipe) -> list[tuple[Cell, TrainRecipe]]:
    """The runs that a recipe stands for, each resolved: the cells of its matrix in order, or itself alone."""
    made = cells(recipe_data(recipe, given_only=True))
    return [(cell, validate(TrainRecipe, cell.data, Positions(), cell.name or "recipe")) for cell in made]


def resolved_yaml(recipe: TrainRecipe, continued: Collection[int] = ()) -> str:
    """The recipe with every default, as YAML that loads to the same recipe again: a run's `recipe.yaml`.

    Args:
        recipe: any.
        continued: places of methods that go on with the base's own adapter: keys that it decides are there if given.
    """
    data: dict[str, Any] = recipe_data(recipe)
    for index in continued:
        method: Any = recipe.methods[index]
        for key in method.shape - method.model_fields_set:
            data["methods"][index].pop(key, None)
    return to_yaml(data)


def difference(old: TrainRecipe, new: TrainRecipe) -> list[tuple[str, object, object]]:
    """What differs between two recipes, as `(key, old, new)`; a section of another kind is one difference.

    For `--resume`, refuse what :func:`may_change` does not allow.
    """
    return list(_differ((), recipe_data(old), recipe_data(new)))


def may_change(key: str, old: object, new: object) -> bool:
    """Whether a run may be resumed with this difference: a listed key, or a longer run.

    >>> may_change("train.epochs", 10, 20), may_change("train.epochs", 20, 10), may_change("train.seed", 0, 1)
    (True, False, False)
    """
    longer = key in MAY_GROW and isinstance(old, int) and isinstance(new, int) and new > old
    return longer or key in MAY_CHANGE


def _differ(here: tuple[str, ...], old: Any, new: Any) -> Iterator[tuple[str, object, object]]:
    if isinstance(old, dict) and isinstance(new, dict) and old.get("name") == new.get("name"):
        for key in {**old, **new}:
            yield from _differ((*here, key), old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and any(isinstance(item, dict) for item in [*old, *new]):
        for index in range(max(len(old), len(new))):
            pair = (items[index] if index < len(items) else None for items in (old, new))
            yield from _differ((*here, str(index)), *pair)
    elif old != new:
        yield ".".join(here), old, new
