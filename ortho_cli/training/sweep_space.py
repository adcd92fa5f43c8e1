"""What a sweep searches: `--param KEY=log:1e-5..1e-3`, `KEY=int:2..64`, `KEY=a,b,c`, and the recipe of one trial."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from ortho_cli.errors import RecipeError, UsageError
from ortho_cli.recipe.load import validate
from ortho_cli.recipe.matrix import FIXED
from ortho_cli.recipe.overrides import located, replaced, value_of
from ortho_cli.recipe.parse import Place, Positions
from ortho_cli.recipe.train import TrainRecipe, recipe_data

__all__ = ["Param", "check_space", "parse_params", "trial_recipe"]

RANGES = ("log", "float", "int")
FORMS = "KEY=log:1e-5..1e-3, KEY=float:0..1, KEY=int:2..64 or KEY=a,b,c"


@dataclass(frozen=True)
class Param:
    """One searched key: a range of numbers (`log`, `float`, `int`, ends included) or a list of values (`choice`)."""

    key: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[object, ...] = ()

    @property
    def text(self) -> str:
        """As it is typed after `=`."""
        return ",".join(self.labels) if self.choices else f"{self.kind}:{self.low:g}..{self.high:g}"

    @property
    def labels(self) -> tuple[str, ...]:
        """The choices as a storage keeps them: words."""
        return tuple(map(_label, self.choices))

    @property
    def ends(self) -> tuple[object, ...]:
        """The values that between them show whether all are allowed."""
        return self.choices or (self._number(self.low), self._number(self.high))

    def suggest(self, trial: Any) -> object:
        """The value that an Optuna trial gets."""
        if self.kind == "choice":
            return self.value(trial.suggest_categorical(self.key, list(self.labels)))
        if self.kind == "int":
            return int(trial.suggest_int(self.key, int(self.low), int(self.high)))
        return float(trial.suggest_float(self.key, self.low, self.high, log=self.kind == "log"))

    def value(self, kept: Any) -> object:
        """The value that a storage keeps, as the recipe has it."""
        return self.choices[self.labels.index(kept)] if self.choices else kept

    def _number(self, value: float) -> object:
        return int(value) if self.kind == "int" else value


def parse_params(texts: Sequence[str]) -> tuple[Param, ...]:
    """Read every `--param`.

    Raises:
        UsageError: none, one that is no range and no list, a key given twice or that may not vary.

    >>> parse_params(["train.seed=int:0..3"])[0].ends, parse_params(["model.norm=batch,group"])[0].choices
    ((0, 3), ('batch', 'group'))
    """
    found = tuple(map(_parse, texts))
    if not found:
        raise UsageError("a sweep searches something", hint=f"--param {FORMS}")
    for index, param in enumerate(found):
        if param.key in {other.key for other in found[:index]}:
            raise UsageError(f"--param {param.key} is given twice")
        if any(f"{fixed}.".startswith(f"{param.key}.") for fixed in FIXED):
            raise UsageError(f"--param {param.key} may not vary")
    return found


def _parse(text: str) -> Param:
    key, equals, spec = (part.strip() for part in text.partition("="))
    kind, colon, ends = spec.partition(":")
    if not (key and equals and spec):
        raise UsageError(f"--param {text!r} is not KEY=VALUES", hint=FORMS)
    if not (colon and kind in RANGES):
        return _choices(text, key, spec)
    low, dots, high = ends.partition("..")
    try:
        numbers = [float(part) if kind != "int" else float(int(part)) for part in (low, high)]
    except ValueError:
        numbers = []
    if not dots or len(numbers) < 2 or not all(map(isfinite, numbers)) or not numbers[0] < numbers[1]:
        whole = " of whole numbers" if kind == "int" else ""
        raise UsageError(f"--param {text!r}: {ends!r} is no range{whole}, from low to high", hint=FORMS)
    if kind == "log" and numbers[0] <= 0:
        raise UsageError(f"--param {text!r}: a logarithmic range lies above 0", hint=f"{key}=float:{ends}")
    return Param(key, kind, numbers[0], numbers[1])


def _choices(text: str, key: str, spec: str) -> Param:
    try:
        values = value_of(f"[{spec}]")
    except RecipeError as error:
        raise UsageError(f"--param {text!r}: {error.message}", hint=FORMS) from None
    assert isinstance(values, list)
    labels = list(map(_label, values))
    if len(values) < 2 or len(set(labels)) < len(labels):
        raise UsageError(f"--param {text!r} needs two or more different values, or a range", hint=FORMS)
    return Param(key, "choice", choices=tuple(values))


def _label(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def check_space(recipe: TrainRecipe, params: Sequence[Param]) -> None:
    """Refuse keys that the recipe's schema does not have, and values that it does not allow.

    Raises:
        RecipeError: with `--param KEY` in place of a line.
    """
    first = {param.key: param.ends[0] for param in params}
    for param in params:
        for value in param.ends:
            trial_recipe(recipe, {**first, param.key: value}, Path(recipe.run.dir))


def trial_recipe(recipe: TrainRecipe, values: Mapping[str, object], folder: Path) -> TrainRecipe:
    """The recipe with some keys set, in a folder of its own.

    Raises:
        RecipeError: the values do not go together; with `--param KEY` in place of a line.
    """
    data: Any = recipe_data(recipe, given_only=True)
    positions = Positions()
    for key, value in values.items():
        try:
            location = located(data, key)
        except RecipeError as error:
            raise RecipeError(f"--param {key}: {error.message}") from None
        data = replaced(data, location, value)
        positions.put(location, Place(0, 0, f"--param {key}"))
    return validate(TrainRecipe, replaced(data, ("run", "dir"), str(folder)), positions, "--param")
