"""One layer of a combination: the rotations of several adapters made one, their low-rank sums made one.

Rotations are combined on their manifold, in the joint span of all of them; sums in their joint factors. Where a layer
has both, the rotation acts first and the sum is added to what it leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ortho_cli.errors import TargetError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ortho_cli.linalg.rotation import LowRankRotation

__all__ = ["ADDITIVE", "ROTATIONS", "Combined", "Mixing", "combine_layer"]

ROTATIONS = ("mean", "compose", "log-mean", "orthomerge", "slerp", "grassmann")
ADDITIVE = ("linear", "svd", "ties", "dare")
MEANS = ("mean", "log-mean", "orthomerge", "slerp", "grassmann")  # weights are shares, whatever their sum


DENSITY = 0.5  # of entries that `ties` and `dare` keep; the papers use 0.2 to 0.5 and more


@dataclass(frozen=True)
class Mixing:
    """How adapters are combined.

    Attributes:
        weights: one for each adapter: a share for means, a strength for `compose` and for sums.
        rotating: those that rotate any layer, by index: they share the means among themselves.
        rotation: one of `ROTATIONS`.
        additive: one of `ADDITIVE`.
        density: the share of entries that `ties` and `dare` keep.
        restore: whether a rotation is turned on to the parts' mean norm of angles.
        seed: of `dare`.
    """

    weights: tuple[float, ...]
    rotating: tuple[int, ...] = ()
    rotation: str = "mean"
    additive: str = "linear"
    density: float = DENSITY
    restore: bool = False
    seed: int = 0

    def check(self) -> None:
        """Refuse what is no way to combine.

        Raises:
            UsageError: weights or a density out of range, or a choice that these modes do not have.
        """
        if not 0 < self.density <= 1:
            raise UsageError(f"--density {self.density:g} is no share of the entries", hint="give one in (0, 1]")
        if self.restore and not (self.rotating and self.rotation in MEANS):
            raise UsageError("--restore-angles is about means of rotations", hint="leave it out, or use --mode mean")
        weights = [self.weights[index] for index in self.rotating]
        if weights and self.rotation in MEANS and min(weights) < 0:
            raise UsageError(
                f"--mode {self.rotation} takes weights of at least 0, found {min(weights):g}",
                hint="--mode compose takes any strength",
            )
        if weights and not any(weights):
            raise UsageError("every weight is 0: nothing is left to combine", hint="give one of them a weight")
        if weights and self.rotation == "slerp" and len(weights) != 2:
            raise UsageError(
                f"--mode slerp is the path between two adapters, found {len(weights)}", hint="use --mode mean"
            )

    @property
    def counted(self) -> dict[int, float]:
        """The adapters that rotate and count -> their shares, of sum 1, or for `compose` their strengths."""
        weights = {index: self.weights[index] for index in self.rotating if self.weights[index]}
        total = sum(weights.values()) if self.rotation in MEANS else 1.0
        return {index: weight / total for index, weight in weights.items()}


@dataclass
class Combined:
    """What one layer became: a rotation, the factors of a sum, or both; and what the report says of it.

    `vectors` are the reflections of a rotation that is to be written, which then stand in its place.
    """

    rotation: LowRankRotation | None = None
    vectors: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The rank, at most, of the change of a weight."""
        turned = self.rotation.rank if self.rotation is not None else 0
        turned += self.vectors.shape[1] if self.vectors is not None else 0
        return turned + (self.factors[1].shape[0] if self.factors is not None else 0)

    @property
    def held(self) -> int:
        """Bytes that wait to be written."""
        rotation = (self.rotation.basis,) if self.rotation is not None else ()
        vectors = (self.vectors,) if self.vectors is not None else ()
        return sum(tensor.nbytes for tensor in (*rotation, *vectors, *(self.factors or ())))


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
    counted = mixing.counted
    span = joint.join(acting)
    eye = torch.eye(span.basis.shape[1], dtype=torch.float64)
    turning = iter(span.cores)
    placed = [eye if rotation is None else next(turning) for rotation in rotations]
    if mixing.rotation == "grassmann" and any(rotations[index] is None for index in counted):
        raise TargetError(
            "the Grassmann mean is one of subspaces, and an adapter that leaves a layer as it is has none there",
            hint="combine adapters of the same layers, or use another --mode",
        )
    cores, shares = torch.stack([placed[index] for index in counted]), list(counted.values())
    if mixing.rotation == "compose":
        core = joint.compose(cores, shares)
    elif len(counted) == 1:
        core = cores[0]
    elif mixing.rotation == "slerp":
        core = joint.slerp(cores[0], cores[1], shares[1])
    else:
        mean = {
            "mean": joint.karcher_mean,
            "log-mean": joint.log_mean,
            "orthomerge": joint.orthomerge,
            "grassmann": joint.grassmann_mean,
        }[mixing.rotation]
        core = mean(cores, shares)
    if mixing.restore:
        core = joint.restore_angles(core, cores, shares)
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
