"""GOR in training: the groups of filters of chosen layers are pulled towards orthonormal ones.

`gor_penalty` is one line for anyone's loop; `GORMethod` is the same in a recipe. The mathematics is `linalg/group.py`,
the choice of layers `gor_layers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import TargetError
from ortho_cli.linalg.group import bucket_penalty, buckets, count_groups, filter_rows, group_penalty

from .adapter_layer import whole
from .gor_layers import AUTO, DECODER_UP, GroupedLayer, default_targets, select_layers
from .method import Context, Method
from .sharded import accumulate

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import GOR

__all__ = ["GORMethod", "add_gor_gradients", "gor_penalty"]


def gor_penalty(
    model_or_weight: nn.Module | Tensor,
    groups: int = 32,
    mode: str = "inter",
    *,
    min_filters: int = 4,
    targets: str | Sequence[str] = "conv",
    normalize: bool = False,
) -> Tensor:
    r"""Measure how far groups of filters are from orthonormal, as a penalty to add to a loss.

    :math:`\sum_b \|T_b T_b^\top - I\|_F^2` over small sets of filters: `inter` takes consecutive filters, `intra` the
    filters of equal place in all groups; `groups=1` is soft orthogonality of whole layers. Zero exactly for orthonormal
    sets (of columns, where a set has more filters than each has weights).

    Args:
        model_or_weight: a model, of which layers that train are taken; or one weight, its filters along dimension 0.
        groups: the most groups a layer has.
        mode: "inter" or "intra".
        min_filters: the fewest filters a group has; layers with fewer are left out.
        targets: of a model, "conv", "linear", "all", or patterns of layer names (globs, or `re:EXPRESSION`).
        normalize: the scale-free form: only directions and relative lengths inside a set count.

    Returns:
        0-dimensional, in at least float32 whatever the weights are; differentiable.

    Raises:
        TargetError: nothing to regularise; a weight with fewer than `min_filters` filters.
        UsageError: a pattern that cannot be read.

    Cost: three products of the size of one group's Gram times the group; milliseconds per million weights on a CPU.
    Use instead: `add_gor_gradients` where only the gradient is wanted: no graph, about a third less time.
    Reference: GOR, arXiv:2306.10001.

    >>> import ortho_cli as ortho
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2))
    >>> images, task_weight = torch.randn(8, 3, 9, 9), 1e-3
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    >>> start = ortho.gor_penalty(model).item()
    >>> for _ in range(50):
    ...     loss = task_weight * model(images).square().mean() + ortho.gor_penalty(model, groups=32, mode="inter")
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
    >>> ortho.gor_penalty(model).item() < 0.01 * start
    True
    """
    if isinstance(model_or_weight, Tensor):
        weight = model_or_weight
        if weight.dim() < 2:
            raise TargetError(
                f"a weight of shape {tuple(weight.shape)} has no filters", hint="give one of 2 or more axes"
            )
        count, _ = count_groups(weight.shape[0], groups, min_filters)
        if not count:
            raise TargetError(
                f"a weight with {weight.shape[0]} filters is fewer than the {min_filters} of one group",
                hint=f"use min_filters={weight.shape[0]}",
            )
        return group_penalty([filter_rows(whole(weight))], [count], mode, normalize=normalize)
    layers, _, _ = select_layers(model_or_weight, targets, groups, min_filters)
    rows = [layer.rows(whole(layer.weight)) for layer in layers]
    return group_penalty(rows, [layer.count for layer in layers], mode, normalize=normalize)


@torch.no_grad()
def add_gor_gradients(
    layers: Sequence[GroupedLayer], scale: float, mode: str = "inter", *, normalize: bool = False
) -> Tensor | None:
    """Add the gradient of `scale * penalty` to `.grad` of the layers' weights, without a graph.

    Args:
        layers: of :func:`~ortho_cli.methods.gor_layers.select_layers`; weights may be sharded (DTensor): then they are
            gathered one bucket at a time, by all processes alike.
        scale: the weight of the penalty.
        mode: "inter" or "intra".
        normalize: the scale-free form.

    Returns:
        The penalty without `scale`, 0-dimensional; None for no layers.

    >>> layer = nn.Linear(4, 4, bias=False)
    >>> _ = nn.init.constant_(layer.weight, 1.0)
    >>> chosen, _, _ = select_layers(layer, "linear")
    >>> add_gor_gradients(chosen, 0.5).item(), layer.weight.grad.unique().tolist()
    (228.0, [30.0])
    """
    total: Tensor | None = None
    weights = [layer.weight for layer in layers]
    specs = [
        (layer.filters, weight.numel() // layer.filters, layer.count, weight.dtype, weight.device)
        for layer, weight in zip(layers, weights, strict=True)
    ]
    for members in buckets(specs):
        rows = [layers[index].rows(whole(weights[index])) for index in members]
        value, gradients = bucket_penalty(rows, layers[members[0]].count, mode, normalize=normalize, scale=scale)
        total = value if total is None else total + value.to(total.device)
        for index, gradient in zip(members, gradients, strict=True):
            accumulate(weights[index], layers[index].unrows(gradient))
    return total


class GORMethod(Method):
    """The recipe's `gor`."""

    # The gradient is added once every optimizer step, in `after_backward`, and not through a term of the loss: there
    # gradients are averaged over processes, unscaled and not yet clipped, so adding the same closed form on every
    # process is exactly what a loss term would have given, while a loss term would be computed for each micro-batch,
    # need a graph, and, of sharded weights, gather all at once. Nor can it be forgotten by DDP, as in the paper's
    # script, whose penalty bypasses the wrapper.

    name = "gor"

    def __init__(self, config: GOR) -> None:
        super().__init__(config)
        self.layers: list[GroupedLayer] = []
        self.notes: list[str] = []
        self._skipped = 0
        self._lost: list[str] = []
        self._regularised: dict[str, int] = {}  # by phase, as are the values
        self._values: dict[str, Tensor | float] = {}

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Choose the layers.

        Raises:
            TargetError: the targets choose nothing that trains.
        """
        config: GOR = self.config
        targets = self._targets(model)
        self.layers, self.notes, self._skipped = select_layers(model, targets, config.groups, config.min_filters)
        if targets == DECODER_UP:
            self.notes.append("decoder-up: the outer factors of the LoRA on the UNet's decoder")

    def chosen(self, model: nn.Module) -> dict[str, list[str]]:
        """The layers that each target means, for a dry run."""
        targets = self._targets(model)
        return {
            target: [
                layer.name for layer in select_layers(model, target, self.config.groups, self.config.min_filters)[0]
            ]
            for target in ([targets] if isinstance(targets, str) else targets)
        }

    def _targets(self, model: nn.Module) -> str | tuple[str, ...]:
        config: GOR = self.config
        return default_targets(model) if config.targets == AUTO else config.targets

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """None of its own; asked once all methods have had their way with the model, so the place to look again.

        Raises:
            TargetError: before the first step: a later method froze or replaced every layer.
        """
        own = {id(parameter) for parameter in model.parameters()}
        self._lost = [layer.name for layer in self.layers if not layer.trains_in(own)]
        if len(self._lost) == len(self.layers) and not self._values:  # oialr may replace all of them in the end
            raise TargetError(
                f"none of the {len(self.layers)} layers that gor chose trains any more",
                hint="put gor after the method that freezes or replaces them",
            )
        return []

    def closing_notes(self) -> list[str]:
        """Which of the chosen layers a later method took away."""
        if not self._lost:
            return []
        return [f"{len(self._lost)} of {len(self.layers)} layers, first {self._lost[0]}, were frozen or replaced later"]

    def after_backward(self, model: nn.Module, optimizer: torch.optim.Optimizer, phase: str) -> None:
        """Add the gradient for those layers that this phase's optimizer steps.

        Raises:
            TargetError: weights are kept in another shape than when they were chosen.
        """
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        layers = []
        for layer in self.layers:
            weight = getattr(layer.owner, layer.attribute, None)
            if weight is None:  # replaced by a later method
                continue
            if weight.shape != layer.shape or not isinstance(weight, nn.Parameter):
                raise TargetError(
                    f"weight {layer.name} is kept as {tuple(weight.shape)} and was {layer.shape} when gor chose it",
                    hint="under FSDP use fsdp_version 2, which keeps weights whole",
                )
            if id(weight) in stepped and weight.requires_grad:
                layers.append(layer)
        value = add_gor_gradients(layers, self.config.penalty, self.config.mode, normalize=self.config.normalize)
        self._regularised[phase] = len(layers)
        self._values[phase] = 0.0 if value is None else value

    def scalars(self) -> dict[str, float]:
        """The weighted penalty of the last step, and how many layers it covers."""
        if not self._values:
            return {}
        return {
            "penalty": self.config.penalty * sum(float(value) for value in self._values.values()),
            "layers": float(sum(self._regularised.values())),
            "layers_skipped": float(self._skipped),
            "layers_with_fewer_groups": float(sum(layer.count != layer.wanted for layer in self.layers)),
        }

    def state(self) -> dict[str, Any]:
        """The last values; nothing here trains."""
        values = {phase: float(value) for phase, value in self._values.items()}
        return {"values": values, "regularised": dict(self._regularised)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put them back."""
        self._values = dict(state["values"])
        self._regularised = dict(state["regularised"])
