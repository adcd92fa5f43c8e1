"""Tell what pictures with hints a recipe needs, and whether they are there: a part of `ortho recipe check --data`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .hint_data import load_hints
from .hint_specs import SPECS

if TYPE_CHECKING:
    from ortho_cli.recipe.data_hints import HintedPictures

__all__ = ["check_hints", "describe_hints", "found_hints"]


def describe_hints(config: HintedPictures) -> str:
    """What the recipe's pictures are, how a local copy looks, and how to get it; nothing is opened."""
    spec = SPECS[config.name]
    lines = [f"{spec.name}: {spec.title}"]
    if config.path is not None:
        lines.append(f"read from: {config.path}   (FOLDER below)")
    if spec.tree:
        lines += ["a local copy (data.path: FOLDER) looks like", *(f"  {line}" for line in spec.tree)]
    return "\n".join([*lines, "to get it:", *(f"  {line}" for line in spec.fetch)])


def check_hints(config: HintedPictures) -> dict[str, Any]:
    """Open both parts of a recipe's data, every file of them, and count.

    Returns:
        `name`, `hint`, `train` and `eval` (samples), and `bad` (what is left out, a line each).

    Raises:
        RecipeError: it is missing or malformed, or files are bad and not to be skipped.
    """
    parts = {split: load_hints(config, split) for split in ("train", "eval")}
    bad = [fault for part in parts.values() for fault in part.faults]
    return {"name": config.name, "hint": config.hint, **{name: len(part) for name, part in parts.items()}, "bad": bad}


def found_hints(found: dict[str, Any]) -> str:
    """What `check_hints` found, in words."""
    said = f"found: {found['train']} samples to train on, {found['eval']} to judge by, with {found['hint']} hints"
    return "\n".join([said, *(f"left out: {fault}" for fault in found["bad"])])
