"""The recipe's `whiten`: layers that whiten (`whitening.py`) in place of chosen norms, with what these have learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ortho_cli.checkpoints.targets import select
from ortho_cli.errors import TargetError

from .inject import check_seen_once, layer_seed, replace_modules
from .method import Context, Method
from .whitening import Whitening

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import Whiten

__all__ = ["BATCH_NORM", "WhitenMethod", "norm_widths", "whitening_of"]

BATCH_NORM = nn.modules.batchnorm._BatchNorm
NORMS = (BATCH_NORM, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)


def whitening_of(
    norm: nn.Module, *, groups: int = 1, ridge: float = 1e-2, momentum: float = 0.1, solver: str = "eigh"
) -> Whitening:
    """Make the whitening layer that can stand where a norm stands: with its weight, bias and running statistics.

    Args:
        norm: a batch norm of any kind, or a group norm.
        groups: of channels that are whitened together.
        ridge: added to the covariance.
        momentum: share of a batch in the running statistics.
        solver: of the inverse root.

    Raises:
        TargetError: another kind of norm, or channels that do not divide.

    >>> whitening_of(nn.BatchNorm2d(8), groups=2)
    Whitening(8, groups=2, ridge=0.01, solver=eigh)
    """
    if not isinstance(norm, (BATCH_NORM, nn.GroupNorm)):
        raise TargetError(
            f"a {type(norm).__name__} cannot be whitened", hint="batch norms and group norms can: they see channels"
        )
    width = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
    if width % groups:
        near = max(count for count in range(1, groups) if width % count == 0)
        raise TargetError(f"{width} channels do not divide into {groups} groups", hint=f"groups: {near} divides them")
    affine = norm.weight is not None
    made = Whitening(width, groups, ridge=ridge, momentum=momentum, affine=affine, solver=solver)
    if affine:
        made.weight, made.bias = norm.weight, norm.bias
        made.to(norm.weight.device, norm.weight.dtype)
    mean, variance = (getattr(norm, f"running_{name}", None) for name in ("mean", "var"))
    if mean is not None and variance is not None:
        assert made.running_covariance is not None
        made.to(mean.device)
        made.running_mean.copy_(mean)
        made.running_covariance.copy_(torch.diag_embed(variance.reshape(groups, -1)))
    return made.train(norm.training)


class WhitenMethod(Method):
    """The recipe's `whiten`."""

    name = "whiten"

    def __init__(self, config: Whiten) -> None:
        super().__init__(config)
        self.layers: dict[str, Whitening] = {}
        self.notes: list[str] = []

    def chosen(self, model: nn.Module) -> dict[str, list[str]]:
        """The norms that each pattern of the recipe means."""
        config: Whiten = self.config
        norms = norm_widths(model)
        if not norms:
            raise TargetError(f"a {type(model).__name__} has no norms that could be whitened")
        if config.targets == "auto":
            return {"auto": [name for name in norms if name not in _excluded(norms, config.exclude)][:1]}
        return {each: list(select([each], norms, "plain", config.exclude).layers) for each in config.targets}

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Put whitening layers where the chosen norms are.

        Raises:
            TargetError: no norms, a pattern that matches nothing, or a norm that cannot be replaced; with the reason.
            UsageError: a norm inside a block that is computed twice, so that it would see each batch twice.
        """
        config: Whiten = self.config
        keys = ("groups", "ridge", "momentum", "solver")
        settings: dict[str, Any] = {key: getattr(config, key) for key in keys}
        new: dict[int, nn.Module] = {}
        for name in dict.fromkeys(name for names in self.chosen(model).values() for name in names):
            check_seen_once(model, name)
            norm = model.get_submodule(name)
            try:
                made = whitening_of(norm, **settings)
            except TargetError as error:
                raise TargetError(f"layer {name!r}: {error.message}", hint=error.hint) from error
            if config.compat == "paper":
                _as_published(made, layer_seed(context.seed, name))
            self.layers[name] = new[id(norm)] = made
        replace_modules(model, new)
        self.notes.append(f"whitened in place of normalised: {', '.join(self.layers)}")

    def scalars(self) -> dict[str, float]:
        """How many layers there are."""
        return {"layers": float(len(self.layers))}


def _excluded(norms: dict[str, tuple[int, ...]], patterns: Sequence[str]) -> set[str]:
    return set(select(patterns, norms, "plain").layers) if patterns else set()


def norm_widths(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The norms of a model by name, in its order, each with its number of weights.

    >>> norm_widths(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    {'1': (4,)}
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if name and isinstance(module, NORMS):
            weights = getattr(module, "weight", None)
            found[name] = (weights.numel() if isinstance(weights, Tensor) else 0,)
    return found


@torch.no_grad()
def _as_published(layer: Whitening, seed: int) -> None:
    """Average whitening matrices, from the identity on, and draw weights from U(0, 1); biases are 0."""
    assert layer.running_covariance is not None
    layer.running_whitening = torch.eye(layer.running_covariance.shape[-1]).expand_as(layer.running_covariance).clone()
    layer.running_covariance = None
    layer.running_mean.zero_()
    if layer.weight is not None and layer.bias is not None and not layer.weight.is_meta:
        layer.weight.copy_(torch.rand(layer.features, generator=torch.Generator().manual_seed(seed)))
        layer.bias.zero_()
