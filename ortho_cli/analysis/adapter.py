"""What an adapter does to each weight of its base: how far it turns, how much it changes, whether in new directions.

Whatever the adapter's kind, one layer of it is an operator on a weight; what the operator cannot say of itself is
measured on the weight before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ortho_cli.checkpoints import targets
from ortho_cli.checkpoints.adapters import Adapter, base_bound
from ortho_cli.checkpoints.checkpoint import Checkpoint
from ortho_cli.checkpoints.fingerprint import base_fingerprint
from ortho_cli.checkpoints.layouts import LayerIndex
from ortho_cli.checkpoints.matrices import read_matrix
from ortho_cli.checkpoints.tensors import FLOAT_DTYPES, TensorInfo
from ortho_cli.errors import CheckpointError, NumericsError, TargetError
from ortho_cli.linalg.block_rotation import BlockRotation
from ortho_cli.linalg.effective_rank import effective_rank
from ortho_cli.linalg.householder import Householder
from ortho_cli.linalg.intruders import Closeness, closest_directions
from ortho_cli.linalg.matricize import Matricization
from ortho_cli.linalg.operator import Chain, Operator, Transposed
from ortho_cli.linalg.product import rebalance
from ortho_cli.linalg.spectral import frobenius_norm, singular_values
from ortho_cli.methods.orthogonality import vectors_penalty

from .stored_layers import measure_each

__all__ = ["METRICS", "LayerChange", "adapted_layers", "adapter_changes", "adapter_notes"]

METRICS = (
    "relative_change", "effective_rank", "angle_max", "angle_mean", "defect", "intruders_output", "intruders_input",
    "closest_output", "closest_input",
)  # fmt: skip
# A change below this share of the weight is float32 rounding of it, and has no rank to speak of.
UNCHANGED = 1e-6


@dataclass(frozen=True)
class LayerChange:
    r"""What an adapter does to one layer.

    Attributes:
        name: of the base's layer.
        kind: of the adapter, e.g. "hra".
        shape: of the stored weight.
        rank: reflections, or columns of the factors; None for rotations in blocks.
        parameters: trained numbers.
        relative_change: :math:`\|W' - W\|_F / \|W\|_F`; None for a weight of zeros that changed.
        effective_rank: the exponential of the entropy of the change's singular values; 0 for no change.
        angle_max: the largest rotation angle in radians, from the core of the rotation; None for what is no rotation.
        angle_mean: the mean over the planes that it can turn, unturned ones counted as 0.
        defect: reflections: :math:`\|I - V^\top V\|_F`, how far they are from orthogonal to each other; rotations in
            blocks: :math:`\|R^\top R - I\|_F`, how far they are from rotations.
        intruders_output: of the leading left singular vectors of W', those that are close to none of W.
        intruders_input: the same of the right ones.
        closest_output: the best `|cos|` of the newest of them; None for a weight of zeros.
        closest_input: likewise.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    parameters: int
    relative_change: float | None
    effective_rank: float
    angle_max: float | None
    angle_mean: float | None
    defect: float | None
    intruders_output: int
    intruders_input: int
    closest_output: float | None
    closest_input: float | None


def adapted_layers(base: Checkpoint, adapter: Adapter, patterns: Sequence[str] = ()) -> dict[str, str]:
    """Find the layers of an adapter in its base; reads headers only.

    Args:
        base: the checkpoint it acts on, or that holds it.
        adapter: of any dialect.
        patterns: globs or presets over the base's names; none: every layer of the adapter.

    Returns:
        The base's layer -> the adapter's name of it; layers whose whole weight the adapter replaces are left out.

    Raises:
        TargetError: a name or pattern that fits nothing, a weight that is no float, nothing left to measure.
        CheckpointError: a weight of another shape.
    """
    native = LayerIndex(base.layers(), base.layout).resolve_all(list(adapter.layers))
    names = {own: name for name, own in native.items() if f"{name}.weight" not in adapter.replacements}
    if not names:
        raise TargetError(f"{adapter.path.name} has no layer that acts on a weight", where=str(adapter.path))
    shapes = {own: shape for own, shape in base.layers().items() if own in names}
    chosen = targets.select(patterns or ["**"], shapes, base.layout).layers
    for own in chosen:
        weight = base.weight(own)
        if weight.dtype not in FLOAT_DTYPES:
            raise TargetError(f"layer {own} of {base.root.name} is stored as {weight.dtype}", where=str(weight.path))
        reason = adapter.layers[names[own]].expects(weight.shape)
        if reason is not None:
            raise CheckpointError(
                f"layer {names[own]} of the adapter does not fit {base.root.name}: {reason}",
                hint="was it trained on another model? compare: ortho inspect ADAPTER --layers",
                where=str(adapter.path),
            )
    return {own: names[own] for own in chosen}


