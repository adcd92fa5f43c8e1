"""What the tests of training recipes start from: the least recipe, its text, and errors without their file."""

from __future__ import annotations

from pathlib import Path

import pytest

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.train import load_train

__all__ = ["FORECAST", "LEAST", "errors", "written"]

# One section a line, so that a test knows the line of each: task 2, model 3, data 4, optimizer 5, train 6, run 7.
LEAST = {
    "task": "{name: classify}",
    "model": "{name: mlp}",
    "data": "{name: digits}",
    "optimizer": "{name: sgd, lr: 0.1}",
    "train": "{epochs: 2}",
    "run": "{dir: runs/x}",
}

# What of it is otherwise where series are forecast.
FORECAST = {"task": "{name: forecast}", "model": "{name: forecaster}", "data": "{name: eeg}"}


def written(folder: Path, more: str = "", **sections: str) -> Path:
    """The least recipe with some sections written otherwise, and more lines (from line 8 on)."""
    lines = [f"{key}: {sections.get(key, value)}\n" for key, value in LEAST.items()]
    path = folder / "r.yaml"
    path.write_text("version: 1\n" + "".join(lines) + more, encoding="utf-8")
    return path


def errors(path: Path, *sets: str) -> list[str]:
    """What `load_train` says, a line each, the file's name left out."""
    with pytest.raises(RecipeError) as caught:
        load_train(path, sets)
    return [line.removeprefix(f"{path}:") for line in caught.value.message.splitlines()]
