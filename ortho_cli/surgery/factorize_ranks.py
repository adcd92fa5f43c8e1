"""The rank of every layer by the one rule that was given; some rules read the spectra of all layers first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ortho_cli.checkpoints import targets
from ortho_cli.checkpoints.layer_pool import LayerPool
from ortho_cli.checkpoints.matrices import read_matrix
from ortho_cli.checkpoints.tensors import DTYPE_BITS
from ortho_cli.errors import OrthoError, TargetError, UsageError

from .factorize_flops import positions
from .factorize_selection import FactorLayer, check_finite

if TYPE_CHECKING:
    from torch import Tensor

    from .plan import Progress

__all__ = ["RULES", "Ranks", "Rule", "choose_ranks", "pick_rule", "spectrum_bytes"]

RULES = ("rank", "rank_scale", "target_ratio", "energy", "max_error", "budget")
SPECTRAL = ("energy", "max_error", "budget")
UNITS = ("params", "flops")


@dataclass(frozen=True)
class Rule:
    """How ranks are chosen: one of `RULES` with its value; `unit` is the budget's."""

    name: str
    value: Any
    unit: str = "params"

    @property
    def spectral(self) -> bool:
        """Whether it needs the singular values of every layer."""
        return self.name in SPECTRAL

    @property
    def exact(self) -> bool:
        """Whether it promises a bound that only exact factors keep."""
        return self.name in ("energy", "max_error")

    def __str__(self) -> str:
        shown = " ".join(map(str, self.value)) if isinstance(self.value, (list, tuple)) else self.value
        unit = " of FLOPs" if self.unit == "flops" else ""
        return f"{self.name.replace('_', '-')} {shown}{unit}"


