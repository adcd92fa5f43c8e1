"""Recipes as YAML text, such that our own loader reads back exactly what was written; and files written whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from ortho_cli.errors import OutputError
from ortho_cli.recipe.parse import plain_value

__all__ = ["plain_data", "to_yaml", "write_recipe"]


class _Dumper(yaml.SafeDumper):
    """Block style, lists indented under their key, text quoted wherever a recipe would read something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: object) -> bool:
        return True  # recipes have none: what occurs twice is written twice


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        plain = plain_value(text) == text
    except ValueError:
        plain = False
    # Double quotes escape; in the other styles line breaks are folded, and YAML 1.1 breaks lines at NEL and others too.
    style = '"' if not text.isprintable() else None if plain else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def to_yaml(data: dict[str, object]) -> str:
    """Write a mapping of plain values as YAML, keys in their order.

    >>> print(to_yaml({"rank": [8, "**.attn2.**=16"], "note": "1e-4", "lr": 1e-4}), end="")
    rank:
      - 8
      - '**.attn2.**=16'
    note: '1e-4'
    lr: 0.0001
    """
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)
    return text


def plain_data(value: object) -> object:
    """A value as YAML data: tuples as lists, paths as text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: plain_data(item) for key, item in value.items()}
    return [plain_data(item) for item in value] if isinstance(value, list | tuple) else value


def write_recipe(path: str | os.PathLike[str], content: bytes, *, force: bool = False) -> Path:
    """Write a recipe whole or not at all, and never over another without `force`.

    Raises:
        OutputError: the file exists, is a folder, or cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputError("is a folder; a recipe is a file", hint="name a .yaml file", where=str(path))
    if os.path.lexists(target) and not force:
        raise OutputError("exists already", hint="choose another name, or add --force", where=str(path))
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write the recipe: {error.strerror}", where=str(path)) from None
    return target
