"""The recipe's `track_stability`: how far the basis of each layer moves, recorded while any run trains.

What it leaves, `stability.csv`, has the columns of `ortho analyze stability`, so that no checkpoints need be kept.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ortho_cli.checkpoints.output import atomic
from ortho_cli.checkpoints.targets import select
from ortho_cli.errors import TargetError
from ortho_cli.linalg.ranks import energy_rank
from ortho_cli.linalg.subspace import (
    Basis,
    basis,
    factor_stability,
    flatten,
    mixing_similarity,
    noise_floor,
    r_distance,
)  # fmt: skip

from .adapter_layer import whole
from .inject import named_layers
from .method import Context, Method

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import TrackStability

__all__ = ["COLUMNS", "FILE", "TrackStabilityMethod"]

FILE = "stability.csv"
COLUMNS = (
    "layer", "kind", "step", "reference_step", "lag", "rows", "cols", "stability", "noise_floor", "sigma_min",
    "sigma_max", "r_distance", "r_similarity", "mixing_similarity", "rank_90", "rank_99", "rank", "reference_rank",
)  # fmt: skip
WHOLE_NUMBERS = frozenset(
    {"step", "reference_step", "lag", "rows", "cols", "rank_90", "rank_99", "rank", "reference_rank"}
)
STABILITY = COLUMNS.index("stability") - 2  # among the numbers of a row, which begin after layer and kind
PROJECTIONS = ("in_proj", "q_proj", "k_proj", "v_proj")  # parameters of torch's attention: one, or three apart

Kept = tuple[int, dict[str, Tensor], dict[str, Basis]]  # step, weights, and what was made of them


class TrackStabilityMethod(Method):
    """The recipe's `track_stability`."""

    name = "track_stability"

    def __init__(self, config: TrackStability) -> None:
        super().__init__(config)
        self.layers: dict[str, str] = {}  # name -> kind
        self._kept: deque[Kept] = deque(maxlen=config.lag)
        self._rows: list[tuple[str, list[float]]] = []

    def chosen(self, model: nn.Module) -> dict[str, list[str]]:
        """The layers that each pattern of the recipe means."""
        patterns = [self.config.targets] if isinstance(self.config.targets, str) else self.config.targets
        return {pattern: list(_choose(model, [pattern])) for pattern in patterns}

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Choose layers, by name: what stands there may become another layer.

        Raises:
            TargetError: a pattern that matches nothing, or no layers.
        """
        targets = self.config.targets
        self.layers = _choose(model, [targets] if isinstance(targets, str) else targets)

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, phase: str) -> bool:
        """Compare every basis with the one `lag` checks ago, if it is time; once a step, whatever the phases."""
        done = step + 1
        if done % self.config.every == 0 and (not self._kept or self._kept[-1][0] < done):
            self._check(model, done)
        return False

    @torch.no_grad()
    def _check(self, model: nn.Module, done: int) -> None:
        weights = {name: flatten(whole(_weight(model, name)).detach()).clone() for name in self.layers}
        now = {name: basis(weight) for name, weight in weights.items()}
        if len(self._kept) == self._kept.maxlen:
            before, _, bases = self._kept[0]
            for name, current in now.items():
                values = [done, before, self.config.lag, *current.factor.shape, *_compare(bases[name], current)]
                self._rows.append((name, [float(value) for value in values]))
        self._kept.append((done, weights, now))

    def export(self, model: nn.Module, path: Path) -> None:
        """Write what was recorded as `stability.csv`; nothing where there was no second check."""
        if not self._rows:
            return
        with atomic(path) as partial:
            partial.mkdir()
            with (partial / FILE).open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                for name, numbers in self._rows:
                    named = zip(COLUMNS[2:], numbers, strict=True)
                    cells = [int(value) if key in WHOLE_NUMBERS else value for key, value in named]
                    writer.writerow([name, self.layers[name], *cells])

    def closing_notes(self) -> list[str]:
        """Say that nothing could be compared, where it is so."""
        if self._rows:
            return []
        least = (self.config.lag + 1) * self.config.every
        return [f"warning: nothing was recorded: the first comparison comes after {least} steps"]

    def state(self) -> dict[str, Any]:
        """What was recorded, and the weights to compare with; all are tensors but the steps."""
        names = list(self.layers)
        table = [[float(names.index(name)), *numbers] for name, numbers in self._rows]
        tensors = {"rows": torch.tensor(table, dtype=torch.float64).reshape(len(table), len(COLUMNS) - 1)}
        for place, (_, weights, _) in enumerate(self._kept):
            tensors |= {f"{place}.{name}": weight for name, weight in weights.items()}
        return {"steps": [step for step, _, _ in self._kept], "tensors": tensors}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put it back; bases are made anew from the weights."""
        names, tensors = list(self.layers), state["tensors"]
        if "rows" not in tensors:  # a published state, without tensors that only going on would need
            return
        self._rows = [(names[int(index)], numbers) for index, *numbers in tensors["rows"].tolist()]
        self._kept.clear()
        for place, step in enumerate(state["steps"]):
            weights = {name: tensors[f"{place}.{name}"] for name in names}
            self._kept.append((step, weights, {name: basis(weight) for name, weight in weights.items()}))

    def scalars(self) -> dict[str, float]:
        """Mean and minimum over the layers, of the last check."""
        last = [numbers[STABILITY] for _, numbers in self._rows[-len(self.layers) :]]
        return {"stability_mean": fmean(last), "stability_min": min(last)} if last else {}


def _compare(before: Basis, now: Basis) -> list[float]:
    """The columns from `stability` on."""
    triangles = r_distance(before, now)
    return [
        factor_stability(before.factor, now.factor), noise_floor(*now.factor.shape), float(now.values[-1]),
        float(now.values[0]), triangles.distance, triangles.similarity, mixing_similarity(before, now),
        energy_rank(now.values, 0.9), energy_rank(now.values, 0.99),
        now.rank, before.rank,
    ]  # fmt: skip


def _choose(model: nn.Module, patterns: Sequence[str]) -> dict[str, str]:
    """Names of layers and their kinds, in model order; attention of torch has its projections beside."""
    kinds: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    layers = named_layers(model)
    for name, module in model.named_modules():
        if name in layers and not isinstance(module, nn.Embedding):
            shapes[name], kinds[name] = layers[name], "conv" if len(layers[name]) > 2 else "linear"
        for last in PROJECTIONS:
            if isinstance(weight := getattr(module, f"{last}_weight", None), nn.Parameter):
                within = f"{name}.{last}".lstrip(".")
                shapes[within], kinds[within] = tuple(weight.shape), "linear"
    names = list(shapes) if list(patterns) == ["auto"] else select(list(patterns), shapes, layers.layout).layers
    if not names:
        raise TargetError(f"a {type(model).__name__} has no layers whose basis could be tracked")
    return {name: kinds[name] for name in names}


def _weight(model: nn.Module, name: str) -> Tensor:
    """The weight of a layer, of a factored one its product."""
    owner, _, last = name.rpartition(".")
    beside = last in PROJECTIONS and isinstance(model.get_submodule(owner), nn.MultiheadAttention)
    found = getattr(model.get_submodule(owner), f"{last}_weight") if beside else model.get_submodule(name).weight
    assert isinstance(found, Tensor)
    return found
