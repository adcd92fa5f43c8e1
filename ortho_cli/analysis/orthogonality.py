"""How orthogonal every layer of a checkpoint is: as a whole, and in the groups of filters that GOR pulls at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ortho_cli.checkpoints.checkpoint import Checkpoint
from ortho_cli.linalg.coherence import gram_measures, spread
from ortho_cli.linalg.group import bucket_penalty, count_groups
from ortho_cli.linalg.subspace_iteration import gram

from .figure import Figure
from .layer_map import layer_map
from .report import Fact, Report
from .stored_layers import StoredLayer, measure_each, stored_layers
from .table import record_table

__all__ = ["METRICS", "LayerOrthogonality", "group_notes", "orthogonality", "orthogonality_report"]

METRICS = (
    "scale_free", "normalized", "residual", "coherence", "inter", "intra", "inter_scale_free", "intra_scale_free",
)  # fmt: skip
CHUNK = 2**21  # entries of the groups that are in float64 at a time
NAMES_SHOWN = 5  # in a note


@dataclass(frozen=True)
class LayerOrthogonality:
    r"""How far one layer is from orthogonal; :class:`~ortho_cli.linalg.coherence.GramMeasures` defines the terms.

    Attributes:
        filters: rows of the weight as a matrix, one a filter.
        length: entries of a filter.
        side: which vectors `residual` to `zeros` are of: `filters`, or `columns` where these are fewer.
        groups: of filters, as GOR deals them; 0 for a layer too small for one.
        groups_wanted: what GOR's formula asks for, whether or not it divides the filters.
        inter: GOR's penalty inside groups of consecutive filters; None without groups.
        intra: GOR's penalty over the filters of equal place in all groups.
        inter_scale_free: the same for any length of filters, in [0, 1]: 0 orthogonal, 1 all parallel.
        intra_scale_free: likewise.
    """

    name: str
    shape: tuple[int, ...]
    filters: int
    length: int
    side: str
    residual: float
    normalized: float
    scale_free: float | None
    coherence: float
    zeros: int
    groups: int
    groups_wanted: int
    inter: float | None
    intra: float | None
    inter_scale_free: float | None
    intra_scale_free: float | None


def orthogonality(
    checkpoint: Checkpoint,
    patterns: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    *,
    groups: int = 32,
    workers: int = 1,
    start: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[LayerOrthogonality]:
    """Measure layers, streamed, a few at a time.

    Args:
        checkpoint: of any layout; factored layers answer for their product.
        patterns: globs or presets; None: every layer of two or more dimensions.
        exclude: patterns of layers to leave out.
        groups: the most groups of filters a layer has.
        workers: layers at a time; the values do not depend on it.
        start: told of the bytes of all weights, once.
        advance: told of the bytes of each layer that is done.

    Raises:
        TargetError: a pattern that matches nothing, or no layer of floats.
        NumericsError: a weight that is not finite.

    Cost: of a layer one Gram matrix, `m n k` with `k = min(m, n)`, in float64; its groups cost a fraction of it.
    """
    layers = stored_layers(checkpoint, patterns, exclude)
    found = measure_each(
        lambda name: _measure(layers[name], groups),
        {name: _bytes(layer) for name, layer in layers.items()},
        {name: layer.nbytes for name, layer in layers.items()},
        workers=workers, start=start, advance=advance,
    )  # fmt: skip
    return list(found.values())


def _measure(layer: StoredLayer, most: int) -> LayerOrthogonality:
    rows = layer.filters()
    filters, length = rows.shape
    wide = filters <= length
    whole = gram_measures(gram(rows.mT if wide else rows, torch.float64))
    count, wanted = count_groups(filters, most)
    inter, intra = ((_grouped(rows, count, mode) if count else (None, None)) for mode in ("inter", "intra"))
    return LayerOrthogonality(
        layer.name, layer.view.shape, filters, length, "filters" if wide else "columns", *whole, count, wanted,
        inter[0], intra[0], inter[1], intra[1],
    )  # fmt: skip


def _grouped(rows: Tensor, count: int, mode: str) -> tuple[float, float]:
    """GOR's penalty of a layer, and its scale-free form in [0, 1]; a few groups in float64 at a time."""
    size, length = len(rows) // count, rows.shape[1]
    matrices, height, axis = (count, size, 0) if mode == "inter" else (size, count, 1)
    raw = scaled = 0.0
    for part in torch.split(rows.view(count, size, length), max(1, CHUNK // (height * length)), axis):
        block, own = part.reshape(-1, length).double(), part.shape[0]
        raw += float(bucket_penalty([block], own, mode, scale=None)[0])
        scaled += float(bucket_penalty([block], own, mode, normalize=True, scale=None)[0])
    return raw, spread(scaled, matrices, min(height, length))


def _bytes(layer: StoredLayer) -> int:
    """Stored and in float32, three Gram matrices in float64, and a few chunks."""
    rows, length = layer.filters_shape
    return 8 * rows * length + 24 * min(rows, length) ** 2 + 32 * CHUNK


def group_notes(layers: Sequence[LayerOrthogonality]) -> list[str]:
    """What is not as GOR's formula asks: fewer groups, or none."""
    fewer = [f"{x.name} ({x.filters} filters: {x.groups} for {x.groups_wanted})"
             for x in layers if x.groups != x.groups_wanted]  # fmt: skip
    none = [f"{x.name} ({x.filters})" for x in layers if not x.groups]
    zeros = [f"{x.name} ({x.zeros})" for x in layers if x.zeros]
    told = (
        ("fewer groups than asked, to divide the filters evenly", fewer),
        ("too few filters for a group", none),
        ("vectors of zeros, which have no angle", zeros),
    )
    return [f"{what}: {_shortened(names)}" for what, names in told if names]


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def orthogonality_report(checkpoint: Checkpoint, layers: Sequence[LayerOrthogonality], command: str) -> Report:
    """Describe it: `orthogonality.html`, `layers.csv`, `orthogonality.json`, figures."""
    known = sorted((x.scale_free, x.name) for x in layers if x.scale_free is not None)
    facts = [Fact(f"{len(layers):,}", "layers")]
    if known:
        facts += [
            Fact(f"{known[len(known) // 2][0]:.3f}", "from orthogonal up to scale in the layer in the middle (0 to 1)"),
            Fact(f"{known[-1][0]:.3f}", f"in the furthest, {known[-1][1]}"),
        ]
    report = Report("Orthogonality", checkpoint.root.name, tuple(facts), name="orthogonality")
    report.section("Whole layers", _whole_maps(layers))
    report.section("Groups of filters", _group_maps(layers))
    report.section("Layers", [record_table("layers", "Layers", layers), *group_notes(layers)])
    report.data = {
        "command": command, "inputs": [checkpoint.root.name], "layers": len(layers),
        "parameters": sum(x.filters * x.length for x in layers), "details": [asdict(x) for x in layers],
        "notes": group_notes(layers),
    }  # fmt: skip
    return report


def _whole_maps(layers: Sequence[LayerOrthogonality]) -> Iterator[Figure]:
    yield layer_map(
        "scale-free", "Distance from orthogonal, up to scale", {x.name: x.scale_free for x in layers},
        label="0: orthogonal, 1: all parallel", low=0.0, high=1.0,
        note="Of the filters, or of the columns where these are fewer; all lengths alike counts as orthogonal.",
    )  # fmt: skip
    yield layer_map(
        "coherence", "Mutual coherence", {x.name: x.coherence for x in layers}, label="largest |cos|", low=0.0,
        high=1.0, note="The two most nearly parallel vectors of each layer.",
    )  # fmt: skip
    yield layer_map(
        "normalized", "Distance from orthonormal", {x.name: x.normalized for x in layers},
        label="root mean square of σ² - 1", low=0.0, note="||G - I|| over √k, which the length of the filters moves.",
    )  # fmt: skip


def _group_maps(layers: Sequence[LayerOrthogonality]) -> Iterator[Figure]:
    for mode, which in (("inter", "consecutive filters"), ("intra", "the filters of equal place in all groups")):
        values = {x.name: getattr(x, f"{mode}_scale_free") for x in layers if x.groups}
        if values:
            yield layer_map(
                mode, f"GOR, {mode}", values, label="0: orthogonal, 1: all parallel", low=0.0, high=1.0,
                note=f"Inside groups of {which}, whatever their length (arXiv:2306.10001).",
            )  # fmt: skip
