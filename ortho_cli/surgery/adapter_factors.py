"""From an adapted layer to the tensors that another dialect stores: reflections, or the exact B and A.

At strength 1 as they are stored; at another, those of the operator's power, in as many columns as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from ortho_cli.checkpoints import layouts
from ortho_cli.checkpoints.adapters import Adapter, AdapterLayer
from ortho_cli.checkpoints.dialects.kinds import dimensions
from ortho_cli.checkpoints.reading import TensorReader, row_blocks
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.errors import TargetError, UsageError

from .adapter_folder import Factor
from .strengths import Strengths

if TYPE_CHECKING:
    from torch import Tensor

    from ortho_cli.linalg.operator import Operator

__all__ = [
    "NamedLayer",
    "is_span",
    "kernel_of",
    "lora_factors",
    "lora_shapes",
    "low_rank_blocks",
    "reflection_factor",
    "with_strengths",
]


@dataclass(frozen=True)
class NamedLayer:
    """One layer under way: its canonical name, what acts on it, its weight where a base is given, and its strength.

    `spanned` says that a Gram-Schmidt layer may stay one: none of the adapter's has another strength than 1.
    """

    name: str
    canonical: str
    layer: AdapterLayer
    weight: TensorInfo | None
    strength: float = 1.0
    spanned: bool = True


def with_strengths(layers: Sequence[NamedLayer], base: Checkpoint | None, values: Sequence[str]) -> list[NamedLayer]:
    """The layers at the strengths of `--strength`, whose patterns are in the base's naming or in canonical names.

    Raises:
        TargetError: a pattern matches no layer.
        UsageError: a value that is no finite number.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        rows, columns = dimensions(layer.layer)
        shapes[_called(layer)] = layer.weight.shape if layer.weight else (rows or 0, columns or 0)
    given = Strengths(values=tuple(values)).by_layer(shapes, base.layout if base is not None else "plain")
    whole = all(value == 1 for value in given.values())
    return [replace(layer, strength=given[_called(layer)], spanned=whole) for layer in layers]


def _called(layer: NamedLayer) -> str:
    own = layer.weight.name if layer.weight else layer.canonical
    return own.removesuffix(".weight").removesuffix(".fixed_linear")


def is_span(layer: NamedLayer) -> bool:
    """Whether the vectors that `reflection_factor` gives stand for the reflection of all of their span."""
    return layer.spanned and bool(layer.layer.options.get("gram_schmidt"))


def reflection_factor(adapter: Adapter, layer: NamedLayer) -> Factor:
    """The vectors ``(in, r)`` of a Householder layer: as they are stored, or those of its power.

    At strength 0 their number is even, whatever it was: an odd chain is a mirror.
    """
    info = layer.layer.tensors["vectors"]
    plain = not layer.layer.options.get("gram_schmidt") or layer.spanned
    width, columns = info.shape
    if layer.strength == 0:
        columns = columns - columns % 2 or 2

    def make() -> Tensor:
        if layer.strength == 1 and plain:
            with TensorReader() as reader:
                return reader.read_copy(info)
        return _turned(adapter.operator(layer.name, "float64"), layer.strength, columns)

    return Factor((width, columns), make)


def _turned(operator: Operator, strength: float, columns: int) -> Tensor:
    """That many vectors of a chain's power: what is left over is pairs that cancel."""
    import torch

    from ortho_cli.linalg.householder import Householder

    assert isinstance(operator, Householder)
    found = operator.rotation().power(strength).reflections()
    pairs = operator.vectors[:, :1].expand(-1, columns - found.shape[1])
    return torch.cat([found, pairs / torch.linalg.vector_norm(pairs, dim=0)], dim=1)


