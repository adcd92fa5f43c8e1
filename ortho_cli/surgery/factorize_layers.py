"""One layer at work: its factors, or what is written in their place, and the figures the report gives of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ortho_cli.checkpoints.layer_pool import LayerPool
from ortho_cli.checkpoints.matrices import read_matrix
from ortho_cli.checkpoints.reading import tensor_bytes
from ortho_cli.checkpoints.tensors import DTYPE_BITS, TORCH_DTYPES
from ortho_cli.errors import NumericsError

from .factorize_selection import FactorLayer, check_finite

if TYPE_CHECKING:
    from torch import Tensor

    from ortho_cli.linalg.spectral import SpectralFactors
    from ortho_cli.linalg.whitened import WhitenedFactors

__all__ = ["FORMS", "Computed", "FromPool", "Grams", "LayerWork", "OnDone", "job_bytes"]

FORMS = ("factors", "dense", "lora-residual")
OnDone = Callable[[str, "Computed"], None]
TOLERANCE = 0.01  # of the squared error, above the smallest


class Grams(NamedTuple):
    """Gram matrices of a layer's inputs: of the samples it is fitted to, and of those it is judged by."""

    fit: Tensor
    held_out: Tensor


class Computed(NamedTuple):
    """What a job leaves: tensors by the part of the output they are, and the figures of the layer."""

    tensors: Mapping[str, Tensor]
    figures: dict[str, Any]
    values: list[float]


@dataclass(frozen=True)
class LayerWork:
    """Computes layers by name.

    Attributes:
        layers: by name.
        ranks: by name.
        form: of `FORMS`; "adapter" gives the factors in float32.
        method: of `spectral_factors`.
        tolerance: likewise.
        grams: of a layer's inputs, where the factors are fitted to them.
    """

    layers: Mapping[str, FactorLayer]
    ranks: Mapping[str, int]
    form: str
    method: str = "auto"
    tolerance: float = TOLERANCE
    grams: Callable[[FactorLayer], Grams] | None = None

    def __call__(self, name: str) -> Computed:
        """Factor one layer.

        Raises:
            NumericsError: a weight or a result that is not finite.
        """
        layer = self.layers[name]
        matrix = read_matrix(layer.info, layer.view)
        check_finite(matrix, layer)
        grams = self.grams(layer) if self.grams is not None else None
        factors = self._factors(matrix, self.ranks[name], grams)
        tensors = self._written(layer, matrix, factors)
        figures = {} if grams is None else self._activation_errors(matrix, tensors, factors, grams, layer)
        figures |= self._figures(layer, matrix, factors, tensors)
        return Computed(tensors, figures, [float(value) for value in factors.values])

    def _written(
        self, layer: FactorLayer, matrix: Tensor, factors: SpectralFactors | WhitenedFactors
    ) -> Mapping[str, Tensor]:
        """What goes into the output, in its own type."""
        import torch

        dtype = torch.float32 if self.form == "adapter" else getattr(torch, TORCH_DTYPES[layer.info.dtype])
        if self.form in ("factors", "adapter"):
            tensors = {"U": factors.u.to(dtype), "VT": factors.vt.to(dtype)}
        else:
            weight = factors.u @ factors.vt
            if self.form == "lora-residual":
                weight = matrix - weight
            tensors = {"weight": layer.view.to_weight(weight).reshape(layer.info.shape).to(dtype).contiguous()}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise NumericsError(f"layer {layer.name} is not finite as {layer.info.dtype}", where=str(layer.info.path))
        return tensors

    def _factors(self, matrix: Tensor, rank: int, grams: Grams | None) -> SpectralFactors | WhitenedFactors:
        from ortho_cli.linalg.spectral import spectral_factors
        from ortho_cli.linalg.whitened import whitened_factors

        if grams is not None:
            return whitened_factors(matrix, grams.fit, rank)
        return spectral_factors(matrix, rank, method=self.method, tolerance=self.tolerance)

    def _figures(
        self,
        layer: FactorLayer,
        matrix: Tensor,
        factors: SpectralFactors | WhitenedFactors,
        tensors: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        """What the written tensors are worth, rounding to the stored type included; the matrix is used up."""
        from ortho_cli.linalg.product import non_orthogonality
        from ortho_cli.linalg.spectral import frobenius_norm, relative_error

        norm = frobenius_norm(matrix)
        u, vt = tensors.get("U", factors.u).to(matrix.dtype), tensors.get("VT", factors.vt).to(matrix.dtype)
        if self.form == "dense":
            matrix -= layer.view.to_matrix(tensors["weight"].reshape(layer.view.shape)).to(matrix.dtype)
            error = float(frobenius_norm(matrix)) / (float(norm) or 1.0)
        else:
            error = float(relative_error(matrix, u, vt, norm))
        values = factors.values
        smallest = float(values[-1])
        return {
            "relative_error": error,
            "energy": max(0.0, 1 - error**2),
            "non_orthogonality": sum(map(float, non_orthogonality(u, vt))) / 2,
            "condition": float(values[0]) / smallest if smallest > 0 else None,
            "norm": float(norm),
            "method": getattr(factors, "method", "whitened"),
        }

    def _activation_errors(
        self,
        matrix: Tensor,
        tensors: Mapping[str, Tensor],
        factors: SpectralFactors | WhitenedFactors,
        grams: Grams,
        layer: FactorLayer,
    ) -> dict[str, float]:
        """The change of the outputs on held-out samples, beside that of plain truncation at the same rank."""
        from ortho_cli.linalg.spectral import spectral_factors
        from ortho_cli.linalg.whitened import activation_error

        u, vt = tensors.get("U", factors.u), tensors.get("VT", factors.vt)
        plain = spectral_factors(matrix, self.ranks[layer.name], method=self.method, tolerance=self.tolerance)
        return {
            "activation_error": activation_error(matrix, u, vt, grams.held_out),
            "plain_activation_error": activation_error(matrix, plain.u, plain.vt, grams.held_out),
        }


def job_bytes(layer: FactorLayer, rank: int, *, whole: bool, calibrated: bool) -> int:
    """Memory of one job: the weight stored and in float32, its factors, and the decomposition.

    Args:
        layer: to factor.
        rank: its rank.
        whole: the output is a whole weight again.
        calibrated: the weight is whitened, in float64.
    """
    from ortho_cli.linalg.subspace_iteration import prefers_subspace

    short, long = sorted((layer.size.rows, layer.size.cols))
    stored = DTYPE_BITS[layer.info.dtype] // 8
    weight = layer.info.numel * (2 * stored + 4 + (stored + 8 if whole else 0) + (24 if calibrated else 0))
    exact = calibrated or not prefers_subspace(long, short, rank, TOLERANCE)
    decomposition = 32 * short**2 + 16 * rank * long if exact else 4 * short**2 + 24 * rank * (short + long)
    return weight + decomposition + (24 * layer.size.cols**2 if calibrated else 0)


@dataclass(frozen=True)
class FromPool:
    """The bytes of one output tensor, taken from the pool when the file is written.

    Attributes:
        pool: computes the layers.
        key: the layer.
        part: of what its job leaves.
        done: told of the result, once for each part, before it is written.
    """

    pool: LayerPool[Computed]
    key: str
    part: str
    done: OnDone | None = None

    def __call__(self) -> Iterator[Any]:
        """Yield the tensor's bytes."""
        yield tensor_bytes(self.tensor())

    def tensor(self) -> Tensor:
        """The tensor itself."""
        result = self.pool.take(self.key)
        if self.done is not None:
            self.done(self.key, result)
        return result.tensors[self.part]
