"""The report of a factorisation: which ranks were chosen, what they cost and save, and the spectra behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .layer_map import layer_map
from .report import Code, Fact, Part, Report
from .spectrum_figures import energy_map, spectrum_curves
from .table import Table

__all__ = ["MARK", "factorization_report"]

MARK = "layers.csv"
COLUMNS = (
    "name", "shape", "matrix", "dtype", "rank", "parameters_before", "parameters", "relative_error", "energy",
    "activation_error", "plain_activation_error", "non_orthogonality", "condition", "norm", "method", "reason",
)  # fmt: skip


def factorization_report(content: Mapping[str, Any], spectra: Mapping[str, Sequence[float]], command: str) -> Report:
    """Describe what `ortho factorize` did.

    Args:
        content: its report as a dictionary: `inputs`, `details`, `totals`, `notes`.
        spectra: layer -> singular values, all of them or the leading ones.
        command: that made it.

    Returns:
        The report, not yet written: `factorization.html`, `layers.csv`, `spectra.csv`, `factorization.json`, figures.
    """
    details, totals = content["details"], content["totals"]
    factored = [detail for detail in details if detail["rank"] is not None]
    facts = (
        Fact(f"{totals['ratio']:.3f}", f"of {totals['parameters_before']:,} parameters left"),
        Fact(f"{totals['relative_error']:.4f}", f"relative error of {len(factored)} layers together"),
        *_activation_fact(totals),
    )
    report = Report("Factorisation", f"{', '.join(content['inputs'])}: {totals['rule']}", facts, name="factorization")
    report.section("Ranks and errors", [*_maps(factored), *content["notes"]])
    report.section("Spectra", _spectra(factored, spectra))
    report.section("Layers", [_layers(details)])
    report.section("Command", [Code(command)])
    rows = [(layer, place, value) for layer, values in spectra.items() for place, value in enumerate(values, 1)]
    report.further = (Table("spectra", "Singular values", ("layer", "component", "value"), tuple(rows)),)
    report.data = content
    return report


def _activation_fact(totals: Mapping[str, Any]) -> Iterator[Fact]:
    if "mean_activation_error" in totals:
        plain = totals["mean_plain_activation_error"]
        yield Fact(
            f"{totals['mean_activation_error']:.4f}",
            f"mean activation error on held-out samples; plain truncation: {plain:.4f}",
        )


def _maps(factored: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
    yield layer_map(
        "ranks", "Rank kept, of the full rank", {x["name"]: x["rank"] / min(x["matrix"]) for x in factored},
        label="share of the full rank", low=0.0, note="Factors are smaller than the layer up to about a half.",
    )  # fmt: skip
    yield layer_map(
        "errors", "Relative error", {x["name"]: x["relative_error"] for x in factored},
        label="||W - U VT|| / ||W||", low=0.0,
    )  # fmt: skip
    if factored and "activation_error" in factored[0]:
        gain = {x["name"]: x["activation_error"] / (x["plain_activation_error"] or 1.0) for x in factored}
        yield layer_map(
            "activation-gain", "Activation error, of that of plain truncation", gain, label="ratio", low=0.0,
            note="Measured on samples that the factors were not fitted to; below 1 the fit helps.",
        )  # fmt: skip


def _spectra(factored: Sequence[Mapping[str, Any]], spectra: Mapping[str, Sequence[float]]) -> Iterator[Part]:
    known = {x["name"]: spectra[x["name"]] for x in factored if spectra.get(x["name"])}
    if not known:
        return
    ranks = {x["name"]: x["rank"] for x in factored}
    whitened = any(x["method"] == "whitened" for x in factored)
    yield spectrum_curves(known, ranks, title="Singular values" + ", weighed by the inputs" * whitened)
    if not whitened:  # values of a fitted product do not add up to those of the weight
        totals = {x["name"]: x["norm"] ** 2 for x in factored}
        yield energy_map(known, totals, {x["name"]: min(x["matrix"]) for x in factored})


def _layers(details: Sequence[Mapping[str, Any]]) -> Table:
    used = [name for name in COLUMNS if any(detail.get(name) is not None for detail in details)]
    rows = tuple(tuple(_cell(detail.get(name)) for name in used) for detail in details)
    return Table("layers", "Layers", tuple(name.replace("_", " ") for name in used), rows)


def _cell(value: object) -> object:
    return "x".join(map(str, value)) if isinstance(value, list) else value
