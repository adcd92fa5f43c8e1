"""One layer at work: the rotation, the low rank, or both, that take its weight to the fine-tuned one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from ortho_cli.checkpoints.matrices import read_matrix

from .extract_pairs import LayerPair
from .factorize_layers import TOLERANCE, job_bytes
from .factorize_selection import check_finite

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KINDS", "ExtractWork", "Extracted", "explained"]

KINDS = ("hra", "lora", "both")


class Extracted(NamedTuple):
    """What a job leaves: vectors `(in, m)` of reflections, factors `(out, r)` and `(r, in)`, and figures.

    `change` and `missed` are the squared norms of the layer's change and of what the adapter leaves of it; `turned` is
    what the rotation alone leaves.
    """

    vectors: Tensor | None
    factors: tuple[Tensor, Tensor] | None
    change: float
    turned: float
    missed: float
    figures: dict[str, Any]


@dataclass(frozen=True)
class ExtractWork:
    """Extracts layers by name.

    Attributes:
        pairs: by the name of the layer.
        kind: of `KINDS`.
        ranks: by name; or empty, where `energy` decides.
        energy: share of the squared norm of a layer's change that the components kept must hold.
    """

    pairs: Mapping[str, LayerPair]
    kind: str
    ranks: Mapping[str, int]
    energy: float | None

    def __call__(self, name: str) -> Extracted:
        """Extract one layer.

        Raises:
            NumericsError: a weight that is not finite.
        """
        import torch

        from ortho_cli.linalg.householder import Householder
        from ortho_cli.linalg.spectral import frobenius_norm

        pair = self.pairs[name]
        left, end = read_matrix(pair.layer.info, pair.layer.view), read_matrix(pair.weights.tuned, pair.layer.view)
        dtype = torch.promote_types(left.dtype, end.dtype)
        left, end = left.to(dtype), end.to(dtype)
        norm, change = float(frobenius_norm(left)), float(frobenius_norm(end - left)) ** 2
        if not isfinite(norm + change):
            check_finite(left, pair.layer)
            check_finite(end, pair.layer)
        vectors, factors, angle = None, None, None
        if self.kind != "lora" and not pair.still:
            vectors, angle = self._vectors(name, left, end)
            if vectors.shape[1]:
                left = Householder(vectors).apply(left)  # as stored: what rounding them leaves is left
        residual = end.sub_(left)
        del left
        turned = missed = float(frobenius_norm(residual)) ** 2
        if self.kind != "hra":
            found = self._low_rank(name, residual)
            factors, missed = (found.u.float(), found.vt.float()), turned * float(found.error) ** 2
        figures = {
            "rank": (vectors.shape[1] if vectors is not None else 0) + (factors[1].shape[0] if factors else 0),
            "relative_change": change**0.5 / norm if norm else None,
            **({"largest_angle": angle} if angle is not None else {}),
            **explained(self.kind, change, turned, missed),
        }
        return Extracted(vectors, factors, change, turned, missed, figures)

    def job_bytes(self, name: str) -> int:
        """Memory of one job: beside what factoring its weight takes, the other weight and their difference."""
        layer = self.pairs[name].layer
        rank = self.ranks.get(name, min(layer.size.rows, layer.size.cols))
        return job_bytes(layer, rank, whole=False, calibrated=False) + 8 * layer.info.numel

    def _vectors(self, name: str, start: Tensor, end: Tensor) -> tuple[Tensor, float]:
        """Reflections as they will be stored, and the largest angle."""
        from ortho_cli.linalg.procrustes import extract_rotation
        from ortho_cli.linalg.ranks import energy_rank
        from ortho_cli.linalg.spectral import singular_values

        if self.energy is None:
            reflections = self.ranks[name]
        else:
            rank = energy_rank(singular_values(end - start), self.energy)
            reflections = max(2, min(rank + rank % 2, min(start.shape) // 2 * 2))
        found = extract_rotation(start, end, reflections)
        planes = found.planes()
        return found.reflections(planes).float(), float(planes.angles[0]) if len(planes.angles) else 0.0

    def _low_rank(self, name: str, residual: Tensor) -> Any:
        from ortho_cli.linalg.ranks import energy_rank
        from ortho_cli.linalg.spectral import spectral_factors

        rule = self.ranks[name] if self.energy is None else partial(energy_rank, energy=self.energy)
        return spectral_factors(residual, rule, tolerance=TOLERANCE)


def explained(kind: str, change: float, turned: float, missed: float) -> dict[str, float]:
    """The shares of a squared change that the parts of an adapter explain: of all 1, worse than nothing below 0.

    >>> explained("both", 4.0, 2.0, 1.0)
    {'explained_by_rotation': 0.5, 'explained_by_lora': 0.25, 'explained': 0.75}
    """
    whole = change or 1.0
    shares = {}
    if kind != "lora":
        shares["explained_by_rotation"] = 1 - turned / whole
    if kind != "hra":
        shares["explained_by_lora"] = (turned - missed) / whole
    return shares | ({"explained": 1 - missed / whole} if kind == "both" else {})
