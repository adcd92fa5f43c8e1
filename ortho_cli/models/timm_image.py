"""Any picture classifier of timm, by its name there, with random weights or those of `model.base`."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from ortho_cli.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from ortho_cli.recipe.models import Timm

__all__ = ["build"]


def build(config: Timm, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The architecture of a recipe's `model` section, for these classes and channels.

    Weights are random; those of a base are put in as for every other model, by timm's own names.

    Raises:
        UsageError: timm, or torchvision which it needs, is not installed or does not import.
        RecipeError: timm has no such architecture.
    """
    try:
        timm: Any = import_module("timm")
    except (ImportError, RuntimeError) as error:  # torchvision of another torch fails with a RuntimeError
        raise UsageError(
            f"model timm needs the timm library: {str(error).splitlines()[0][:200]}",
            hint="pip install timm torchvision   (a torchvision that was built for your torch)",
        ) from error
    if not timm.is_model(config.architecture):
        near = difflib.get_close_matches(config.architecture, timm.list_models(), 1)
        raise RecipeError(
            f"model.architecture: timm has no {config.architecture!r}",
            hint=(f"did you mean {near[0]!r}? " if near else "") + "all: timm.list_models()",
        )
    model: nn.Module = timm.create_model(
        config.architecture, num_classes=num_classes, in_chans=in_channels, drop_rate=config.drop_rate
    )
    return model
