"""The plan of a factorisation: what is written in each form, in which order layers are computed, and the report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import sqrt
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ortho_cli.checkpoints.factored import CONFIG_NAME, METHOD, factored_config
from ortho_cli.checkpoints.layer_pool import LayerPool
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.checkpoints.writer import Piece, computed, copied, file_order

from .factorize_calibrate import Calibration
from .factorize_layers import TOLERANCE, Computed, FromPool, LayerWork, job_bytes
from .factorize_ranks import Ranks, Rule
from .factorize_residual import Chosen, adapter_order, residual_files
from .factorize_selection import FactorLayer, Selected
from .fit import input_files
from .mirror import Mirror, mirror
from .plan import OutputFile, Plan

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Factorization", "FactorizePlan", "checkpoint_parameters"]

ROUNDING = 1e-6  # of a promised bound: what float32 arithmetic may add, and nobody needs to be told


FAINT = 0.05  # of a layer's squared norm: what is left of it is noise
FORM_NOTES = {
    "dense": "the weights keep their shapes and the file its size; parameters are those that factors would have",
    "lora-residual": "base and adapter together are the checkpoint; parameters and errors are the adapter's part alone",
}


@dataclass
class FactorizePlan(Plan):
    """A plan that also keeps singular values, for pictures: all of a layer's, or those of its factors."""

    spectra: dict[str, list[float]] = field(default_factory=dict)


def checkpoint_parameters(checkpoint: Checkpoint) -> int:
    """Numbers in a whole checkpoint."""
    return sum(info.numel for info in checkpoint.tensors.values())


