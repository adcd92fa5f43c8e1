r"""Frobenius decay: decay the product of a layer's factors as weight decay decays a dense weight.

Weight decay on factors is a penalty on the nuclear norm: it takes rank away. This takes :math:`\tfrac c2\|U M V^T\|^2`
instead. `frobenius_decay_` is one line for anyone's loop; `FrobeniusDecayMethod` is the same in a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ortho_cli.checkpoints.targets import select
from ortho_cli.errors import TargetError
from ortho_cli.linalg.frobenius import add_decay_gradients_

from .adapter_layer import whole
from .attention_products import attention_products, skipped_attention
from .factored_module import FactoredModule
from .factorized_base import FactorizedLayer
from .method import Context, Method
from .sharded import accumulate, as_sharded
from .weight_decay import decoupled

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import FrobeniusDecay

__all__ = ["FrobeniusDecayMethod", "frobenius_decay_"]


class Decayed(Protocol):
    """A layer whose product is decayed: a `FactoredModule`, or the `AttentionProducts` of an attention layer."""

    def factor_parameters(self) -> list[nn.Parameter]:
        """What the product is made of."""

    def squared_norm(self, *parts: Tensor) -> Tensor:
        """The squared norm of the product of these parts."""

    def decay_gradients(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """The gradient of half of it for each part."""


def frobenius_decay_(model_or_layers: nn.Module | Sequence[Decayed], coef: float, *, lr: float | None = None) -> None:
    r"""Decay the products of factored layers; call it after `loss.backward()` and before `optimizer.step()`.

    The gradient of :math:`\tfrac c2\|U M V^T\|_F^2` in closed form: no graph, and no product is formed. Give the
    factors no weight decay of their own.

    Args:
        model_or_layers: a model, all factored layers of which are decayed; or some of its layers, with those of
            `attention_products(model).values()` if attention is to be decayed head by head.
        coef: what weight decay would be for a dense layer.
        lr: None adds to `.grad`, for SGD and other optimizers whose weight decay is part of the gradient. With a
            learning rate the factors themselves are decayed, as AdamW decays weights.

    Raises:
        TargetError: a model without factored layers.

    Cost: `2 r^2 (m + n)` multiply-adds a layer.
    Reference: FNL, arXiv:2105.01029, section 4.

    >>> import ortho_cli as ortho
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 1))
    >>> layer = ortho.factorize_(model, rank=8)["1"]
    >>> factors = [layer.U, layer.VT]
    >>> others = [p for p in model.parameters() if all(p is not factor for factor in factors)]
    >>> groups = [{"params": factors, "weight_decay": 0}, {"params": others, "weight_decay": 1e-2}]
    >>> optimizer = torch.optim.SGD(groups, lr=0.1)
    >>> before = layer.weight.norm()
    >>> for _ in range(20):
    ...     loss = model(torch.randn(8, 32)).square().mean()
    ...     optimizer.zero_grad(); loss.backward(); ortho.frobenius_decay_(model, 1e-2); optimizer.step()
    >>> bool(layer.weight.norm() < before)
    True
    """
    layers: Sequence[Decayed]
    if isinstance(model_or_layers, nn.Module):
        layers = [module for module in model_or_layers.modules() if isinstance(module, FactoredModule)]
        if not layers:
            raise TargetError("the model has no factored layers", hint="make some: ortho.factorize_(model, rank)")
    else:
        layers = model_or_layers
    _decay(layers, coef, None if lr is None else {id(p): lr for layer in layers for p in layer.factor_parameters()})


@torch.no_grad()
def _decay(layers: Sequence[Decayed], coef: float, rates: dict[int, float] | None) -> None:
    """Add to gradients, or with learning rates to the factors; of what is frozen or has no rate nothing changes."""
    if not coef:
        return
    together: list[FactorizedLayer] = []
    for layer in layers:
        parameters = layer.factor_parameters()
        plain = all(p.requires_grad and not hasattr(p, "full_tensor") for p in parameters)
        if rates is None and plain and isinstance(layer, FactorizedLayer):
            together.append(layer)
            continue
        gradients = layer.decay_gradients(*map(whole, parameters))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            gradient = gradient.to(parameter.dtype)
            if not parameter.requires_grad:
                continue
            if rates is None:
                accumulate(parameter, gradient.mul_(coef))
            elif id(parameter) in rates:
                parameter.sub_(as_sharded(gradient, parameter), alpha=rates[id(parameter)] * coef)
    for layer in together:
        for parameter in layer.factor_parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    add_decay_gradients_(
        [layer.factors() for layer in together],
        [layer.unstack(*_gradients(layer)) for layer in together],
        coef,
    )


def _gradients(layer: FactorizedLayer) -> list[Tensor]:
    return [p.grad for p in layer.factor_parameters() if p.grad is not None]


class FrobeniusDecayMethod(Method):
    """The recipe's `frobenius_decay`, in place of weight decay on the factors."""

    # Gradients are complete and averaged in `after_backward`, so adding the same closed form on every process is what
    # a term in the loss would have given. Decoupled decay acts there too: before the step, as in AdamW.

    name = "frobenius_decay"

    def __init__(self, config: FrobeniusDecay) -> None:
        super().__init__(config)
        self.layers: dict[str, Decayed] = {}
        self.notes: list[str] = []

    def chosen(self, model: nn.Module) -> dict[str, list[str]]:
        """The factored layers that each pattern of the recipe means."""
        found = _factored(model)
        if not found and self.config.attention:
            return {}
        if not found:
            raise TargetError("the model has no factored layers to decay", hint="put method factorized before it")
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(found, ())
        return {p: list(select([p], shapes, "plain", self.config.exclude).layers) for p in self.config.targets}

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Choose layers, once, as modules: names play no part afterwards.

        Raises:
            TargetError: no factored layers, a pattern that matches none, or no attention where it is wanted.
        """
        names = {name for layers in self.chosen(model).values() for name in layers}
        found = _factored(model)
        self.layers = {name: layer for name, layer in found.items() if name in names}
        left = len(found) - len(names)
        kept = f"; {left} factored layers keep weight decay" if left else ""
        what = "products" if self.config.of == "product" else "factors, not the products,"
        self.notes.append(f"decays the {what} of {len(names)} layers by {self.config.penalty:g}{kept}")
        if self.config.attention:
            heads = attention_products(model)
            self.layers |= heads
            self.notes.append(f"decays the {what} of {len(heads)} attention layers, head by head")
            skipped = skipped_attention(model)
            if skipped:
                name, reason = next(iter(skipped.items()))
                self.notes.append(
                    f"does not decay {len(skipped)} attention layers head by head, first {name}: {reason}"
                )

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The factors, without weight decay; to compare with, with it and nothing else."""
        parameters = [parameter for layer in self.layers.values() for parameter in layer.factor_parameters()]
        return [{"params": parameters, "weight_decay": self.config.penalty if self.config.of == "factors" else 0.0}]

    def after_backward(self, model: nn.Module, optimizer: torch.optim.Optimizer, phase: str) -> None:
        """Decay those layers that this phase's optimizer steps."""
        if self.config.of == "factors":
            return
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        layers = [layer for layer in self.layers.values() if any(id(p) in rates for p in layer.factor_parameters())]
        beside = self.config.form == "decoupled" or (self.config.form == "auto" and decoupled(optimizer))
        _decay(layers, self.config.penalty, rates if beside else None)

    @torch.no_grad()
    def scalars(self) -> dict[str, float]:
        """The penalty, half its weight times the squared norms of the products."""
        squares = [layer.squared_norm(*map(whole, layer.factor_parameters())) for layer in self.layers.values()]
        return {"penalty": self.config.penalty / 2 * sum(map(float, squares)), "layers": float(len(squares))}


def _factored(model: nn.Module) -> dict[str, FactoredModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FactoredModule)}
