"""The recipes that come with the package, by name: `recipes/` beside it in a source tree, `_recipes` in a wheel."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

import ortho_cli
from ortho_cli.errors import RecipeError

__all__ = ["find", "purpose", "shipped"]

SUFFIX = ".yaml"


def _folder() -> Path:
    package = Path(ortho_cli.__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped() -> dict[str, Path]:
    """All shipped recipes, name to file, sorted; a recipe in a sub-folder is named `folder/name`."""
    folder = _folder()
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob(f"*{SUFFIX}"))}


def find(name_or_path: str) -> Path:
    """The file a user means: an existing file, else a shipped recipe, with or without `recipes/` and `.yaml`.

    Raises:
        RecipeError: neither; with the nearest shipped names.
    """
    if os.path.exists(name_or_path) and not os.path.isdir(name_or_path):
        return Path(name_or_path)
    recipes = shipped()
    name = name_or_path.removeprefix("recipes/").removesuffix(SUFFIX)
    if name in recipes:
        return recipes[name]
    near = difflib.get_close_matches(name, recipes, n=3)
    raise RecipeError(
        f"no file and no shipped recipe is called '{name_or_path}'",
        hint=(f"nearest names: {', '.join(near)}; " if near else "") + "list them with: ortho recipe list",
    )


def purpose(path: Path) -> str:
    """What a recipe is for: its first line, a comment, up to the command that stands behind a wide gap."""
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    return re.split(r"\s{2,}", first.removeprefix("#").strip())[0] if first.startswith("#") else ""