@dataclass
class Factorization:
    """One factorisation, decided but not begun; `plan` lays its output out."""

    checkpoint: Checkpoint
    output: Path
    rule: Rule
    selected: Selected
    ranks: Ranks
    form: str
    method: str
    workers: int
    calibration: Calibration | None

    def __post_init__(self) -> None:
        self.layers = {layer.name: layer for layer in self.selected.layers if layer.name in self.ranks.ranks}
        self.details = {name: self._detail(layer) for name, layer in self.layers.items()}
        self.spectra = {name: values.tolist() for name, values in self.ranks.spectra.items()}

    def plan(self, metadata: dict[str, str]) -> FactorizePlan:
        """Lay the output out and say what will be in it."""
        written, pools = {
            "factors": self._factors, "dense": self._dense, "lora-residual": self._residual
        }[self.form](metadata)  # fmt: skip
        whole = list(self._whole())
        plan = FactorizePlan(
            "factorize", input_files(self.checkpoint), self.output, written.files, copies=written.copies,
            texts=written.texts, details=[*self.details.values(), *whole], spectra=self.spectra,
        )  # fmt: skip
        before = checkpoint_parameters(self.checkpoint)
        saved = sum(detail["parameters_before"] - detail["parameters"] for detail in self.details.values())
        plan.layers, plan.parameters = len(self.details), before - saved
        plan.totals = {
            "rule": str(self.rule), "form": self.form, "layers_left_whole": len(whole), "parameters_before": before,
            "parameters_after": before - saved, "ratio": (before - saved) / before,
            "targets_ratio": 1 - saved / sum(layer.size.dense for layer in self.selected.layers),
        }  # fmt: skip
        plan.notes = [*self.checkpoint.notes, *self.selected.notes, *self.ranks.notes, *self._notes(), *written.notes]
        plan.working_bytes = max(pool.needed for pool in pools)
        plan.during, plan.finish = lambda: self._running(pools), self._finish
        return plan

    def _factors(self, metadata: dict[str, str]) -> tuple[Mirror, list[LayerPool[Computed]]]:
        """`X.U` and `X.VT` in place of `X.weight`, and the table that says what they are."""
        pool = self._pool("factors", takes=2)
        single = self.output.suffix == ".safetensors"
        config = self._config() if single else {"name": METHOD, "rule": str(self.rule)}
        metadata = {**metadata, "ortho.method": json.dumps(config, sort_keys=True)}

        def pieces(name: str, info: TensorInfo) -> Sequence[Piece]:
            size, rank = self.layers[name].size, self.ranks.ranks[name]
            shapes = {"U": (size.rows, rank), "VT": (rank, size.cols)}
            return [
                computed(f"{name}.{part}", info.dtype, shape, FromPool(pool, name, part, self._done))
                for part, shape in shapes.items()
            ]

        written = self._mirror(metadata, pieces)
        for component, folder in {} if single else self._folders():
            config = self._config(f"{component}." if component else "")
            if config["layers"]:
                written.texts[folder + CONFIG_NAME] = json.dumps(config, indent=2) + "\n"
        self._schedule(pool, _keys(written.files, pool), whole=False)
        return written, [pool]

    def _dense(self, metadata: dict[str, str]) -> tuple[Mirror, list[LayerPool[Computed]]]:
        """The truncated weights under their own names."""
        pool = self._pool("dense")

        def pieces(name: str, info: TensorInfo) -> Sequence[Piece]:
            return [computed(info.name, info.dtype, info.shape, FromPool(pool, name, "weight", self._done))]

        written = self._mirror(metadata, pieces)
        self._schedule(pool, _keys(written.files, pool), whole=True)
        return written, [pool]

    def _residual(self, metadata: dict[str, str]) -> tuple[Mirror, list[LayerPool[Computed]]]:
        """A base without the leading components, and a LoRA of them."""
        residuals, factors = self._pool("lora-residual"), self._pool("adapter", takes=2)
        chosen = {name: Chosen(layer, self.ranks.ranks[name]) for name, layer in self.layers.items()}
        written = residual_files(self.checkpoint, self.output, chosen, metadata, residuals, factors, self._done)
        self._schedule(residuals, _keys(written.files, residuals), whole=True)
        self._schedule(factors, adapter_order(chosen), whole=False)
        return written, [residuals, factors]

    def _pool(self, form: str, takes: int = 1) -> LayerPool[Computed]:
        tolerance = 0.0 if self.rule.exact else TOLERANCE  # a promised bound needs exact factors
        grams = self.calibration.grams if self.calibration is not None else None
        work = LayerWork(self.layers, self.ranks.ranks, form, self.method, tolerance, grams)
        return LayerPool(work, takes=takes, workers=self.workers)

    def _schedule(self, pool: LayerPool[Computed], order: Sequence[str], *, whole: bool) -> None:
        calibrated, ranks = self.calibration is not None, self.ranks.ranks
        pool.schedule(
            {name: job_bytes(self.layers[name], ranks[name], whole=whole, calibrated=calibrated) for name in order}
        )

    def _mirror(self, metadata: dict[str, str], pieces: Any) -> Mirror:
        by_weight = {layer.info.name: name for name, layer in self.layers.items()}

        def transform(tensor: str, info: TensorInfo) -> Sequence[Piece]:
            found: Sequence[Piece] = pieces(by_weight[tensor], info) if tensor in by_weight else [copied(info, tensor)]
            return found

        return mirror(self.checkpoint, self.output, transform, metadata)

    def _folders(self) -> Iterator[tuple[str, str]]:
        """Components with the folders of their weights, "" or ending in a slash."""
        for component, relative in {file.component: file.relative for file in self.checkpoint.files}.items():
            yield component, relative[: relative.rfind("/") + 1]

    def _config(self, prefix: str = "") -> dict[str, Any]:
        """The table of the layers below a prefix, under their names without it."""
        named = {name.removeprefix(prefix): name for name in self.layers if name.startswith(prefix)}
        table = {short: (self.layers[name].view, self.ranks.ranks[name]) for short, name in named.items()}
        return factored_config(table, rule=str(self.rule))

    def _detail(self, layer: FactorLayer) -> dict[str, Any]:
        rank = self.ranks.ranks[layer.name]
        return {
            "name": layer.name, "shape": list(layer.info.shape), "dtype": layer.info.dtype, "kind": layer.view.kind,
            "matrix": [layer.size.rows, layer.size.cols], "rank": rank, "parameters": layer.size.factored(rank),
            "parameters_before": layer.size.dense,
        }  # fmt: skip

    def _whole(self) -> Iterator[dict[str, Any]]:
        """Layers that stay as they are, each with its reason."""
        for name, reason in {**self.selected.whole, **self.ranks.whole}.items():
            info = self.checkpoint.weight(name)
            yield {
                "name": name, "shape": list(info.shape), "dtype": info.dtype, "rank": None, "parameters": info.numel,
                "parameters_before": info.numel, "reason": reason,
            }  # fmt: skip

    def _notes(self) -> Iterator[str]:
        if self.form in FORM_NOTES:
            yield FORM_NOTES[self.form]
        whole = {**self.selected.whole, **self.ranks.whole}
        for reason, count in Counter(map(_reason_kind, whole.values())).items():
            yield f"{count} {'layer stays' if count == 1 else 'layers stay'} whole: {reason}"
        if self.rule.spectral:
            yield f"the singular values of {len(self.selected.layers)} layers were computed to choose the ranks"
        if self.calibration is not None:
            yield self.calibration.note
        ema = sum(name.startswith("model_ema.") for name in self.checkpoint.tensors)
        if ema > 2:  # two counters stand even in files without EMA weights
            yield f"EMA: {ema} model_ema tensors are left as they are; only the model's own weights are factored"

    def _done(self, name: str, result: Computed) -> None:
        self.details[name].update(result.figures)
        self.spectra.setdefault(name, result.values)

    @contextmanager
    def _running(self, pools: Sequence[LayerPool[Computed]]) -> Iterator[None]:
        if self.calibration is not None:
            self.calibration.prepare()
        with ExitStack() as stack:
            for pool in pools:
                stack.enter_context(pool.running())
            yield

    def _finish(self, plan: Plan) -> None:
        """Sum up what the layers became."""
        lost, whole = _square_sums(self.details)
        plan.totals |= {"squared_error": lost, "relative_error": sqrt(lost / whole) if whole else 0.0}
        if self.calibration is not None:
            for key in ("activation_error", "plain_activation_error"):
                plan.totals[f"mean_{key}"] = fmean(detail[key] for detail in self.details.values())
        plan.totals["methods"] = dict(Counter(detail["method"] for detail in self.details.values()))
        plan.notes += [*self._missed(), *self._faint()]

    def _faint(self) -> Iterator[str]:
        """Layers of which next to nothing is left."""
        faint = [name for name, detail in self.details.items() if detail["energy"] < FAINT]
        if faint and self.form != "lora-residual":
            yield (
                f"{len(faint)} of {len(self.details)} layers keep less than {FAINT:.0%} of their energy, "
                f"first {faint[0]}: --exclude them, keep more, or fit the factors with --calibrate"
            )

    def _missed(self) -> Iterator[str]:
        """The layers whose exact factors keep the promised bound, and which lose it as they are rounded."""
        if not self.rule.exact or self.calibration is not None:  # calibrated, the bound is of activations
            return
        key, sign = ("energy", -1) if self.rule.name == "energy" else ("relative_error", 1)
        limit = self.rule.value
        excess = {name: sign * (detail[key] - limit) for name, detail in self.details.items()}
        missed = [name for name, above in excess.items() if above > ROUNDING * limit]
        if missed:
            worst = max(missed, key=excess.__getitem__)
            yield (
                f"{len(missed)} of {len(excess)} layers miss {self.rule} as they are rounded to their stored type; the "
                f"worst, {worst}, has {key.replace('_', ' ')} {self.details[worst][key]:.6g}: "
                f"ask for a {'higher' if sign < 0 else 'lower'} --{self.rule.name.replace('_', '-')}"
            )


def _keys(files: Sequence[OutputFile], pool: LayerPool[Computed]) -> list[str]:
    """The layers in the order in which the writer will ask for them."""
    made = [piece.produce for file in files for piece in file_order(file.pieces)]
    return list(dict.fromkeys(source.key for source in made if isinstance(source, FromPool) and source.pool is pool))


def _reason_kind(reason: str) -> str:
    """A reason without the numbers that differ from layer to layer."""
    return "the rank saves nothing" if "saves nothing" in reason else reason


def _square_sums(details: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
    """Squared norms of the errors of all factored layers, and of the layers themselves."""
    whole = {name: float(detail["norm"]) ** 2 for name, detail in details.items()}
    return sum(whole[name] * detail["relative_error"] ** 2 for name, detail in details.items()), sum(whole.values())
