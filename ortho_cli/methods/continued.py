"""Going on with an adapter: what it is was decided when it was made, and a recipe may repeat it, not contradict it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ortho_cli.errors import CheckpointError, RecipeError

from .adapter_layer import AdapterLayer

__all__ = ["check_layers", "check_settings", "layer_ranks"]


def check_settings(config: Any, source: str, found: Mapping[str, Any]) -> None:
    """Compare the keys a recipe gives with what the adapter is; keys left out say nothing.

    Args:
        config: the recipe's section.
        source: what holds the adapter, for the message.
        found: the recipe's key -> what the adapter is.

    Raises:
        RecipeError: the first key that contradicts.
    """
    for key in sorted(found.keys() & getattr(config, "model_fields_set", set())):
        if getattr(config, key) != found[key]:
            raise RecipeError(
                f"methods.{config.name}.{key} is {getattr(config, key)!r}, {source} has {found[key]!r}",
                hint=f"leave {key} out: it comes with the adapter",
            )


def check_layers(config: Any, source: str, found: Collection[str], wanted: Callable[[], Collection[str]]) -> None:
    """Compare adapted layers: those a recipe chooses (where it says), or those of a saved state.

    Raises:
        RecipeError: the recipe's `targets` or `exclude` choose others.
        CheckpointError: a saved state is of others.
    """
    if config is not None and not {"targets", "exclude"} & getattr(config, "model_fields_set", set()):
        return
    other = sorted(set(found) ^ set(wanted()))
    if not other:
        return
    message = f"{source} and this recipe adapt different layers: {len(other)} are in one only, first {other[0]}"
    if config is None:
        raise CheckpointError(message, hint="resume with the recipe the run was started with")
    raise RecipeError(message, hint="leave targets and exclude out: they come with the adapter")


def layer_ranks(layers: Mapping[str, AdapterLayer]) -> dict[str, int]:
    """The rank of each layer."""
    return {name: int(layer.rank) for name, layer in layers.items()}
