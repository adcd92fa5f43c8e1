"""Tell what queries and responses a recipe needs, and what is there: that part of `ortho recipe check --data`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .instruct_data import load_pairs
from .instruct_specs import SPECS

if TYPE_CHECKING:
    from ortho_cli.recipe.instruct import Instructions

__all__ = ["check_pairs", "describe_pairs", "found_pairs"]


def describe_pairs(config: Instructions) -> str:
    """What the recipe's data is, what it is judged on, how copies look and how to get them; nothing is opened."""
    lines = []
    judged = [] if config.judge == "own" else [(SPECS[config.judge], "test", config.judge_path, None)]
    for spec, part, path, source in [(SPECS[config.name], "train", config.path, config.source), *judged]:
        lines.append(f"{'judged on: ' if part == 'test' else ''}{spec.title}")
        if path is not None:
            lines.append(f"read from: {path}   (FOLDER, or one file)")
        elif source or spec.hub:
            lines.append(f"read from: the hub, {source or spec.hub}")
        if spec.files:
            columns = (config.query or spec.columns[0], config.response or spec.columns[1])
            names = spec.columns if part == "test" else columns
            lines += ["a local copy looks like", f"  FOLDER/{spec.files[part][0]}, or FOLDER/{part}/**/*.json"]
            lines.append(f'  {{"{names[0]}": "...", "{names[1]}": "..."}}')
        lines += ["to get it:", *(f"  {line}" for line in spec.fetch or ("it is yours",))]
    return "\n".join(lines)


def check_pairs(config: Instructions) -> dict[str, Any]:
    """Open both parts of a recipe's pairs and count them; nothing is tokenized.

    Returns:
        `name`, `pairs` (to train on) and `judged` (to judge by).

    Raises:
        RecipeError: something is missing or malformed.
    """
    return {
        "name": config.name,
        "pairs": len(load_pairs(config, "train")),
        "judged": len(load_pairs(config, "eval")),
    }


def found_pairs(found: dict[str, Any]) -> str:
    """What `check_pairs` found, in a sentence."""
    return f"found: {found['pairs']} queries with responses to train on, {found['judged']} to judge by"
