"""Tell what pairs of sentences a recipe needs, and what is there: `ortho recipe check --data`, of translation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .parallel_text import NAMES, SPECS, read_pairs

if TYPE_CHECKING:
    from ortho_cli.recipe.translation import Parallel

__all__ = ["check_parallel", "describe_parallel", "found_parallel"]


def describe_parallel(config: Parallel) -> str:
    """What the recipe's sentences are, where they are read from, and how to get them; nothing is opened."""
    spec = SPECS[config.name]
    lines = [f"{spec.name}: {spec.title}"]
    if config.name == "catalogues":
        lines.append(f"read from: the installed packages {', '.join(config.packages)}")
    else:
        hub = f"the hub, {config.source or spec.hub}"
        place = hub if config.path is None else f"{config.path}   (FOLDER below)"
        files = [f"{names[0]}.{language}" for names in NAMES.values() for language in config.languages]
        lines += [f"read from: {place}", "a local copy (data.path: FOLDER), a sentence a line, looks like"]
        lines += [f"  FOLDER/{file}" for file in files]
    return "\n".join([*lines, "to get it:", *(f"  {line}" for line in spec.fetch)])


def check_parallel(config: Parallel) -> dict[str, Any]:
    """Open all parts of a recipe's sentences and count the pairs.

    Returns:
        `name`, `languages`, and the pairs of `train`, `val` and `test`.

    Raises:
        RecipeError: they are missing or malformed.
        UsageError: a library that is needed is not installed.
    """
    counts = {str(part): len(read_pairs(config, part)) for part in NAMES}
    return {"name": config.name, "languages": list(config.languages), **counts}


def found_parallel(found: dict[str, Any]) -> str:
    """What `check_parallel` found, in a sentence."""
    parts = f"{found['train']} pairs to train on, {found['val']} to validate, {found['test']} to test"
    return f"found: {parts}; {' to '.join(found['languages'])}"
