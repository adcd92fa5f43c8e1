"""The recipe's `lora`: low-rank adaptation, the reference to compare HRA with, and GOR's partner."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ortho_cli.checkpoints.adapters import read_adapter

from .adapter_files import check_savable
from .adapter_folder import write_adapter
from .adapter_layer import AdapterLayer, adapter_layers
from .add import insert_lora
from .continued import check_layers, check_settings, layer_ranks
from .inject import choose, inner_model, own_head, train_modules
from .load import attach
from .lora_layer import LoRALayer
from .method import Context, Method
from .rates import rate_groups

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import LoRA

__all__ = ["LoRAMethod"]


class LoRAMethod(Method):
    """The recipe's `lora`."""

    name = "lora"

    def __init__(self, config: LoRA) -> None:
        super().__init__(config)
        self.layers: dict[str, LoRALayer] = {}
        self.notes: list[str] = []

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Put the adapter on, new or from a folder, and freeze the rest.

        Raises:
            TargetError: a pattern that matches nothing, a layer that cannot be adapted, or an adapter of other layers.
            RecipeError: a key that contradicts the adapter to go on with.
        """
        config: LoRA = self.config
        head, model = own_head(model), inner_model(model)
        if config.adapter is None:
            names = insert_lora(
                model, config.rank, config.targets, exclude=config.exclude, alpha=config.alpha, rslora=config.rslora,
                dropout=config.dropout, seed=context.seed,
            )  # fmt: skip
        else:
            names = attach(model, read_adapter(config.adapter), ("lora",))
        found = adapter_layers(model)
        self.layers = {name: layer for name in names if isinstance(layer := found[name], LoRALayer)}
        if config.adapter is not None:
            self._check_continued(model, f"adapter {Path(config.adapter).name}")
        for layer in self.layers.values():
            layer.dropout = config.dropout
        train_modules(model, (*head, *config.modules_to_save))
        check_savable(self.layers)

    def _check_continued(self, model: nn.Module, source: str) -> None:
        config: LoRA = self.config
        ranks, scales = ({getattr(x, key) for x in self.layers.values()} for key in ("rank", "scale"))
        rank = ranks.pop() if len(ranks) == 1 else sorted(ranks)
        found: dict[str, Any] = {"rank": rank}
        if "alpha" in config.model_fields_set and isinstance(rank, int) and config.alpha is not None:
            # The file holds the scale, whichever of the two rules it came from.
            scale = config.alpha / (sqrt(rank) if config.rslora else rank)
            if any(abs(scale - own) > 1e-6 * own for own in scales):
                found["alpha"] = max(scales) * (sqrt(rank) if config.rslora else rank)
        check_settings(config, source, found)
        check_layers(config, source, list(self.layers), lambda: choose(model, config.targets, config.exclude))
        self.notes.append(f"goes on with {source}: {len(self.layers)} layers of rank {rank}")

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The factors, where they have a learning rate of their own."""
        layers = {name: layer.adapter_parameters() for name, layer in self.layers.items()}
        return rate_groups(layers, self.config.lr, self.config.rates)

    def export(self, model: nn.Module, path: Path) -> None:
        """Write the adapter folder."""
        layers: dict[str, AdapterLayer] = dict(self.layers)
        self.notes += write_adapter(inner_model(model), layers, path, command="ortho train")

    def state(self) -> dict[str, Any]:
        """Which layers are adapted; the factors are in the model."""
        return {"ranks": layer_ranks(self.layers)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Refuse to go on with other layers."""
        check_layers(None, "the checkpoint", state["ranks"], lambda: layer_ranks(self.layers))