@dataclass
class Ranks:
    """Layer -> rank; layer -> why it stays whole; and the singular values where they were read."""

    ranks: dict[str, int] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def pick_rule(given: Mapping[str, Any], unit: str | None = None) -> Rule:
    """The one rule of several options.

    Raises:
        UsageError: none or several, a number out of range, or a unit without a budget.

    >>> str(pick_rule({"rank": None, "rank_scale": 0.25}))
    'rank-scale 0.25'
    """
    named = {name: value for name, value in given.items() if value not in (None, [], ())}
    options = ", ".join("--" + name.replace("_", "-") for name in (named or RULES))
    if len(named) != 1:
        found = f"{len(named)} rank rules: {options}" if named else "no rank rule"
        raise UsageError(f"{found}; exactly one is needed", hint=f"give one of {options}")
    if unit is not None and "budget" not in named:
        raise UsageError("--budget-unit is about --budget, which was not given")
    if unit is not None and unit not in UNITS:
        raise UsageError(f"--budget-unit {unit!r} is none of {', '.join(UNITS)}")
    ((name, value),) = named.items()
    if name == "rank":
        value = [str(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    elif not 0 < value <= (float("inf") if name == "rank_scale" else 1):
        bound = "above 0" if name == "rank_scale" else "in (0, 1]"
        raise UsageError(f"--{name.replace('_', '-')} is {value}; expected a number {bound}")
    return Rule(name, value, unit or "params")


def choose_ranks(
    rule: Rule,
    layers: Sequence[FactorLayer],
    *,
    layout: str,
    parameters: int,
    keep_all: bool,
    workers: int,
    gram: Callable[[FactorLayer], Tensor] | None = None,
    progress: Progress | None = None,
) -> Ranks:
    """Give each layer its rank, or the reason why it stays whole.

    Args:
        rule: from `pick_rule`.
        layers: those that were selected.
        layout: naming of the checkpoint, for patterns.
        parameters: of the whole checkpoint.
        keep_all: factor a layer even where factors are larger than it is (a LoRA beside its residual).
        workers: layers at a time, for rules that read spectra.
        gram: Gram matrix of a layer's inputs, where spectra are to be weighed by them.
        progress: told of the bytes of every weight whose spectrum is read.

    Raises:
        TargetError: a pattern that matches nothing, or no layer gets a rank.
        UsageError: a rank or a target that cannot be.

    Cost: headers only; with `energy`, `max_error` and `budget` every selected weight is read and its spectrum computed.
    """
    found = Ranks()
    if rule.spectral:
        found.spectra = _spectra(layers, workers, gram, progress)
    wanted = _wanted(rule, layers, found, layout, parameters, relative=gram is not None)
    for layer in layers:
        rank = wanted.get(layer.name)
        if rank is None:
            found.whole[layer.name] = _why_whole(rule)
            continue
        saving = min(layer.size.rows, layer.size.cols) if keep_all else layer.size.saving_rank
        if rank > saving:
            shape = f"{layer.size.rows}x{layer.size.cols}"
            found.whole[layer.name] = (
                f"rank {rank} is above the full rank of {shape}" if keep_all else
                f"rank {rank} saves nothing: factors of {shape} are smaller up to rank {saving}"
            )  # fmt: skip
        else:
            found.ranks[layer.name] = rank
    if not found.ranks:
        name, reason = next(iter(found.whole.items()))
        raise TargetError(
            f"{rule} factors none of {len(layers)} layers; {name}: {reason}", hint="lower the rank, or name more layers"
        )
    return found


def spectrum_bytes(layer: FactorLayer) -> int:
    """Memory to read a weight and decompose its Gram matrix: stored, in float32, and three matrices in float64."""
    short = min(layer.size.rows, layer.size.cols)
    return layer.info.numel * (2 * DTYPE_BITS[layer.info.dtype] // 8 + 4) + 24 * short**2


def _why_whole(rule: Rule) -> str:
    if rule.name == "rank":
        return "no --rank speaks of it"
    return f"at {rule} it is worth more whole than factored"


def _wanted(
    rule: Rule, layers: Sequence[FactorLayer], found: Ranks, layout: str, parameters: int, *, relative: bool
) -> Mapping[str, int | None]:
    from ortho_cli.linalg import ranks as rules
    from ortho_cli.linalg.budget import budget_ranks

    names = [layer.name for layer in layers]
    sizes = [layer.size for layer in layers]
    if rule.name == "rank":
        ranks = targets.per_layer(rule.value, {layer.name: layer.info.shape for layer in layers}, layout)
        low = next((rank for rank in ranks.values() if rank < 1), None)
        if low is not None:
            raise UsageError(f"rank {low}: there is no such number of components", hint="use --rank 32")
        return ranks
    if rule.name == "rank_scale":
        return {layer.name: rules.scaled_rank(layer.size, rule.value) for layer in layers}
    if rule.name == "target_ratio":
        others = parameters - sum(size.dense for size in sizes)
        choice = rules.scale_for_parameters(sizes, others, rule.value)
        found.notes.append(f"rank scale {choice.scale:.6f} comes nearest to {rule.value} of all parameters")
        return dict(zip(names, choice.ranks, strict=True))
    spectra = [found.spectra[name] for name in names]
    if rule.name == "budget":
        if relative:  # units of outputs differ from layer to layer: each layer's own share is what counts
            spectra = [values / max(float(values.norm()), 1e-30) for values in spectra]
        weights = positions(layers) if rule.unit == "flops" else [1] * len(layers)
        per_rank = [weight * size.factored(1) for weight, size in zip(weights, sizes, strict=True)]
        dense = [weight * size.dense for weight, size in zip(weights, sizes, strict=True)]
        return dict(zip(names, budget_ranks(spectra, per_rank, dense, rule.value * sum(dense)), strict=True))
    by_spectrum = rules.energy_rank if rule.name == "energy" else rules.error_rank
    return {name: by_spectrum(values, rule.value) for name, values in zip(names, spectra, strict=True)}


def _spectra(
    layers: Sequence[FactorLayer],
    workers: int,
    gram: Callable[[FactorLayer], Tensor] | None,
    progress: Progress | None,
) -> dict[str, Tensor]:
    by_name = {layer.name: layer for layer in layers}

    def compute(name: str) -> Tensor:
        from ortho_cli.linalg.spectral import singular_values
        from ortho_cli.linalg.whitened import whitened_values

        layer = by_name[name]
        matrix = read_matrix(layer.info, layer.view)
        check_finite(matrix, layer)
        try:
            return singular_values(matrix) if gram is None else whitened_values(matrix, gram(layer))
        except OrthoError as error:
            raise type(error)(f"layer {name}: {error.message}", hint=error.hint, where=str(layer.info.path)) from error

    if progress is not None:
        progress.start(sum(layer.info.nbytes for layer in layers))
    found = {}
    pool = LayerPool(compute, workers=workers)
    for layer, values in zip(layers, pool.map({x.name: spectrum_bytes(x) for x in layers}), strict=True):
        found[layer.name] = values
        if progress is not None:
            progress.advance(layer.info.nbytes)
    return found
