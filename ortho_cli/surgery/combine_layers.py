"""One layer of a combination: the rotations of several adapters made one, their low-rank sums made one.

Rotations are combined on their manifold, in the joint span of all of them; sums in their joint factors. Where a layer
has both, the rotation acts first and the sum is added to what it leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ortho_cli.errors import TargetError, UsageError, check_choice

if TYPE_CHECKING:
    from torch import Tensor

    from ortho_cli.linalg.rotation import LowRankRotation

__all__ = ["ADDITIVE", "ROTATIONS", "Combined", "Mixing", "combine_layer"]

ROTATIONS = ("mean", "compose", "log-mean", "orthomerge", "slerp", "grassmann")
ADDITIVE = ("linear", "svd", "ties", "dare")
MEANS = ("mean", "log-mean", "orthomerge", "slerp", "grassmann")  # weights are shares, whatever their sum


@dataclass(frozen=True)
class Mixing:
    """How adapters are combined.

    Attributes:
        weights: one for each adapter: a share for means, a strength for `compose` and for sums.
        rotation: one of `ROTATIONS`.
        additive: one of `ADDITIVE`.
        density: the share of entries that `ties` and `dare` keep.
        restore: whether a rotation is turned on to the parts' mean norm of angles.
        seed: of `dare`.
    """

    weights: tuple[float, ...]
    rotation: str = "mean"
    additive: str = "linear"
    density: float = 0.5
    restore: bool = False
    seed: int = 0

    def check(self, *, rotates: bool) -> None:
        """Refuse what is no way to combine.

        Args:
            rotates: whether there are rotations among the adapters.

        Raises:
            UsageError: an unknown mode, weights or a density out of range.
        """
        check_choice("--mode", self.rotation, (*ROTATIONS, *ADDITIVE))
        if not 0 < self.density <= 1:
            raise UsageError(f"--density {self.density:g} is no share of the entries", hint="give one in (0, 1]")
        if not rotates:
            if self.restore:
                raise UsageError("--restore-angles is about rotations, and these adapters are low-rank sums")
            return
        if self.rotation in MEANS and (min(self.weights) < 0 or sum(self.weights) <= 0):
            raise UsageError(
                f"--mode {self.rotation} takes weights of at least 0, found {min(self.weights):g}",
                hint="--mode compose takes any strength",
            )
        if self.rotation == "slerp" and len(self.weights) != 2:
            raise UsageError(
                f"--mode slerp is the path between two adapters, found {len(self.weights)}", hint="use --mode mean"
            )

    @property
    def shares(self) -> list[float]:
        """The weights, with sum 1."""
        return [weight / sum(self.weights) for weight in self.weights]


@dataclass
class Combined:
    """What one layer became: a rotation, the factors of a sum, or both; and what the report says of it."""

    rotation: LowRankRotation | None = None
    factors: tuple[Tensor, Tensor] | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The rank, at most, of the change of a weight."""
        turned = self.rotation.rank if self.rotation is not None else 0
        return turned + (self.factors[1].shape[0] if self.factors is not None else 0)


def combine_layer(
    rotations: Sequence[LowRankRotation | None],
    factors: Sequence[tuple[Tensor, Tensor] | None],
    mixing: Mixing,
    rank: int | None,
) -> Combined:
    """Combine what several adapters do to one layer; None is an adapter that leaves it as it is.

    Args:
        rotations: of each adapter.
        factors: `(B, A)` of each adapter, scales included.
        mixing: how.
        rank: the most reflections, and the most components of the sum.

    Raises:
        TargetError: parts that do not fit each other or the mode.
        NumericsError: parts that have no one mean.
    """
    found = Combined()
    if any(rotation is not None for rotation in rotations):
        found.rotation, found.detail = _rotate(rotations, mixing, rank)
    if any(pair is not None for pair in factors):
        found.factors, detail = _add(factors, mixing, rank)
        found.detail |= detail
    return found


def _rotate(
    rotations: Sequence[LowRankRotation | None], mixing: Mixing, rank: int | None
) -> tuple[LowRankRotation, dict[str, Any]]:
    import torch

    from ortho_cli.linalg import joint_rotation as joint
    from ortho_cli.linalg.planes import orthogonality_defect
    from ortho_cli.linalg.rotation import LowRankRotation

    acting = [rotation for rotation in rotations if rotation is not None]
    span = joint.join(acting)
    eye = torch.eye(span.basis.shape[1], dtype=torch.float64)
    turning = iter(span.cores)
    if mixing.rotation == "grassmann" and len(acting) < len(rotations):
        raise TargetError(
            "the Grassmann mean is one of subspaces, and an adapter that leaves a layer as it is has none there",
            hint="combine adapters of the same layers, or use another --mode",
        )
    cores = torch.stack([eye if rotation is None else next(turning) for rotation in rotations])
    if mixing.rotation == "compose":
        core = joint.compose(cores, mixing.weights)
    elif mixing.rotation == "slerp":
        core = joint.slerp(cores[0], cores[1], mixing.shares[1])
    else:
        mean = {
            "mean": joint.karcher_mean,
            "log-mean": joint.log_mean,
            "orthomerge": joint.orthomerge,
            "grassmann": joint.grassmann_mean,
        }[mixing.rotation]
        core = mean(cores, mixing.shares)
    if mixing.restore:
        core = joint.restore_angles(core, cores, mixing.shares)
    whole = LowRankRotation(span.basis, core, side=acting[0].side)
    kept = whole.truncate(span.basis.shape[1] if rank is None else rank)
    change = float(torch.linalg.matrix_norm(core - eye))
    angles = [0.0 if rotation is None else _largest(rotation) for rotation in rotations]
    return kept.rotation, {
        "angles_before": [round(angle, 6) for angle in angles],
        "largest_angle": _largest(kept.rotation),
        "order_effect": joint.order_effect(cores),
        "defect": orthogonality_defect(kept.rotation.core[None]) if kept.rotation.rank else 0.0,
        "relative_error": kept.error / change if change and rank is not None else None,
    }


def _largest(rotation: LowRankRotation) -> float:
    angles = rotation.angles()
    return float(angles.max()) if angles.numel() else 0.0


def _add(
    factors: Sequence[tuple[Tensor, Tensor] | None], mixing: Mixing, rank: int | None
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    import torch

    from ortho_cli.linalg.joint_low_rank import dare, join_factors, split, ties

    acting = [pair for pair in factors if pair is not None]
    weights = [weight for weight, pair in zip(mixing.weights, factors, strict=True) if pair is not None]
    joint = join_factors(acting)
    if mixing.additive == "ties":
        core = ties(joint.cores, weights, mixing.density)
    elif mixing.additive == "dare":
        core = dare(joint.cores, weights, mixing.density, mixing.seed)
    else:
        core = torch.einsum("n,npq->pq", torch.tensor(weights, dtype=torch.float64), joint.cores)
    if mixing.additive == "svd" and rank is None:
        rank = max(down.shape[0] for _, down in acting)
    up, down, error = split(joint, core, rank)
    change = float(torch.linalg.matrix_norm(core))
    return (up, down), {"relative_error": error / change if change and rank is not None else None}
