"""The layers of a checkpoint that an analysis is about, and one pass over their weights, a few layers at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from ortho_cli.checkpoints import targets
from ortho_cli.checkpoints.checkpoint import Checkpoint
from ortho_cli.checkpoints.factored import FactoredLayer, factored_layers, read_factors
from ortho_cli.checkpoints.layer_pool import LayerPool
from ortho_cli.checkpoints.matrices import has_conv1d, layer_view, read_matrix
from ortho_cli.checkpoints.tensors import FLOAT_DTYPES, TensorInfo
from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg.group import filter_rows
from ortho_cli.linalg.matricize import Matricization

__all__ = ["StoredLayer", "measure_each", "stored_layers"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class StoredLayer:
    """One layer as it is stored: a weight, or the two factors of one."""

    name: str
    view: Matricization
    weight: TensorInfo | None
    factored: FactoredLayer | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        if self.factored is not None:
            return self.factored.u.nbytes + self.factored.vt.nbytes
        assert self.weight is not None
        return self.weight.nbytes

    @property
    def filters_shape(self) -> tuple[int, int]:
        """`(filters, entries of each)`."""
        shape = self.view.shape
        rows = shape[1] if self.view.kind == "conv1d" else shape[0]
        return rows, self.view.parameters // max(rows, 1)

    def matrix(self) -> Tensor:
        """The weight as the matrix that factors approximate, of a convolution `(out kh, in kw)`; at least float32.

        Raises:
            NumericsError: a value is not finite.
        """
        return self._product() if self.factored is not None else self._read(self.view)

    def filters(self) -> Tensor:
        """The weight as a matrix with one filter a row, `(out, in kh kw)`; at least float32.

        Raises:
            NumericsError: a value is not finite.
        """
        if self.factored is not None:
            weight = self.view.to_weight(self._product())
        else:  # as it lies in the file, without the copy in another order
            shape = self.view.shape
            weight = self._read(Matricization("linear", (shape[0], prod(shape[1:]))))
        return filter_rows(weight, int(self.view.kind == "conv1d")).contiguous()

    def factors(self) -> tuple[Tensor, Tensor]:
        """`U` and `VT` of a factored layer, in float64.

        Raises:
            NumericsError: a value is not finite.
        """
        assert self.factored is not None, "a layer with one weight"
        u, vt = self.view.unstack(*(part.double() for part in read_factors(self.factored)))
        if not bool(u.isfinite().all() and vt.isfinite().all()):
            raise NumericsError(
                f"layer {self.name}: a factor holds values that are not finite", where=str(self.factored.u.path)
            )
        return u, vt

    def _product(self) -> Tensor:
        u, vt = self.factors()
        return u @ vt

    def _read(self, view: Matricization) -> Tensor:
        assert self.weight is not None, "a factored layer"
        matrix = read_matrix(self.weight, view)
        if not bool(matrix.isfinite().all()):
            raise NumericsError(
                f"layer {self.name}: the weight holds values that are not finite", where=str(self.weight.path)
            )
        return matrix


def stored_layers(
    checkpoint: Checkpoint, patterns: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> dict[str, StoredLayer]:
    """Choose layers; reads headers only.

    Args:
        checkpoint: of any layout; factored layers stand for their product.
        patterns: globs or presets; None: every layer of two or more dimensions.
        exclude: patterns of layers to leave out.

    Returns:
        Layer -> how it is stored, in file order; layers that are not stored as floats are left out.

    Raises:
        TargetError: a pattern that matches nothing, or no layer of floats.
    """
    factored, shapes, conv1d = factored_layers(checkpoint), checkpoint.layers(), has_conv1d(checkpoint)
    known = {**shapes, **{name: layer.view.shape for name, layer in factored.items()}}
    found = {}
    for name in targets.select(patterns or ["**"], known, checkpoint.layout, exclude).layers:
        if name in factored:
            found[name] = StoredLayer(name, factored[name].view, None, factored[name])
        elif (weight := checkpoint.weight(name)).dtype in FLOAT_DTYPES:
            found[name] = StoredLayer(name, layer_view(name, weight.shape, conv1d=conv1d), weight)
    if not found:
        raise TargetError(f"no layer of {checkpoint.root.name} is stored as floats")
    return found


def measure_each(
    compute: Callable[[str], Result],
    costs: Mapping[str, int],
    sizes: Mapping[str, int],
    *,
    workers: int = 1,
    start: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Result]:
    """Measure layers on several threads; what is found does not depend on how many.

    Args:
        compute: layer -> what is to be known of it; called with gradients off.
        costs: every layer, in order -> bytes of memory that `compute` needs.
        sizes: layer -> bytes that it reads, for the bar.
        workers: layers at a time.
        start: told of the bytes of all layers, once.
        advance: told of the bytes of each layer that is done.
    """
    start(sum(sizes[name] for name in costs))
    found = {}
    for name, result in zip(costs, LayerPool(torch.no_grad()(compute), workers=workers).map(costs), strict=True):
        found[name] = result
        advance(sizes[name])
    return found
