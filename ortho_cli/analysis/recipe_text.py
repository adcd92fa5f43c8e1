"""A recipe as readers of a report see it: one line in words, flat keys to compare, and no path of the machine."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from ortho_cli.checkpoints.hub import parse_hub_id
from ortho_cli.recipe.train import TrainRecipe, recipe_data
from ortho_cli.recipe.write import to_yaml

__all__ = ["ABSENT", "flat_recipe", "hub_base", "public_recipe", "public_text", "recipe_line"]

ABSENT = "–"
# From a root, a home, a drive or a share, or upwards out of a folder.
PATH_OF_A_MACHINE = re.compile(r"/|~[^/]*(/|$)|[A-Za-z]:[\\/]|\\\\|(.*/)?\.\.(/|$)")


def public_text(text: str) -> str:
    """A path that leads out of where the recipe stands as its last part alone; other text as it is.

    >>> public_text("/home/me/data/cifar"), public_text("runs/base"), public_text("~/x/../model.safetensors")
    ('cifar', 'runs/base', 'model.safetensors')
    """
    if PATH_OF_A_MACHINE.match(text) is None:
        return text
    return PurePosixPath(text.replace("\\", "/").rstrip("/")).name or "."


def public_recipe(recipe: TrainRecipe) -> str:
    """The resolved recipe as YAML, with the names of files and folders in place of their paths."""
    data = _public(recipe_data(recipe))
    return to_yaml({key: value for key, value in data.items() if value is not None})


def _public(value: Any) -> Any:
    if isinstance(value, str):
        return public_text(value)
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    return [_public(item) for item in value] if isinstance(value, list) else value


def recipe_line(recipe: TrainRecipe) -> str:
    """A recipe in one line: `classify digits with resnet20 and gor; sgd, 10 epochs, seed 0`."""
    methods = f" and {', '.join(method.name for method in recipe.methods)}" if recipe.methods else ""
    train = recipe.train
    length = f"{train.epochs} epochs" if train.epochs is not None else f"{train.steps} steps"
    return (
        f"{recipe.task.name} {recipe.data.name} with {recipe.model.name}{methods}; "
        f"{recipe.optimizer.name}, {length}, seed {train.seed}"
    )


def flat_recipe(recipe: TrainRecipe) -> dict[str, object]:
    """A recipe's values by dotted keys, a method's by its name: `methods.hra.rank`; `methods` lists the names.

    Of two methods of a name the second is `methods.NAME-2`.
    """
    data = recipe_data(recipe)
    methods: Any = data.pop("methods")
    names = [method["name"] for method in methods]
    found: dict[str, object] = {"methods": ", ".join(names) or "none", **dict(_flat((), data))}
    for index, method in enumerate(methods):
        earlier = names[:index].count(method["name"])
        key = f"{method['name']}-{earlier + 1}" if earlier else method["name"]
        found |= dict(_flat(("methods", key), {part: value for part, value in method.items() if part != "name"}))
    return found


def _flat(here: tuple[str, ...], value: Any) -> list[tuple[str, object]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flat((*here, key), item)]
    return [(".".join(here), value)]


def hub_base(recipe: TrainRecipe) -> str | None:
    """The hub repository that the recipe's model started from; None where that was nothing, or a file or run.

    A path may look like `org/name`, too: of the hub is what the cache holds, where a run has put it.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    base = recipe.model.base
    found = parse_hub_id(base) if base is not None and not Path(base).expanduser().exists() else None
    if found is None:
        return None
    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=found.repo, repo_type="model")
    return found.repo if cached.is_dir() else None
