"""What a training recipe would do: counts of parameters and steps, on the meta device, without data or folders."""

from __future__ import annotations

from typing import Any

import torch

from ortho_cli import registry
from ortho_cli.methods.method import Context

__all__ = ["describe"]


def describe(recipe: Any) -> dict[str, Any]:
    """Parameter counts of a recipe's model and of each method, without allocating a weight.

    Args:
        recipe: a resolved `TrainRecipe`.

    Returns:
        ``model``, ``parameters``, ``trainable``, and for each method what it adds.

    Raises:
        OrthoError: a method's targets match nothing.

    Cost: no tensor is allocated; full-size models take a second.
    """
    task = registry.resolve("tasks", recipe.task.name)(recipe.task, recipe.data, seed=recipe.train.seed)
    with torch.device("meta"):
        model = task.build_model(recipe.model)
        before = sum(parameter.numel() for parameter in model.parameters())
        added: dict[str, int] = {}
        for config in recipe.methods:
            method = registry.resolve("methods", config.name)(config)
            held = sum(parameter.numel() for parameter in model.parameters())
            method.prepare(model, Context(recipe.train.seed, 1, recipe.task.name, recipe.model.base))
            added[config.name] = sum(parameter.numel() for parameter in model.parameters()) - held
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "task": recipe.task.name,
        "model": recipe.model.name,
        "parameters": before,
        "trainable": trainable,
        "added": added,
        "folder": recipe.run.dir,
    }
