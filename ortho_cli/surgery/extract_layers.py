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
        weight, change = read_matrix(pair.layer.info, pair.layer.view), read_matrix(pair.weights.tuned, pair.layer.view)
        dtype = torch.promote_types(weight.dtype, change.dtype)
        weight, change = weight.to(dtype), change.to(dtype).sub_(weight)
        norm, moved = float(frobenius_norm(weight)), float(frobenius_norm(change)) ** 2
        if not isfinite(norm + moved):
            check_finite(weight, pair.layer)
            check_finite(change, pair.layer)
        vectors, factors, angle, turned = None, None, None, moved
        if self.kind != "lora" and not pair.still:
            vectors, angle = self._vectors(name, weight, change)
            if vectors.shape[1]:  # as stored: what rounding them leaves is left
                change.addmm_(*Householder(vectors).as_low_rank(weight), alpha=-1)
                turned = float(frobenius_norm(change)) ** 2
        missed = turned
        if self.kind != "hra":
            found = self._low_rank(name, change)
            factors, missed = (found.u.float(), found.vt.float()), turned * float(found.error) ** 2
        figures = {
            "rank": (vectors.shape[1] if vectors is not None else 0) + (factors[1].shape[0] if factors else 0),
            "relative_change": moved**0.5 / norm if norm else None,
            **({"largest_angle": angle} if angle is not None else {}),
            **explained(self.kind, moved, turned, missed),
        }
        return Extracted(vectors, factors, moved, turned, missed, figures)

    def job_bytes(self, name: str) -> int:
        """Memory of one job: what factoring one weight takes, and the other."""
        layer = self.pairs[name].layer
        rank = self.ranks.get(name, min(layer.size.rows, layer.size.cols))
        return job_bytes(layer, rank, whole=False, calibrated=False) + 8 * layer.info.numel

    def _vectors(self, name: str, weight: Tensor, change: Tensor) -> tuple[Tensor, float]:
        """Reflections as they will be stored, and the largest angle."""
        from ortho_cli.linalg.procrustes import extract_rotation
        from ortho_cli.linalg.ranks import energy_rank
        from ortho_cli.linalg.spectral import singular_values

        if self.energy is None:
            reflections = self.ranks[name]
        else:
            rank = energy_rank(singular_values(change), self.energy)
            reflections = max(2, min(rank + rank % 2, change.shape[1] // 2 * 2))
        found = extract_rotation(weight, change, reflections)
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
