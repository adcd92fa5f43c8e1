"""The recipe's `hra`: Householder reflections on chosen layers, new, continued, or held by the base itself."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ortho_cli.checkpoints.adapters import read_adapter

from .adapter_files import check_savable
from .adapter_folder import write_adapter
from .adapter_layer import AdapterLayer, adapter_layers
from .add import insert_hra
from .continued import check_layers, check_settings, layer_ranks
from .hra_layer import HRALayer
from .inject import choose, freeze, inner_model, own_head, set_biases, train_modules
from .load import attach
from .method import Context, Method
from .orthogonality import reflection_details, reflection_summary, vectors_penalty
from .rates import rate_groups

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import HRA

__all__ = ["HRAMethod"]

TABLE = "layers.csv"  # of each layer: rank, ||I - V^T V||_F, mean angle in radians


class HRAMethod(Method):
    """The recipe's `hra`.

    A base that holds reflections already (`hold_reflections`) has that adapter trained, never a second one put on.
    """

    name = "hra"

    def __init__(self, config: HRA) -> None:
        super().__init__(config)
        self.layers: dict[str, HRALayer] = {}
        self.notes: list[str] = []

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Put the adapter on, or take the one that is there, and freeze the rest.

        Raises:
            TargetError: a pattern that matches nothing, a layer that cannot be adapted, or an adapter of other layers.
            RecipeError: a key that contradicts the adapter to go on with.
        """
        config: HRA = self.config
        head, model = own_head(model), inner_model(model)
        held = {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, HRALayer)}
        if config.adapter is not None:
            names = attach(model, read_adapter(config.adapter), ("hra",))
            source = f"adapter {Path(config.adapter).name}"
        elif held:
            names, source = list(held), "the base's own adapter"
        else:
            names, source = self._insert(model, context), ""
        found = adapter_layers(model)
        self.layers = {name: layer for name in names if isinstance(layer := found[name], HRALayer)}
        self.continues = bool(held) and config.adapter is None
        if source:
            check_settings(config, source, self._settings())
            check_layers(config, source, names, lambda: choose(model, config.targets, config.exclude))
            self.notes.append(f"goes on with {source}: {len(names)} layers of rank {self._settings()['rank']}")
        freeze(model)
        for layer in self.layers.values():
            layer.vectors.requires_grad_(True)
        set_biases(model, config.bias)
        train_modules(model, (*head, *config.modules_to_save))
        check_savable(self.layers)
        if config.gram_schmidt and config.start == "reflection" and not source:
            self.notes.append("start: reflection, the paper's form, does not start at the identity")
        if config.eps and not source:
            self.notes.append(f"eps {config.eps:g}: soft reflections start near the identity, not at it")

    def _insert(self, model: nn.Module, context: Context) -> list[str]:
        config: HRA = self.config
        return insert_hra(
            model, config.rank, config.targets, exclude=config.exclude, side=config.side,
            gram_schmidt=config.gram_schmidt, start="soft" if config.compat == "llama" else config.start,
            eps=config.eps, seed=context.seed,
        )  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        """What an adapter that is there already is, by the recipe's keys."""
        first = next(iter(self.layers.values()))
        ranks = {layer.rank for layer in self.layers.values()}
        return {
            "rank": ranks.pop() if len(ranks) == 1 else sorted(ranks),
            "side": first.side,
            "eps": first.form.eps,
            "gram_schmidt": first.form.span,
            "start": "reflection" if first.form.span and first.start is None else "identity",
        }

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The vectors, where they have a learning rate of their own."""
        layers = {name: [layer.vectors] for name, layer in self.layers.items()}
        return rate_groups(layers, self.config.lr, self.config.rates)

    def penalty(self, model: nn.Module, batch: dict[str, Tensor], outputs: Any, phase: str) -> Tensor | None:
        """Lambda times the distance from orthogonal reflections; nothing for Gram-Schmidt, which keeps it at zero."""
        chains = [layer.vectors for layer in self.layers.values() if not layer.form.span]
        if not self.config.penalty or not chains:
            return None
        return float(self.config.penalty) * vectors_penalty(chains, self.config.penalty_form)

    def export(self, model: nn.Module, path: Path) -> None:
        """Write the adapter folder, with a table of its layers beside it."""
        layers: dict[str, AdapterLayer] = dict(self.layers)
        settings = {"penalty": self.config.penalty, "penalty_form": self.config.penalty_form}
        self.notes += write_adapter(inner_model(model), layers, path, command="ortho train", extra=settings)
        with (path / TABLE).open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ("layer", "rank", "defect", "angle"), lineterminator="\n")
            table.writeheader()
            table.writerows(
                {"layer": name, "rank": layer.rank, **reflection_details(layer)} for name, layer in self.layers.items()
            )

    def state(self) -> dict[str, Any]:
        """Which layers are adapted; the vectors are in the model."""
        return {"ranks": layer_ranks(self.layers)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Refuse to go on with other layers."""
        check_layers(None, "the checkpoint", state["ranks"], lambda: layer_ranks(self.layers))

    def scalars(self) -> dict[str, float]:
        """Orthogonality defect and angle; computed now."""
        return reflection_summary(list(self.layers.values()))
