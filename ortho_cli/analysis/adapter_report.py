"""The report of an adapter's layers: `adapter.html`, `layers.csv`, `directions.csv`, `adapter.json`, figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import degrees

from ortho_cli.checkpoints.adapters import Adapter
from ortho_cli.checkpoints.checkpoint import Checkpoint
from ortho_cli.linalg.intruders import Closeness

from .adapter import LayerChange
from .figure import Figure
from .layer_map import layer_map
from .report import Fact, Report
from .table import Table, record_table

__all__ = ["adapter_report"]

Measured = Mapping[str, tuple[LayerChange, Closeness]]
SIDES = {"output": "left singular vectors, of the outputs", "input": "right singular vectors, of the inputs"}


def adapter_report(
    base: Checkpoint, adapter: Adapter, measured: Measured, command: str, notes: Sequence[str], threshold: float
) -> Report:
    """Describe what an adapter does to its base.

    Args:
        base: the checkpoint.
        adapter: what acts on it.
        measured: of `adapter_changes`.
        command: as the page tells it.
        notes: of `adapter_notes`.
        threshold: of an intruder.
    """
    layers = [change for change, _ in measured.values()]
    report = Report("Adapter", f"{adapter.path.name} on {base.root.name}", tuple(_facts(layers)), name="adapter")
    report.section("What changes", _maps(layers))
    report.section("New directions", _directions(layers, threshold))
    report.section("Layers", [record_table("layers", "Layers", layers), *notes])
    rows = [
        (name, side, place, value)
        for name, (_, closest) in measured.items()
        for side in SIDES
        for place, value in enumerate(getattr(closest, side).tolist(), 1)
    ]
    report.further = (Table("directions", "Directions", ("layer", "side", "component", "closest"), tuple(rows)),)
    report.data = {
        "command": command, "inputs": [base.root.name, adapter.path.name], "layers": len(layers),
        "parameters": sum(layer.parameters for layer in layers), "details": [
            asdict(change) | {f"closest_{side}_by_component": getattr(closest, side).tolist() for side in SIDES}
            for change, closest in measured.values()
        ], "notes": list(notes),
    }  # fmt: skip
    return report


def _facts(layers: Sequence[LayerChange]) -> Iterator[Fact]:
    yield Fact(f"{len(layers):,}", f"layers of {'+'.join(sorted({layer.kind for layer in layers}))}")
    changes = sorted(layer.relative_change for layer in layers if layer.relative_change is not None)
    if changes:
        yield Fact(f"{changes[len(changes) // 2]:.1%}", "of its weight is the change in the layer in the middle")
    angles = [(layer.angle_max, layer.name) for layer in layers if layer.angle_max is not None]
    if angles:
        yield Fact(f"{degrees(max(angles)[0]):.3g}°", f"is the largest angle, in {max(angles)[1]}")
    intruders = [max(layer.intruders_output, layer.intruders_input) for layer in layers]
    yield Fact(f"{sum(map(bool, intruders)):,}", "layers with new leading directions")


def _maps(layers: Sequence[LayerChange]) -> Iterator[Figure]:
    yield layer_map(
        "relative-change", "Relative change", {x.name: x.relative_change for x in layers},
        label="||W' - W|| / ||W||", low=0.0,
    )  # fmt: skip
    yield layer_map(
        "effective-rank", "Effective rank of the change", {x.name: x.effective_rank for x in layers},
        label="components", low=0.0,
        note="The exponential of the entropy of the singular values of W' - W (Roy and Vetterli 2007).",
    )  # fmt: skip
    figures = (
        ("angle_max", "Largest rotation angle", "radians", "From the small core of the rotation."),
        ("angle_mean", "Mean rotation angle", "radians", "Over the planes that it can turn."),
        ("defect", "Distance from orthogonal", "", "Of reflections among each other: 0 where all of them commute."),
    )
    for field, title, label, note in figures:
        values = {x.name: getattr(x, field) for x in layers if getattr(x, field) is not None}
        if values:
            yield layer_map(field.replace("_", "-"), title, values, label=label, low=0.0, note=note)


def _directions(layers: Sequence[LayerChange], threshold: float) -> Iterator[Figure]:
    """The newest of the leading directions of every layer, on both sides."""
    for side, which in SIDES.items():
        yield layer_map(
            f"closest-{side}", f"The newest direction, {side} side",
            {x.name: getattr(x, f"closest_{side}") for x in layers}, label="best |cos|", low=0.0, high=1.0,
            note=f"Of the leading {which}: 1 where each is one that the weight had; below {threshold:g} there are "
            "intruders (arXiv:2410.21228).",
        )  # fmt: skip
