"""Replace weights by low-rank factors: a checkpoint with fewer parameters and the smallest error, layer by layer.

Ranks come from one rule (`factorize_ranks.py`). What is written is the factors, the truncated weights in the original
layout, or a residual base with a PEFT LoRA. Whole layers are never in memory more than a few at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ortho_cli.checkpoints.layer_pool import default_workers
from ortho_cli.checkpoints.output import check_output
from ortho_cli.checkpoints.store import Checkpoint, open_checkpoint
from ortho_cli.errors import UsageError, check_choice

from .factorize_calibrate import calibration
from .factorize_layers import FORMS
from .factorize_plan import Factorization, FactorizePlan, checkpoint_parameters
from .factorize_ranks import Rule, choose_ranks, pick_rule
from .factorize_selection import select_layers
from .fit import input_files
from .mirror import check_output_name
from .plan import Progress, Report, provenance, run

__all__ = ["FactorizePlan", "factorize", "plan_factorize"]

METHODS = ("auto", "svd", "randomized")


def factorize(
    checkpoint: str | Path,
    output: str | Path,
    *,
    rank: int | str | Sequence[int | str] | None = None,
    rank_scale: float | None = None,
    target_ratio: float | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    budget: float | None = None,
    budget_unit: str | None = None,
    calibrate: str | Path | None = None,
    samples: int = 256,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    form: str = "factors",
    method: str = "auto",
    workers: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Factor the layers of a checkpoint to low rank, with the smallest error for the chosen ranks.

    Exactly one of the six rank rules is given.

    Args:
        checkpoint: any checkpoint argument.
        output: ``X.safetensors`` or a folder like the base's; for ``lora-residual`` a folder.
        rank: of every layer; per layer as ``[32, "**.attn2.**=16"]``, the last match wins.
        rank_scale: share of each layer's full rank, rounded as the FNL paper does.
        target_ratio: parameters of the whole checkpoint, after / before.
        energy: share of each layer's ``||W||_F^2`` that is kept.
        max_error: relative Frobenius error of each layer.
        budget: cost of the targeted layers, after / before; ranks are chosen together for the smallest total error.
        budget_unit: ``params`` (default) or ``flops``.
        calibrate: a text file (a sample a line) or ``.jsonl`` with ``text``; the factors are then fitted to the inputs
            that layers see on it. Needs transformers, and a folder with a configuration and a tokenizer.
        samples: how many of them; every fourth is held out, for the errors that are reported.
        targets: glob patterns or presets; by default large Linear and conv layers (`factorize_selection.py`).
        exclude: patterns of layers to leave out.
        form: ``factors`` (``X.U``, ``X.VT``), ``dense`` (truncated weights, a drop-in), or ``lora-residual`` (``base/``
            and ``adapter/``, as PiSSA: together they are the checkpoint).
        method: ``auto``, ``svd`` (exact) or ``randomized``.
        workers: layers at a time, by default one a processor; the result does not depend on it.
        force: overwrite.
        dry_run: plan only. Rules that need singular values (energy, max_error, budget) read the weights all the same.
        progress: told of every byte.

    Returns:
        The report: of each layer rank, parameters, relative error, energy, non-orthogonality and condition.

    Raises:
        UsageError: no rule, or several.
        TargetError: a pattern matches nothing, or nothing can be factored.
        NumericsError: a weight is not finite.
        OutputError: see `plan.run`.

    Cost: each chosen weight is read and decomposed once (twice for rules that need spectra), the rest is copied.
    Reference: FNL, arXiv:2105.01029 (spectral factors, rank scale); SVD-LLM, arXiv:2403.07378 (`calibrate`).
    """
    plan = plan_factorize(
        open_checkpoint(checkpoint), Path(output), rank=rank, rank_scale=rank_scale, target_ratio=target_ratio,
        energy=energy, max_error=max_error, budget=budget, budget_unit=budget_unit, calibrate_on=calibrate,
        samples=samples, targets=targets, exclude=exclude, form=form, method=method, workers=workers, force=force,
        progress=progress,
    )  # fmt: skip
    return run(plan, force=force, dry_run=dry_run, progress=progress)


def plan_factorize(
    checkpoint: Checkpoint,
    output: Path,
    *,
    rank: int | str | Sequence[int | str] | None = None,
    rank_scale: float | None = None,
    target_ratio: float | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    budget: float | None = None,
    budget_unit: str | None = None,
    calibrate_on: str | Path | None = None,
    samples: int = 256,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    form: str = "factors",
    method: str = "auto",
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> FactorizePlan:
    """Plan `factorize`; arguments as there.

    From headers alone, unless the rule needs spectra or the factors are fitted to data: those are read now, for without
    them no shape of the output is known. An output that may not be written is refused before.
    """
    rules = {
        "rank": rank, "rank_scale": rank_scale, "target_ratio": target_ratio, "energy": energy, "max_error": max_error,
        "budget": budget,
    }  # fmt: skip
    rule = pick_rule(rules, budget_unit)
    targets = [targets] if isinstance(targets, str) else targets
    exclude = [exclude] if isinstance(exclude, str) else exclude
    _check_options(rule, output, form, method, workers)
    check_output(output, input_files(checkpoint), 0, force=force)
    selected = select_layers(checkpoint, targets, exclude, flat=form == "lora-residual")
    workers = workers or default_workers()
    seen = calibration(checkpoint, selected.layers, calibrate_on, samples) if calibrate_on is not None else None
    if seen is not None and rule.spectral:
        seen.prepare()
    ranks = choose_ranks(
        rule, selected.layers, layout=checkpoint.layout, parameters=checkpoint_parameters(checkpoint),
        keep_all=form == "lora-residual", workers=workers, gram=seen.fit if seen else None, progress=progress,
    )  # fmt: skip
    options: dict[str, object] = {
        **{name: value for name, value in rules.items() if name != "rank"},
        "rank": rule.value if rule.name == "rank" else None, "budget_unit": budget_unit,
        "calibrate": Path(calibrate_on) if calibrate_on is not None else None, "samples": samples if seen else None,
        "targets": list(targets or []), "exclude": list(exclude), "as": None if form == "factors" else form,
        "method": None if method == "auto" else method,
    }  # fmt: skip
    metadata = provenance("factorize", [checkpoint.source.rstrip("/")], options, targets=list(targets or []))
    return Factorization(checkpoint, output, rule, selected, ranks, form, method, workers, seen).plan(metadata)


def _check_options(rule: Rule, output: Path, form: str, method: str, workers: int | None) -> None:
    check_output_name(output)
    check_choice("--as", form, FORMS)
    check_choice("--method", method, METHODS)
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: at least one is needed")
    if form == "lora-residual" and rule.name in ("target_ratio", "budget"):
        raise UsageError(
            f"--as lora-residual keeps the whole base, so --{rule.name.replace('_', '-')} has nothing to count",
            hint="give --rank, --rank-scale, --energy or --max-error",
        )
    if form == "lora-residual" and output.suffix == ".safetensors":
        raise UsageError("a residual and its adapter are a folder", hint=f"use -o {output.with_suffix('').name}")
    if method == "randomized" and rule.exact:
        raise UsageError(
            f"--{rule.name.replace('_', '-')} promises a bound, which --method randomized may miss by 1 %",
            hint="leave --method out",
        )
