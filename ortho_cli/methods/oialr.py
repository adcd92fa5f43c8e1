"""The recipe's `oialr`: freeze bases that have settled, train small cores, leave factors and a dense network behind."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import RecipeError, TargetError
from ortho_cli.linalg.ranks import energy_rank

from .basis_layers import BasisLayer, step_cost
from .factorized_export import write_exports
from .method import Context, Method
from .oialr_layer import SettlingLayer
from .oialr_lora import LoRASince
from .oialr_model import OIALR
from .oialr_select import basis_candidates
from .projected_attention import open_attention

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import OIALR as OIALRSection

__all__ = ["LAYERS", "RANKS", "OIALRMethod", "flops_share"]

LAYERS, RANKS = "layers.csv", "ranks.csv"
LORA = "lora"  # the folder in the export


class OIALRMethod(Method):
    """The recipe's `oialr`."""

    name = "oialr"

    def __init__(self, config: OIALRSection) -> None:
        super().__init__(config)
        self.notes: list[str] = []
        self._run: OIALR | None = None
        self._lora: LoRASince | None = None
        self._left_out: list[str] = []

    @property
    def run(self) -> OIALR:
        """What `prepare` made."""
        assert self._run is not None, "prepare comes first"
        return self._run

    def chosen(self, model: nn.Module) -> dict[str, list[str]]:
        """The layers that each pattern of the recipe means, for a dry run."""
        open_attention(model)
        config = self.config
        patterns = [config.targets] if isinstance(config.targets, str) else config.targets
        ends = {"keep_first": config.keep_first, "keep_last": config.keep_last}
        return {pattern: [each.name for each in basis_candidates(model, [pattern], **ends)] for pattern in patterns}

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Choose the layers; with `delay: 0` they convert at once.

        Raises:
            TargetError: none, or one that cannot be converted, or for whose change no LoRA can stand.
            RecipeError: a LoRA is wanted and there is no base to put it on.
        """
        if self.config.lora_rank is not None or self.config.lora_energy is not None:
            self._lora = self._starting_point(model, context)
        self._run = OIALR(model, **self.config.model_dump(exclude={"name", "lora_rank", "lora_energy"}))
        self.notes.append(f"{len(self.run.layers)} layers may convert")
        if self.run.opened:
            self.notes.append(f"{len(self.run.opened)} attention modules of torch compute from layers of their own")
        if self.run.refused:
            name, reason = next(iter(self.run.refused.items()))
            self.notes.append(f"{len(self.run.refused)} layers stay dense, first {name}: {reason}")
        last = context.total_steps
        if context.build is not None and not any(map(self.run.is_due, range(1, last + 1))):
            self.notes.append(f"no check falls into the {last} steps of this run: nothing will be cut")

    def _starting_point(self, model: nn.Module, context: Context) -> LoRASince:
        """The weights before anything converts."""
        config, without = self.config, "leave lora_rank and lora_energy out: factors are left in any case"
        if context.base is None:
            raise RecipeError(
                "oialr: a LoRA is a change of the weights that a run starts from, and model.base names none",
                hint=f"name them in model.base, or {without}",
            )
        opened = open_attention(model)
        if opened:
            raise TargetError(
                f"oialr: the projections of {opened[0]}, attention of torch, are no layers for a LoRA", hint=without
            )
        targets, ends = config.targets, {"keep_first": config.keep_first, "keep_last": config.keep_last}
        rule = config.lora_rank or partial(energy_rank, energy=config.lora_energy)
        return LoRASince(model, basis_candidates(model, targets, **ends), rule)

    def follow(self, carry: Callable[[str, str, Callable[[Tensor], Tensor]], None]) -> None:
        """Tell of every core that takes a weight's or a core's place."""
        for layer in self.run.layers:
            layer.follow = carry

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, phase: str) -> bool:
        """Check the layers that this phase's optimizer trains, if it is time."""
        return self.run.check(optimizer, step + 1)

    def export(self, model: nn.Module, path: Path) -> None:
        """Write the dense network, which loads in the plain model, factors (`ortho.load_factorized`), and tables.

        And `lora/`, a PEFT folder, where the recipe asks for it.
        """
        write_exports(model, path)
        if self._lora is not None:
            self._left_out = self._lora.write(model, {each.name: each.module for each in self.run.layers}, path / LORA)
        for name, (columns, rows) in _tables(self.run.layers).items():
            with (path / name).open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([columns, *rows])

    def closing_notes(self) -> list[str]:
        """What came of it; a warning where nothing converted, with the highest stability seen."""
        converted = self.run.converted
        highest = self.run.highest
        if converted:
            ranks = [layer.rank for layer in converted.values()]
            said = f"{len(ranks)} of {len(self.run.layers)} layers converted, of rank {min(ranks)} to {max(ranks)}"
        else:
            seen = (
                f"the highest stability was {highest[0]:.4f}, of {highest[1]}"
                if highest
                else "no stability was measured"
            )
            said = f"warning: nothing converted: {seen}; the threshold is {self.config.threshold:g}"
        return [said, *(f"{LORA}: {note}" for note in self._left_out)]

    def state(self) -> dict[str, Any]:
        """Ranks, what was measured, and the bases to measure against."""
        return self.run.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Put it back, and the shapes that the model had.

        Raises:
            CheckpointError: other layers.
        """
        self.run.load_state(state)

    def scalars(self) -> dict[str, float]:
        """Trained share of the parameters, layers converted, mean rank, FLOPs share, stability's mean and minimum."""
        run = self.run
        trained = sum(each.numel() for each in run.model.parameters() if each.requires_grad)
        found = {
            "trained_share": trained / run.trained_before,
            "layers_converted": float(len(run.converted)),
            "flops_share": flops_share(run.layers),
        }
        if run.converted:
            found["mean_rank"] = fmean(layer.rank for layer in run.converted.values())
        measured = [each.stability for each in run.layers if each.stability is not None and not each.converted]
        if measured:
            found |= {"stability_mean": fmean(measured), "stability_min": min(measured)}
        return found


def _tables(layers: Sequence[SettlingLayer]) -> dict[str, tuple[tuple[str, ...], list[tuple[object, ...]]]]:
    """How each layer ended, and how its rank came down; empty where there is nothing to say."""
    ended: list[tuple[object, ...]] = []
    for each in layers:
        highest = each.highest if each.highest > float("-inf") else None
        converted = each.ranks[0][0] if each.ranks else None
        ended.append((each.name, each.form.rows, each.form.cols, each.rank, converted, highest))
    ranks: list[tuple[object, ...]] = sorted((step, each.name, rank) for each in layers for step, rank in each.ranks)
    return {
        LAYERS: (("layer", "rows", "cols", "rank", "converted_at", "highest_stability"), ended),
        RANKS: (("step", "layer", "rank"), ranks),
    }


def flops_share(layers: Sequence[SettlingLayer]) -> float:
    """Multiply-adds of a training step over those of the dense layers, a vector each, the forming of weights left out.

    Exact where all layers see as many vectors, as in a transformer.
    """
    now = whole = 0
    for layer in layers:
        form = layer.form
        dense = 3 * form.groups * form.rows * form.cols
        whole += dense
        if isinstance(layer.module, BasisLayer):
            parts = form.groups * step_cost(form.rows, form.cols, layer.module.rank, 1, training=True)[0]
            now += min(parts, dense)
        else:
            now += dense
    return now / whole
