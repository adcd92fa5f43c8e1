"""The singular values of every layer of a checkpoint, and what they say of its rank: figures and a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ortho_cli.checkpoints.checkpoint import Checkpoint
from ortho_cli.linalg.effective_rank import condition, effective_rank, stable_rank
from ortho_cli.linalg.matricize import Matricization
from ortho_cli.linalg.product import rebalance
from ortho_cli.linalg.ranks import energy_rank
from ortho_cli.linalg.spectral import singular_values

from .figure import Figure
from .layer_map import layer_map
from .report import Fact, Report
from .spectrum_figures import energy_map, spectrum_curves
from .stored_layers import StoredLayer, measure_each, stored_layers
from .table import Table, record_table

__all__ = ["LayerSpectrum", "measure", "spectra", "spectrum_report"]

ENERGIES = (0.90, 0.95, 0.99)


@dataclass(frozen=True)
class LayerSpectrum:
    """What the singular values of one layer say of it; ranks count the components that hold a share of `||W||_F^2`."""

    name: str
    shape: tuple[int, ...]
    rows: int
    cols: int
    sigma_max: float
    sigma_min: float
    condition: float
    stable_rank: float
    effective_rank: float
    rank_90: int
    rank_95: int
    rank_99: int
    norm: float


def spectra(
    checkpoint: Checkpoint,
    patterns: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    *,
    workers: int = 1,
    start: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Tensor]:
    """Compute the singular values of layers, streamed, a few layers at a time.

    Args:
        checkpoint: of any layout; factored layers answer for their product.
        patterns: globs or presets; None: every layer of two or more dimensions.
        exclude: patterns of layers to leave out.
        workers: layers at a time; the values do not depend on it.
        start: told of the bytes of all weights, once.
        advance: told of the bytes of each layer that is done.

    Returns:
        Layer -> all singular values, descending, float64; of a convolution those of `(out kh, in kw)`.

    Raises:
        TargetError: a pattern that matches nothing, or no layer of floats.
        NumericsError: a weight that is not finite.

    Cost: of a layer `2 m n k + k^3` with `k = min(m, n)`, in float64.
    """
    layers = stored_layers(checkpoint, patterns, exclude)
    return measure_each(
        lambda name: _values(layers[name]),
        {name: _bytes(layer.view) for name, layer in layers.items()},
        {name: layer.nbytes for name, layer in layers.items()},
        workers=workers, start=start, advance=advance,
    )  # fmt: skip


def measure(checkpoint: Checkpoint, values: Mapping[str, Tensor]) -> list[LayerSpectrum]:
    """Summarise the spectra of some layers, in their order."""
    layers = stored_layers(checkpoint)
    found = []
    for name, sigma in values.items():
        view = layers[name].view
        rank_90, rank_95, rank_99 = (energy_rank(sigma, energy) for energy in ENERGIES)
        flat = sigma.flatten()
        found.append(
            LayerSpectrum(
                name, view.shape, view.rows, view.cols, float(flat.max()), float(flat.min()), condition(flat),
                stable_rank(flat), effective_rank(flat), rank_90, rank_95, rank_99, float(flat.square().sum().sqrt()),
            )
        )  # fmt: skip
    return found


def spectrum_report(checkpoint: Checkpoint, values: Mapping[str, Tensor], command: str) -> Report:
    """Describe the spectra of a checkpoint: `spectrum.html`, `layers.csv`, `spectra.csv`, `spectrum.json`, figures."""
    layers = measure(checkpoint, values)
    plain = {name: sigma.flatten().sort(descending=True).values.tolist() for name, sigma in values.items()}
    shares = {x.name: x.effective_rank / max(min(x.rows, x.cols), 1) for x in layers}
    middle = sorted(shares.values())[len(shares) // 2]
    lowest = min(layers, key=lambda x: shares[x.name])
    facts = (
        Fact(f"{len(layers):,}", "layers"),
        Fact(f"{middle:.0%}", "of the full rank is effective in the layer in the middle"),
        Fact(f"{shares[lowest.name]:.0%}", f"in the lowest, {lowest.name}"),
    )
    report = Report("Spectra", checkpoint.root.name, facts, name="spectrum")
    report.section("Singular values", [spectrum_curves(plain), energy_map(plain)])
    report.section("Rank", _maps(layers, shares))
    report.section("Layers", [record_table("layers", "Layers", layers)])
    rows = [(layer, place, value) for layer, numbers in plain.items() for place, value in enumerate(numbers, 1)]
    report.further = (Table("spectra", "Singular values", ("layer", "component", "value"), tuple(rows)),)
    report.data = _data(checkpoint, layers, command)
    return report


def _maps(layers: Sequence[LayerSpectrum], shares: Mapping[str, float]) -> Iterator[Figure]:
    yield layer_map(
        "effective-rank", "Effective rank", shares, label="of the full rank", low=0.0, high=1.0,
        note="The exponential of the entropy of the singular values (Roy and Vetterli 2007).",
    )  # fmt: skip
    yield layer_map(
        "stable-rank", "Stable rank", {x.name: x.stable_rank for x in layers}, label="||W||² / largest²", low=0.0,
        note="Small where one component outweighs the rest.",
    )  # fmt: skip
    yield layer_map(
        "rank-90", "Components that hold 90 % of the energy", {x.name: x.rank_90 / min(x.rows, x.cols) for x in layers},
        label="of the full rank", low=0.0,
    )  # fmt: skip


def _data(checkpoint: Checkpoint, layers: Sequence[LayerSpectrum], command: str) -> dict[str, Any]:
    """What programs read."""
    return {
        "command": command, "inputs": [checkpoint.root.name], "layers": len(layers),
        "parameters": sum(layer.rows * layer.cols for layer in layers), "details": [_plain(layer) for layer in layers],
    }  # fmt: skip


def _plain(layer: LayerSpectrum) -> dict[str, Any]:
    """A layer as JSON can say it, which has no infinite condition."""
    return {**asdict(layer), "condition": layer.condition if isfinite(layer.condition) else None}


def _bytes(view: Matricization) -> int:
    """Stored and in float32, and three small matrices in float64."""
    return 8 * view.parameters + 24 * min(view.rows, view.cols) ** 2


def _values(layer: StoredLayer) -> Tensor:
    """All singular values; those of a product without forming it: beyond its rank there are zeros."""
    if layer.factored is None:
        return singular_values(layer.matrix())
    values = rebalance(*layer.factors())[0].square().sum(-2)
    missing = min(layer.view.rows, layer.view.cols) - values.shape[-1]
    zeros = values.new_zeros(*values.shape[:-1], max(missing, 0))
    return torch.cat([values, zeros], -1)
