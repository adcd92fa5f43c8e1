"""Train with factors in place of weights: `ortho.factorize_` for any loop, and the recipe's `factorized`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ortho_cli.errors import CheckpointError

from .factorized_base import FactorizedLayer
from .factorized_export import write_exports
from .factorized_layers import factorized_layer
from .factorized_select import layer_ranks, select_candidates
from .factorized_start import draw_plain_, fill_spectral_
from .factorized_summary import product_summary
from .inject import layer_seed
from .method import Context, Method

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import Factorized

__all__ = ["FactorizedMethod", "factorize_"]


def factorize_(
    model: nn.Module,
    rank: int | None = None,
    *,
    rank_scale: float | None = None,
    target_ratio: float | None = None,
    targets: str | Sequence[str] = "auto",
    exclude: Sequence[str] = (),
    spectral: bool = True,
    square: bool = False,
    plain_start: str | None = None,
    compat: str | None = None,
    seed: int = 0,
) -> dict[str, FactorizedLayer]:
    """Replace layers by factors `U VT` of low rank (or of high rank, to train overcomplete), in place.

    Exactly one of `rank`, `rank_scale` and `target_ratio` decides the ranks. Make the optimizer afterwards.

    Args:
        model: any module, fresh or trained; Linear, Embedding and convolutions of every kind can be factored.
        rank: of every layer.
        rank_scale: rank as a share of a layer's full one (`min(out, in)`, of a convolution `out * kh`); may exceed 1.
        target_ratio: parameters of the whole model after, over before; layers that would not shrink stay dense.
        targets: globs over layer names; "auto": all but the first convolution, embeddings and the output head.
        exclude: globs of layers to leave alone.
        spectral: start from the SVD of the weights; False draws factors anew (`plain_start`).
        square: put a square matrix, at first the identity, between the factors ("deep").
        plain_start: "kaiming", "fan-in", "fan-out" or "uniform"; None: by the kind of layer.
        compat: "paper" repeats the paper's code where it is not the best way: its search for a target ratio, and its
            decomposition of convolutions, which is right for fresh weights only.
        seed: of what is drawn.

    Returns:
        The new layers by name.

    Raises:
        UsageError: not exactly one rank rule, or a ratio out of reach.
        TargetError: nothing to factor, or a layer that cannot be.
        NumericsError: a weight that is not finite.

    Cost: one eigendecomposition of each layer's smaller Gram matrix.
    Reference: FNL, arXiv:2105.01029.

    >>> import ortho_cli as ortho
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 1))
    >>> layers = ortho.factorize_(model, target_ratio=0.25)
    >>> {name: layer.rank for name, layer in layers.items()}
    {'0': 12, '2': 12}
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> inputs = torch.randn(32, 64)
    >>> for _ in range(50):
    ...     loss = (model(inputs) - inputs[:, :1]).square().mean()
    ...     optimizer.zero_grad(); loss.backward(); ortho.frobenius_decay_(model, 1e-4); optimizer.step()
    >>> loss.item() < 0.1
    True
    """
    chosen = select_candidates(model, targets, exclude)
    ranks = layer_ranks(
        model, chosen, rank=rank, rank_scale=rank_scale, target_ratio=target_ratio, square=square, compat=compat
    )
    if plain_start is None:
        plain_start = getattr(model, "plain_start", None)  # models of the paper say how it started their factors
    made: dict[str, FactorizedLayer] = {}
    for layer, own in zip(chosen, ranks, strict=True):
        if own is None:
            continue
        factored = factorized_layer(layer.module, own, square=square)
        generator = torch.Generator().manual_seed(layer_seed(seed, layer.name))
        if spectral:
            fill_spectral_(factored, layer.weight, generator, compat=compat)
        else:
            draw_plain_(factored, generator, plain_start)
        made[layer.name] = factored
    _replace(model, {id(layer.module): made[layer.name] for layer in chosen if layer.name in made})
    return made


def _replace(model: nn.Module, layers: dict[int, FactorizedLayer]) -> None:
    """Put layers where others stand, everywhere (shared ones stand twice)."""
    for owner in list(model.modules()):
        for key, child in list(owner._modules.items()):  # named_children names a shared layer once
            if child is not None and id(child) in layers:
                setattr(owner, key, layers[id(child)])


class FactorizedMethod(Method):
    """The recipe's `factorized`."""

    name = "factorized"

    def __init__(self, config: Factorized) -> None:
        super().__init__(config)
        self.layers: dict[str, FactorizedLayer] = {}
        self.notes: list[str] = []
        self._lr: float | None = None

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Factor the layers.

        Raises:
            OrthoError: as `factorize_`.
        """
        config: Factorized = self.config
        before = _count(model)
        self.layers = factorize_(
            model, config.rank, rank_scale=config.rank_scale, target_ratio=config.target_ratio, targets=config.targets,
            exclude=config.exclude, spectral=config.spectral, square=config.square, plain_start=config.plain_start,
            compat=config.compat, seed=context.seed,
        )  # fmt: skip
        after = _count(model)
        ranks = [layer.rank for layer in self.layers.values()]
        self.notes.append(
            f"{len(ranks)} layers of rank {min(ranks)} to {max(ranks)}: {before:,} -> {after:,} parameters "
            f"({after / before:.4f})"
        )
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
        return {"ranks": {name: layer.rank for name, layer in self.layers.items()}, "lr": self._lr}

    def load_state(self, state: dict[str, Any]) -> None:
        """Refuse to go on with other layers or ranks.

        Raises:
            CheckpointError: the recipe makes other factors than the checkpoint has.
        """
        own = self.state()["ranks"]
        if state["ranks"] != own:
            differ = sorted(name for name in own | state["ranks"] if own.get(name) != state["ranks"].get(name))
            raise CheckpointError(
                f"the checkpoint has other factors: {differ[0]} is of rank {state['ranks'].get(differ[0])} there, "
                f"{own.get(differ[0])} here",
                hint="resume with the recipe it was trained with",
            )
        self._lr = state["lr"]

    def scalars(self) -> dict[str, float]:
        """Means over layers: norms of the products, their bound, non-orthogonality, effective learning rates."""
        return product_summary(list(self.layers.values()), self._lr)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
