"""Tell what pictures a recipe needs, and whether they are there: a part of `ortho recipe check --data`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .image_data import load_images
from .image_specs import SPECS, sources

if TYPE_CHECKING:
    from ortho_cli.recipe.data import Images

__all__ = ["check_images", "describe_images", "found_images"]


def describe_images(config: Images) -> str:
    """What the recipe's pictures are, how a local copy looks, and how to get it; nothing is opened."""
    spec = SPECS[config.name]
    lines = [f"{spec.name}: {spec.title}"]
    if config.path is not None:
        lines.append(f"read from: {config.path}   (FOLDER below)")
    elif config.source is not None or spec.hub is not None:
        lines.append(f"read from: the hub, {config.source or (spec.hub.id if spec.hub is not None else '')}")
    if spec.tree:
        lines += ["a local copy (data.path: FOLDER) looks like", *(f"  {line}" for line in spec.tree)]
    return "\n".join([*lines, "to get it:", *(f"  {line}" for line in sources(spec))])


def check_images(config: Images) -> dict[str, Any]:
    """Open both parts of a recipe's pictures and count them.

    Returns:
        `name`, `train` and `eval` (samples), `classes` (number of them), `kept` (classes that are trained on).

    Raises:
        RecipeError: the data is missing or not what the recipe says.

    Cost: sets of small pictures are read whole; of others the files are listed, and one picture of each split opened.
    """
    train, judged = load_images(config, "train"), load_images(config, "eval")
    for images in (train, judged):
        if not isinstance(images.images, Tensor):
            images.images.open(0)
    return {
        "name": config.name,
        "train": len(train),
        "eval": len(judged),
        "classes": len(train.classes),
        "kept": len(config.classes) if config.classes is not None else len(train.classes),
    }


def found_images(found: dict[str, Any]) -> str:
    """What `check_images` found, in a sentence."""
    kept = "" if found["kept"] == found["classes"] else f", {found['kept']} of them kept"
    classes = f"{found['classes']} classes{kept}" if found["classes"] > 1 else "no classes"
    return f"found: {found['train']} samples to train on, {found['eval']} to judge by; {classes}"
