"""What the shell completes: words of a fixed set, presets, shipped recipes, forms. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["forms", "presets", "recipes", "words"]

Completer = Callable[[str], list[str]]


def words(*known: str) -> Completer:
    """Complete from a fixed set."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return complete


def presets(incomplete: str) -> list[str]:
    """Names of target presets."""
    from ortho_cli.checkpoints.presets import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    """Names of shipped recipes."""
    from ortho_cli.recipe.shipped import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


def forms(incomplete: str) -> list[str]:
    """What `convert --to` writes."""
    from ortho_cli.surgery.convert import FORMS

    return [name for name in FORMS if name.startswith(incomplete)]
