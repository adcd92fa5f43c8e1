"""Tell what series a recipe needs, and what is there: the part of `ortho recipe check --data` that is about series."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .series_data import load_series
from .series_specs import SPECS

if TYPE_CHECKING:
    from ortho_cli.recipe.data import Series

__all__ = ["check_series", "describe_series", "found_series"]


def describe_series(config: Series) -> str:
    """What the recipe's series is, where it is read from, and how to get it; nothing is opened."""
    spec = SPECS[config.name]
    lines = [f"{spec.name}: {spec.title}"]
    if config.path is not None:
        lines.append(f"read from: {config.path}   (the file, or a FOLDER with it)")
    elif config.source is not None or spec.hub is not None:
        lines.append(f"read from: the hub, {config.source or spec.hub}")
    if spec.name != "eeg":
        lines += [
            "a file (data.path: FILE) looks like",
            "  date,NAME,NAME,...",
            "  2016-07-01 00:00:00,5.827,2.009,...",
        ]
    return "\n".join([*lines, "to get it:", *(f"  {line}" for line in spec.fetch)])


def check_series(config: Series) -> dict[str, Any]:
    """Open a recipe's series and count its parts.

    Returns:
        `name`, `columns` (their names), and the rows of `train`, `val` and `test`.

    Raises:
        RecipeError: it is missing, malformed or too short.
    """
    series = load_series(config)
    found: dict[str, Any] = {"name": config.name, "columns": list(series.columns)}
    for part, (first, last) in series.parts.items():
        found[part] = last - first
    return found


def found_series(found: dict[str, Any]) -> str:
    """What `check_series` found, in words."""
    columns = f"{len(found['columns'])} columns ({', '.join(found['columns'])})"
    parts = f"{found['train']} rows to train on, {found['val']} to validate, {found['test']} to test"
    return f"found: {columns}; {parts}"
