"""From an adapted layer to the tensors that another dialect stores: reflections as they are, or the exact B and A."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ortho_cli.checkpoints import layouts
from ortho_cli.checkpoints.adapters import Adapter, AdapterLayer
from ortho_cli.checkpoints.dialects.kinds import dimensions
from ortho_cli.checkpoints.reading import TensorReader, row_blocks
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.errors import TargetError, UsageError

from .adapter_folder import Factor

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NamedLayer", "lora_factors", "reflection_factor"]


@dataclass(frozen=True)
class NamedLayer:
    """One layer under way: its canonical name, what acts on it, and its weight where a base is given."""

    name: str
    canonical: str
    layer: AdapterLayer
    weight: TensorInfo | None


def reflection_factor(layer: AdapterLayer) -> Factor:
    """The vectors ``(in, r)`` of a Householder layer, as they are stored."""
    info = layer.tensors["vectors"]

    def make() -> Tensor:
        with TensorReader() as reader:
            return reader.read_copy(info)

    return Factor(info.shape, make)


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
    kernel = _kernel(layer)
    up_shape = (rows, rank) if not kernel else (rows, rank, 1, 1)
    down_shape = (rank, columns) if not kernel else (rank, columns // (kernel[0] * kernel[1]), *kernel)
    up = Factor(up_shape, lambda: _up(adapter, layer, rows, columns).reshape(up_shape))
    down = Factor(down_shape, lambda: _down(adapter, layer, rows, columns).reshape(down_shape))
    return up, down


def _kernel(layer: NamedLayer) -> tuple[int, ...]:
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
    """A ``(r, columns)`` of one layer, which every block of rows gives alike."""
    return next(down for _, down in _low_rank(adapter, layer, rows, columns))


def _low_rank(adapter: Adapter, layer: NamedLayer, rows: int, columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of B, and A, in float64, from blocks of the weight's rows where the operator multiplies by it."""
    import torch

    operator = adapter.operator(layer.name, "float64")
    if layer.weight is None:
        yield operator.as_low_rank(torch.zeros((), dtype=torch.float64).expand(rows, columns))
        return
    with TensorReader() as reader:
        for block in row_blocks(layer.weight, operator.row_multiple):
            weight = reader.read(layer.weight, block).to(torch.float64).reshape(block.stop - block.start, columns)
            yield operator.as_low_rank(weight, block.start)
