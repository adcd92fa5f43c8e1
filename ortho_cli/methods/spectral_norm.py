"""Spectral normalisation in training: chosen weights divided by their largest singular value, torch's parametrization.

A treatment to compare NOG, OLR and SOC with. It is not the identity at the start: every chosen layer is rescaled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from ortho_cli.checkpoints.targets import select
from ortho_cli.errors import TargetError

from .adapter_layer import AdapterLayer
from .inject import check_seen_once, layer_seed, named_layers
from .method import Context, Method

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import SpectralNorm

__all__ = ["SpectralNormMethod"]


class SpectralNormMethod(Method):
    """The recipe's `spectral_norm`."""

    name = "spectral_norm"

    def __init__(self, config: SpectralNorm) -> None:
        super().__init__(config)
        self.layers: dict[str, nn.Module] = {}
        self.notes: list[str] = []

    def chosen(self, model: nn.Module) -> dict[str, list[str]]:
        """The layers that each pattern of the recipe means."""
        layers = named_layers(model)
        return {p: list(select([p], layers, layers.layout, self.config.exclude).layers) for p in self.config.targets}

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Parametrize the weights; the estimates of their largest singular values are buffers.

        Raises:
            TargetError: a pattern that matches nothing, or a layer without a weight of its own.
            UsageError: a layer inside a block that is computed twice, whose norm would be followed in between.
        """
        names = {name for layers in self.chosen(model).values() for name in layers}
        for name, module in model.named_modules():
            if name not in names:
                continue
            check_seen_once(model, name)
            if isinstance(module, AdapterLayer) or "weight" not in module._parameters:
                raise TargetError(
                    f"layer {name!r} is a {type(module).__name__}, which computes its weight from others",
                    hint=f"leave it out: exclude {name}",
                )
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(layer_seed(context.seed, name))
                spectral_norm(module, n_power_iterations=self.config.iterations)
            self.layers[name] = module
        self.notes.append(f"divides the weights of {len(self.layers)} layers by their largest singular value")

    def scalars(self) -> dict[str, float]:
        """How many layers there are."""
        return {"layers": float(len(self.layers))}
