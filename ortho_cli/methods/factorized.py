"""The recipe's `factorized`: train with factors in place of weights, and leave the dense network behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ortho_cli.errors import CheckpointError

from .factored_module import FactoredModule
from .factorized_attention import resizable_attention, shrink_heads_
from .factorized_export import write_exports
from .factorized_model import factorize_
from .factorized_select import select_candidates
from .factorized_summary import product_summary
from .method import Context, Method
from .tensor_layers import TensorLayer

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import Factorized

__all__ = ["FactorizedMethod"]


class FactorizedMethod(Method):
    """The recipe's `factorized`."""

    name = "factorized"

    def __init__(self, config: Factorized) -> None:
        super().__init__(config)
        self.layers: dict[str, FactoredModule] = {}
        self.heads: dict[str, int] = {}
        self.notes: list[str] = []
        self._lr: float | None = None

    def chosen(self, model: nn.Module) -> dict[str, list[str]]:
        """The layers that each pattern of the recipe means, for a dry run."""
        patterns = [self.config.targets] if isinstance(self.config.targets, str) else self.config.targets
        heads = {"attention": list(resizable_attention(model))} if self.config.attention else {}
        return {p: [each.name for each in select_candidates(model, [p], self.config.exclude)] for p in patterns} | heads

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Factor the layers.

        Raises:
            OrthoError: as `factorize_`.
        """
        config: Factorized = self.config
        before = _count(model)
        self.layers = factorize_(
            model, config.rank, rank_scale=config.rank_scale, target_ratio=config.target_ratio, targets=config.targets,
            exclude=config.exclude, spectral=config.spectral, square=config.square, form=config.form,
            plain_start=config.plain_start, compat=config.compat, seed=context.seed,
        )  # fmt: skip
        if config.attention and config.rank_scale is not None:
            self.heads = shrink_heads_(model, config.rank_scale, spectral=config.spectral, seed=context.seed)
        after = _count(model)
        ranks = [max(ranks) for ranks in _ranks(self.layers).values()]
        self.notes.append(
            f"{len(ranks)} layers of rank {min(ranks)} to {max(ranks)}: {before:,} -> {after:,} parameters "
            f"({after / before:.4f})"
        )
        if self.heads:
            self.notes.append(f"{len(self.heads)} attention layers with heads of {max(self.heads.values())}")
        if context.base is not None and not config.spectral:
            self.notes.append("spectral: false draws new factors; the base's weights of these layers are not used")

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, phase: str) -> bool:
        """Remember the learning rate, for the effective one."""
        self._lr = float(optimizer.param_groups[0]["lr"])
        return False

    def export(self, model: nn.Module, path: Path) -> None:
        """Write the dense network of the original size, which loads in the plain model, and the factors."""
        write_exports(model, path)

    def state(self) -> dict[str, Any]:
        """The ranks; the factors are in the model."""
        return {"ranks": _ranks(self.layers) | {name: [size] for name, size in self.heads.items()}, "lr": self._lr}

    def load_state(self, state: dict[str, Any]) -> None:
        """Refuse to go on with other layers or ranks.

        Raises:
            CheckpointError: the recipe makes other factors than the checkpoint has.
        """
        own = self.state()["ranks"]
        if state["ranks"] != own:
            differ = sorted(name for name in own | state["ranks"] if own.get(name) != state["ranks"].get(name))
            raise CheckpointError(
                f"the checkpoint has other factors: {differ[0]} is of ranks {state['ranks'].get(differ[0])} there, "
                f"{own.get(differ[0])} here",
                hint="resume with the recipe it was trained with",
            )
        self._lr = state["lr"]

    def scalars(self) -> dict[str, float]:
        """Means over layers: norms of the products, their bound, non-orthogonality, effective learning rates."""
        return product_summary(list(self.layers.values()), self._lr)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _ranks(layers: Mapping[str, FactoredModule]) -> dict[str, list[int]]:
    return {
        name: list(layer.ranks) if isinstance(layer, TensorLayer) else [layer.rank] for name, layer in layers.items()
    }
