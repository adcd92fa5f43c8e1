"""What every adapted layer is: the frozen layer it wraps, seen as one matrix, and an adapter that acts on it.

The wrapped layer is called `fixed_linear` and HRA's vectors `hra_u`, as in the HRA authors' checkpoints and in what
`ortho add-hra --as checkpoint` writes, so that such files load by name. Adapters nest: the innermost acts first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli.errors import TargetError
from ortho_cli.linalg.operator import Operator, Transposed

__all__ = [
    "AdapterLayer",
    "Geometry",
    "adapter_layers",
    "base_of",
    "beside",
    "convolve",
    "disable_adapter",
    "geometry",
    "is_sharded",
    "stored_weight",
    "whole",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Geometry:
    """A layer as a matrix `(out, width)`.

    Attributes:
        kind: ``linear``; ``transposed`` (transformers' Conv1D, weight `(in, out)`); ``conv``; or ``opaque``, a layer
            that multiplies by a weight nobody may look at (quantised, sharded, computed).
        out: outputs.
        width: inputs of one output; of a convolution `in / groups * kernel`.
        groups: of a convolution.
    """

    kind: str
    out: int
    width: int
    groups: int = 1


def geometry(module: nn.Module) -> Geometry:
    """How a layer is a matrix.

    Raises:
        TargetError: it is none, or one that an adapter cannot act on; with the reason.

    >>> geometry(nn.Conv2d(4, 6, 3, groups=2))
    Geometry(kind='conv', out=6, width=18, groups=2)
    """
    if isinstance(module, AdapterLayer):
        return module.geometry
    if isinstance(module, TRANSPOSED):
        raise TargetError("a transposed convolution; its weight mixes inputs and outputs the other way round")
    weight = getattr(module, "weight", None)
    if isinstance(module, CONVOLUTIONS):
        convolution = next(kind for kind in CONVOLUTIONS if isinstance(module, kind))
        if type(module).forward is not convolution.forward or not isinstance(weight, Tensor):
            raise TargetError(f"a {type(module).__name__}, a convolution with a forward of its own")
        return Geometry("conv", module.out_channels, weight[0].numel(), module.groups)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, Tensor):
        return Geometry("transposed", weight.shape[1], weight.shape[0])
    found, width = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not isinstance(found, int) or not isinstance(width, int):
        raise TargetError(f"a {type(module).__name__}, which multiplies its input by no weight")
    if next(module.children(), None) is not None:
        raise TargetError(f"a {type(module).__name__}, which is made of other layers")
    plain = (
        type(module).forward is nn.Linear.forward
        and isinstance(weight, Tensor)
        and type(weight) in (Tensor, nn.Parameter)  # quantised and sharded weights are tensors of their own types
        and weight.is_floating_point()
        and tuple(weight.shape) == (found, width)
    )
    return Geometry("linear" if plain else "opaque", found, width)


class AdapterLayer(nn.Module, ABC):
    """A frozen layer with one adapter on it. Attributes it lacks are those of the frozen layer at the bottom.

    Attributes:
        fixed_linear: the layer that is adapted, perhaps itself adapted.
        enabled: whether the adapter acts.
        strength: how far: 0 not at all, 1 as trained; set by `ortho.set_strength`.
        geometry: the layer as a matrix.
    """

    fixed_linear: nn.Module

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.geometry = geometry(base)
        self.enabled = True
        self.strength = 1.0
        self.fixed_linear = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "fixed_linear":
                raise
            return getattr(base_of(self), name)

    @abstractmethod
    def operator(self) -> Operator:
        """What this adapter does to the weight `(out, width)` it is put on, at strength 1."""

    def acts(self) -> bool:
        """Whether the adapter changes anything now.

        Raises:
            TargetError: training at another strength than 1: what trains is the whole adapter. In evaluation mode it is
                a constant there: gradients reach the inputs, not the adapter.
        """
        wanted = self.enabled and self.strength != 1 and self.training and torch.is_grad_enabled()
        if wanted and any(parameter.requires_grad for parameter in self.adapter_parameters()):
            raise TargetError(
                f"an adapter at strength {self.strength:g} cannot be trained: its gradients are those of strength 1",
                hint="ortho.set_strength(model, 1) to train on, model.eval() to use it as it is",
            )
        return self.enabled and self.strength != 0

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What the adapter trains."""
        return list(self.parameters(recurse=False))

    @abstractmethod
    def times(self, columns: Tensor) -> Tensor:
        """`W' columns`, for `(width, k)` columns, in the weight's type; `W'` is never formed."""

    def base_times(self, columns: Tensor) -> Tensor:
        """`W columns`, for the weight this adapter is put on."""
        if isinstance(self.fixed_linear, AdapterLayer):
            return self.fixed_linear.times(columns)
        matrix = self.matrix()
        return matrix @ columns.to(matrix.dtype)

    def matrix(self) -> Tensor:
        """The frozen weight as `(out, width)`: a view, never a copy, but gathered where it is sharded.

        Raises:
            TargetError: it is quantised or computed.
        """
        weight = stored_weight(self)
        return weight.T if self.geometry.kind == "transposed" else weight.flatten(1)

    def merged_weight(self) -> Tensor:
        """The weight with this and all inner adapters in it, at their strengths, in at least float32: `ortho merge`.

        Returns:
            In the shape and type in which the frozen layer keeps its own.

        Raises:
            TargetError: the frozen layer's weight cannot be read.
        """
        base = self.fixed_linear
        weight = base.merged_weight() if isinstance(base, AdapterLayer) else stored_weight(self)
        if not self.enabled or self.strength == 0:
            return weight
        wide = weight.detach() if weight.dtype in (torch.float32, torch.float64) else weight.detach().float()
        operator = self.operator().power(self.strength).to(wide.dtype)
        acting = Transposed(operator) if self.geometry.kind == "transposed" else operator
        return acting.apply(wide.flatten(1)).view(weight.shape).to(weight.dtype)


def base_of(module: nn.Module) -> nn.Module:
    """The frozen layer under all adapters."""
    while isinstance(module, AdapterLayer):
        module = module.fixed_linear
    return module


def beside(base: nn.Module, tensor: Tensor) -> Tensor:
    """A copy of a tensor as adapters keep theirs: on the base's device, in float32 or a wider type of either, dense."""
    weights = [p for p in base.parameters() if p.is_floating_point()]
    wide = any(weight.dtype == torch.float64 for weight in (*weights, tensor))
    device = next((p.device for p in base.parameters()), tensor.device)
    dtype = torch.float64 if wide else torch.float32
    return tensor.detach().to(device, dtype, copy=True, memory_format=torch.contiguous_format)


def stored_weight(layer: AdapterLayer) -> Tensor:
    """The frozen weight under all adapters, as it is kept; where it is sharded, all of it.

    Raises:
        TargetError: it is quantised or computed.
    """
    base = base_of(layer)
    if layer.geometry.kind == "opaque":
        raise TargetError(
            f"the weight of a {type(base).__name__} cannot be read",
            hint="fold the adapter into the unquantised checkpoint: ortho merge BASE ADAPTER -o OUT",
        )
    weight = base.weight
    assert isinstance(weight, Tensor)
    return whole(weight)


def convolve(layer: AdapterLayer, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """`B (A * x)` beside a convolution: `A (r, width)` with its stride, padding and dilation, `B (out, r)` 1 x 1."""
    base: Any = base_of(layer)
    shape, groups = base.weight.shape, layer.geometry.groups
    kernel = down.reshape(-1, *shape[1:]).to(x.dtype)
    if groups > 1:  # each group of inputs meets all of A
        kernel = kernel.repeat(groups, *[1] * (kernel.dim() - 1))
    inner: Tensor = base._conv_forward(x, kernel, None)
    pointwise = up.reshape(shape[0], -1, *[1] * (len(shape) - 2)).to(inner.dtype)
    return (F.conv1d, F.conv2d, F.conv3d)[len(shape) - 3](inner, pointwise, groups=groups)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded (then every process must ask); differentiable."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return found


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part only."""
    return hasattr(tensor, "full_tensor")


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapted layers of a model by the layers' own names; of nested ones the outermost."""
    found: dict[str, AdapterLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer) and not name.endswith(".fixed_linear"):
            found[name] = module
    return found


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Run the model without its adapters inside the block: the base, to compare or to distil from.

    Args:
        model: any module; layers that are off already stay off.

    >>> import ortho_cli as ortho
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> x = torch.randn(2, 4)
    >>> before = model(x)
    >>> layer = ortho.add_adapter(model, rank=2, targets=["0"])[0]
    >>> _ = nn.init.normal_(layer.vectors)
    >>> with ortho.disable_adapter(model):
    ...     torch.equal(model(x), before)
    True
    >>> torch.equal(model(x), before)
    False
    """
    active = [module for module in model.modules() if isinstance(module, AdapterLayer) and module.enabled]
    for layer in active:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in active:
            layer.enabled = True