def lora_factors(adapter: Adapter, layer: NamedLayer) -> tuple[Factor, Factor]:
    """Up and down of one layer at scale 1, shaped for its Linear or convolution.

    Raises:
        UsageError: a base is needed and there is none.
        TargetError: the layer's change has full rank.
    """
    if layer.weight is None and layer.layer.kind != "lora":
        reason = (
            "a Householder adapter becomes a LoRA only together with its base (B = -W V T)"
            if layer.layer.kind == "hra"
            else f"layer {layer.name} ({layer.layer.kind}) does not say whether it sits on a Linear or a convolution"
        )
        raise UsageError(reason, hint="add --base BASE")
    rows, columns = dimensions(layer.layer)
    if layer.weight is not None:
        rows, columns = layer.weight.shape[0], layer.weight.numel // layer.weight.shape[0]
    assert rows is not None and columns is not None
    rank = layer.layer.rank if layer.layer.kind in ("hra", "lora") else adapter.operator(layer.name).rank
    if rank is None:
        raise TargetError(f"layer {layer.name} ({layer.layer.kind}) has full rank; a LoRA would be no smaller than it")
    up_shape, down_shape = lora_shapes(rows, columns, rank, kernel_of(layer))
    up = Factor(up_shape, lambda: _up(adapter, layer, rows, columns).reshape(up_shape))
    down = Factor(down_shape, lambda: _down(adapter, layer, rows, columns).reshape(down_shape))
    return up, down


def lora_shapes(rows: int, columns: int, rank: int, kernel: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of up and down on a weight seen as ``(rows, columns)``; a convolution has a kernel."""
    if not kernel:
        return (rows, rank), (rank, columns)
    return (rows, rank, 1, 1), (rank, columns // prod(kernel), *kernel)


def kernel_of(layer: NamedLayer) -> tuple[int, ...]:
    """Kernel size of a convolution, () for a Linear layer."""
    if layer.weight is not None:
        return layouts.canonical_shape(f"{layer.canonical}.weight", layer.weight.shape)[2:]
    kernels = (layer.layer.tensors[role].shape[2:] for role in ("mid", "down") if role in layer.layer.tensors)
    return next((kernel for kernel in kernels if kernel), ())


def _up(adapter: Adapter, layer: NamedLayer, rows: int, columns: int) -> Tensor:
    """B ``(rows, r)`` of one layer."""
    import torch

    return torch.cat([up for up, _ in _low_rank(adapter, layer, rows, columns)])


def _down(adapter: Adapter, layer: NamedLayer, rows: int, columns: int) -> Tensor:
    """A ``(r, columns)`` of one layer; where rows do not mix it is alike for any of them, and for none."""
    import torch

    whole, operator = _operators(adapter, layer)
    if operator.row_multiple == 0:
        return next(down for _, down in _low_rank(adapter, layer, rows, columns))
    return _padded(*operator.as_low_rank(torch.empty(0, columns, dtype=torch.float64)), whole.rank)[1]


def _operators(adapter: Adapter, layer: NamedLayer) -> tuple[Operator, Operator]:
    """What acts on one layer, in float64: at strength 1, and at its own."""
    whole = adapter.operator(layer.name, "float64")
    return whole, whole if layer.strength == 1 else whole.power(layer.strength)


def _padded(up: Tensor, down: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Factors of the rank that was planned from headers; a chain may span less."""
    from torch.nn.functional import pad

    more = max((rank or 0) - down.shape[0], 0)
    return pad(up, (0, more)), pad(down, (0, 0, 0, more))


def _low_rank(adapter: Adapter, layer: NamedLayer, rows: int, columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of B, and A, in float64, from blocks of the weight's rows where the operator multiplies by it."""
    import torch

    whole, operator = _operators(adapter, layer)
    if layer.weight is None:
        yield operator.as_low_rank(torch.zeros((), dtype=torch.float64).expand(rows, columns))
        return
    for up, down in low_rank_blocks(operator, layer.weight, columns):
        yield _padded(up, down, whole.rank)


def low_rank_blocks(operator: Operator, weight: TensorInfo, columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of B, and A, of an operator on a stored weight, in float64, block by block of the weight's rows."""
    import torch

    with TensorReader() as reader:
        for block in row_blocks(weight, operator.row_multiple):
            rows = reader.read(weight, block).to(torch.float64).reshape(block.stop - block.start, columns)
            yield operator.as_low_rank(rows, block.start)