def adapter_notes(base: Checkpoint, adapter: Adapter, names: dict[str, str]) -> list[str]:
    """What the numbers do not cover: another base, tensors that the adapter replaces or adds whole."""
    notes = list(adapter.notes)
    recorded = adapter.metadata.get("ortho.base_fingerprint")
    everywhere = LayerIndex(base.layers(), base.layout).resolve_all(list(adapter.layers)).values()
    if recorded is not None and recorded != base_fingerprint(base, everywhere):
        bound = ", and is right on that one only" if base_bound(adapter) else ""
        notes.append(f"{adapter.path.name} was made for another base{bound}")
    whole = len(adapter.replacements) + len(adapter.additions) + len(adapter.row_replacements)
    if whole:
        notes.append(f"{whole} tensors that the adapter replaces or adds to whole are not measured")
    if len(names) < len(adapter.layers):
        notes.append(f"{len(names)} of the adapter's {len(adapter.layers)} layers are measured")
    return notes


def adapter_changes(
    base: Checkpoint,
    adapter: Adapter,
    names: dict[str, str],
    *,
    top: int = 10,
    threshold: float = 0.5,
    workers: int = 1,
    start: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, tuple[LayerChange, Closeness]]:
    """Measure layers, streamed, a few at a time.

    Args:
        base: the checkpoint.
        adapter: what acts on it.
        names: of `adapted_layers`.
        top: leading singular vectors of the changed weight to look at.
        threshold: the best `|cos|` below which one of them is an intruder.
        workers: layers at a time; the values do not depend on it.
        start: told of the bytes of all weights, once.
        advance: told of the bytes of each layer that is done.

    Returns:
        The base's layer -> its numbers, and how close its leading directions are to those it had.

    Raises:
        NumericsError: a value that is not finite.

    Cost: of a layer two Gram matrices of its shorter side and their eigenvectors, in float64, or beyond a side of 1536
        about fifty products with a few vectors (`linalg/intruders.py`); the rest costs a fraction of it.
    """

    def compute(own: str) -> tuple[LayerChange, Closeness]:
        return _measure(base.weight(own), own, adapter, names[own], top, threshold)

    weights = {own: base.weight(own) for own in names}
    return measure_each(
        compute, {own: _bytes(weight) for own, weight in weights.items()},
        {own: weight.nbytes for own, weight in weights.items()}, workers=workers, start=start, advance=advance,
    )  # fmt: skip


def _measure(
    info: TensorInfo, own: str, adapter: Adapter, name: str, top: int, threshold: float
) -> tuple[LayerChange, Closeness]:
    layer = adapter.layers[name]
    operator = adapter.operator(name, "float64" if info.dtype == "F64" else "float32")
    before = read_matrix(info, Matricization("linear", (info.shape[0], prod(info.shape[1:]))))
    after = operator.apply(before)
    for weight, which in ((before, "weight"), (after, "adapted weight")):
        if not bool(weight.isfinite().all()):
            raise NumericsError(f"layer {own}: the {which} holds values that are not finite", where=str(info.path))
    closest = closest_directions(before, after, top)
    norm, values = float(frobenius_norm(before)), _change_values(operator, before, after)
    change = float(values.double().square().sum().sqrt())
    relative = change / norm if norm else (None if change else 0.0)
    largest, mean = _angles(operator)
    near = [(int((each < threshold).sum()), float(each.min()) if len(each) else None) for each in closest[:2]]
    numbers = LayerChange(
        own, layer.kind, info.shape, layer.rank, layer.parameters, relative,
        0.0 if relative is not None and relative < UNCHANGED else effective_rank(values),
        largest, mean, _defect(operator), near[0][0], near[1][0], near[0][1], near[1][1],
    )  # fmt: skip
    return numbers, closest


def _change_values(operator: Operator, before: Tensor, after: Tensor) -> Tensor:
    """Singular values of `W' - W`: of its exact factors where they are thin, so that no rounding counts as rank."""
    if operator.rank is not None and 2 * operator.rank <= min(before.shape):
        return rebalance(*operator.as_low_rank(before))[0].double().square().sum(-2)
    return singular_values(after - before)


def _angles(operator: Operator) -> tuple[float | None, float | None]:
    """The largest and the mean angle of the one rotation that an operator is or holds."""
    angles = next((found for part in _parts(operator) if (found := part.angles()) is not None), None)
    if angles is None:
        return None, None
    planes = max((operator.rank + 1) // 2, len(angles)) if operator.rank is not None else max(len(angles), 1)
    return float(angles.max()) if len(angles) else 0.0, float(angles.sum()) / planes


def _defect(operator: Operator) -> float | None:
    for part in _parts(operator):
        if isinstance(part, Householder):
            return 0.0 if part.gram_schmidt else float(vectors_penalty([part.vectors.double()], "norm"))
        if isinstance(part, BlockRotation):
            blocks = part.blocks.double()
            return float((blocks.mT @ blocks - torch.eye(part.block, dtype=torch.float64)).norm())
    return None


def _parts(operator: Operator) -> Sequence[Operator]:
    """The operators that act one after the other; at most one of them is a rotation (BOFT turns, then rescales)."""
    inner = operator.operator if isinstance(operator, Transposed) else operator
    return inner.operators if isinstance(inner, Chain) else (inner,)


def _bytes(weight: TensorInfo) -> int:
    """Stored, before, after and their difference in float32; six small matrices in float64."""
    rows, columns = weight.shape[0], prod(weight.shape[1:])
    return weight.nbytes + 16 * rows * columns + 48 * min(rows, columns) ** 2
