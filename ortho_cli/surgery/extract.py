"""Make an adapter of a fine-tuned checkpoint: what rotation, what low rank, takes its base's weights to its own.

Both checkpoints are streamed, each layer's two weights in memory while it is decomposed. Any layout on either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ortho_cli.checkpoints import targets as choose
from ortho_cli.checkpoints.layer_pool import default_workers
from ortho_cli.checkpoints.output import check_output
from ortho_cli.checkpoints.store import Checkpoint, open_checkpoint
from ortho_cli.errors import TargetError, UsageError, check_choice

from .extract_layers import KINDS, ExtractWork
from .extract_pairs import LayerPair, Pairs, pair_checkpoints
from .extract_plan import Extraction
from .factorize_selection import check_plain
from .fit import input_files, refuse_adapter
from .mirror import check_output_name
from .plan import Plan, Progress, Report, provenance, run

__all__ = ["extract", "plan_extract"]

DEFAULT_RANK = 8


def extract(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    kind: str = "hra",
    rank: int | str | Sequence[int | str] | None = None,
    energy: float | None = None,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    workers: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Extract an adapter from a fine-tuned checkpoint: what it learned, as a PEFT folder of a few megabytes.

    Args:
        base: any checkpoint argument: the model that was fine-tuned.
        tuned: what became of it, in any layout or float type.
        output: the folder to write.
        kind: ``hra``, the rotation that explains most of each layer's change; ``lora``, the low rank that does; or
            ``both``, in ``rotation/`` and ``residual/``, which are merged in this order.
        rank: reflections of a rotation (even), rank of a LoRA, 8 by default; per layer as ``[8, "**.attn2.**=16"]``,
            the last match wins.
        energy: instead of a rank, the share of the squared norm of each layer's change (of what the rotation leaves,
            for a residual) that its leading components must hold.
        targets: glob patterns or presets; by default every Linear and convolution that differs.
        exclude: patterns of layers to leave out.
        workers: layers at a time, by default one a processor; the result does not depend on it.
        force: overwrite.
        dry_run: plan only, from headers: which layers differ is not known then.
        progress: told of every byte.

    Returns:
        The report: of each layer the largest angle and the share of its change that is explained, by rotation, by
        LoRA, ``1 - ||found - tuned||^2 / ||base - tuned||^2``; and overall.

    Raises:
        TargetError: another model (no layer in common, a shape that differs), a pattern that matches nothing, or
            nothing that differs.
        NumericsError: a weight is not finite.
        OutputError: see `plan.run`.

    Cost: both checkpoints are read once; a layer that differs costs a dozen products with its matrix and ``2 r``
        columns, or with `energy` its whole spectrum. A LoRA's squared error is within 1 % of the smallest.
    Reference: OrthoMerge, arXiv:2602.05943 (a rotation and what it leaves).
    """
    plan = plan_extract(
        open_checkpoint(base), open_checkpoint(tuned), Path(output), kind=kind, rank=rank, energy=energy,
        targets=targets, exclude=exclude, workers=workers, force=force,
    )  # fmt: skip
    return run(plan, force=force, dry_run=dry_run, progress=progress)


def plan_extract(
    base: Checkpoint,
    tuned: Checkpoint,
    output: Path,
    *,
    kind: str = "hra",
    rank: int | str | Sequence[int | str] | None = None,
    energy: float | None = None,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    workers: int | None = None,
    force: bool = False,
) -> Plan:
    """Plan `extract` from headers alone; arguments as there."""
    targets = [targets] if isinstance(targets, str) else targets
    exclude = [exclude] if isinstance(exclude, str) else exclude
    _check_options(output, kind, rank, energy, workers)
    for checkpoint in (base, tuned):
        refuse_adapter(checkpoint, "give the models: ortho extract BASE TUNED -o ADAPTER")
        check_plain(checkpoint)
    check_output(output, [*input_files(base), *input_files(tuned)], 0, force=force)
    given = [rank] if isinstance(rank, (int, str)) else list(rank or [])
    pairs = pair_checkpoints(base, tuned, targets, exclude)
    ranks = {} if energy is not None else _ranks(base, pairs, given, kind)
    chosen = _fitting(pairs, ranks, kind)
    options: dict[str, object] = {
        "kind": kind, "rank": given, "energy": energy, "targets": list(targets or []), "exclude": list(exclude),
    }  # fmt: skip
    sources = [base.source.rstrip("/"), tuned.source.rstrip("/")]
    metadata = provenance("extract", sources, options, targets=list(targets or []))
    work = ExtractWork(chosen, kind, ranks, energy)
    return Extraction(base, tuned, output, work, pairs, metadata, workers or default_workers(), force).plan()


def _check_options(output: Path, kind: str, rank: object, energy: float | None, workers: int | None) -> None:
    check_output_name(output)
    check_choice("--kind", kind, KINDS)
    if output.suffix == ".safetensors":
        raise UsageError("an adapter is a folder", hint=f"use -o {output.with_suffix('').name}")
    if rank not in (None, [], ()) and energy is not None:
        raise UsageError("--rank and --energy both say how much to keep", hint="give one of them")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy {energy:g} is not in (0, 1]", hint="0.9 keeps nine tenths of each layer's change")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: at least one is needed")


def _ranks(base: Checkpoint, pairs: Pairs, given: list[int | str], kind: str) -> dict[str, int]:
    """The rank of each layer, even where it is a number of reflections."""
    values = [str(value) for value in given]
    if all("=" in value for value in values):
        values.insert(0, str(DEFAULT_RANK))
    shapes = {pair.layer.name: pair.layer.info.shape for pair in pairs.layers}
    ranks = choose.per_layer(values, shapes, base.layout)
    for name, rank in ranks.items():
        if rank < 1:
            raise TargetError(f"rank {rank} at layer {name}: nothing can be kept of it", hint="use --rank 8")
        if kind != "lora" and rank % 2:
            raise TargetError(
                f"rank {rank} is odd: a rotation takes an even number of reflections", hint=f"use --rank {rank + 1}"
            )
    return ranks


def _fitting(pairs: Pairs, ranks: dict[str, int], kind: str) -> dict[str, LayerPair]:
    """The layers to extract; those that cannot turn are left to the LoRA, or out."""
    rank = max((ranks.get(pair.layer.name, 2) for pair in pairs.layers if not pair.still), default=2)
    found: dict[str, LayerPair] = {}
    still: list[LayerPair] = []
    for pair in pairs.layers:
        if kind != "lora" and not pair.still and pair.layer.size.cols < rank:
            pair = pair._replace(still=f"is {pair.layer.size.cols} wide: fewer than {rank} reflections")
        if kind == "hra" and pair.still:
            still.append(pair)
        else:
            found[pair.layer.name] = pair
    pairs.layers = list(found.values())
    pairs.others += [pair.weights._replace(kind="layers that cannot turn") for pair in still]
    if not found:
        raise TargetError(
            f"none of the {len(still)} layers can be turned: {still[0].layer.name} {still[0].still}",
            hint="take the change as a sum: --kind lora",
        )
    if still:
        pairs.notes.append(f"{len(still)} layers cannot turn, first {still[0].layer.name}, which {still[0].still}")
    return found
