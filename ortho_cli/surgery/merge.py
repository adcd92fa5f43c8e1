"""Fold adapters into the weights they belong to, streaming: one block of rows in memory, the rest copied as bytes.

Arithmetic is float32 (float64 with `exact`) and is cast once, at the end. Adapters act in the order given, each at its
strength; the base's layout, sharding and small files are kept.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from ortho_cli.checkpoints.adapters import Adapter, adapter_of
from ortho_cli.checkpoints.factored import factored_layers
from ortho_cli.checkpoints.reading import BLOCK_BYTES
from ortho_cli.checkpoints.store import Checkpoint, read_json
from ortho_cli.checkpoints.tensors import FLOAT_DTYPES, TensorInfo
from ortho_cli.checkpoints.writer import Piece, computed, copied
from ortho_cli.errors import TargetError, UsageError, check_choice

from .changes import Changes, changes_of, taken_whole
from .fit import check_residuals, input_files, open_all
from .fold import Fold, Operate, Replace, ReplaceRows, Step, cast_blocks
from .hra_repo import has_hra, plain_names
from .mirror import mirror, parse_size
from .plan import Plan, Progress, Report, provenance, run
from .strengths import WHOLE, AdapterArgument, Strengths, given_strengths, spelled, strength_totals
from .undo import keep_undo as leave_undo

__all__ = ["merge", "plan_fold", "plan_merge"]

# Kinds whose operators act on any block of rows.
_BY_ROWS = ("hra", "lora", "loha", "replaced")
DTYPES = {"keep": None, "fp16": "F16", "bf16": "BF16", "fp32": "F32"}


def merge(
    base: str | Path,
    adapters: str | Path | Sequence[AdapterArgument],
    output: str | Path,
    *,
    strength: float | str | Sequence[float | str] = 1.0,
    exact: bool = False,
    dtype: str = "keep",
    max_shard_size: str | None = None,
    keep_undo: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write a checkpoint with adapters folded into its weights.

    Args:
        base: any checkpoint argument.
        adapters: any readable adapters, applied in order, ``"PATH"``, ``"PATH=0.7"`` or ``("PATH", 0.7)``; none
            (``[]``) to fold the one ``base`` itself holds.
        output: ``X.safetensors`` or a folder like the base's.
        strength: of all adapters, times their own: 0 is the base, 1 the adapter; along the rotation for HRA and OFT,
            linear for the rest. In a list, ``"PATTERN=0.3"`` speaks for some layers and the last one wins.
        exact: compute in float64.
        dtype: ``keep``, ``fp16``, ``bf16`` or ``fp32`` for every float tensor of the output.
        max_shard_size: split the output anew, e.g. ``5GB``.
        keep_undo: write a file from which `unmerge` restores the base byte for byte.
        force: overwrite, and merge a base-bound adapter into another base, a residual without its rotation.
        dry_run: plan only.
        progress: told of every byte.

    Returns:
        The report: for each layer the relative change ``||W' - W||_F / ||W||_F`` and the largest rotation angle.

    Raises:
        TargetError: the base holds factors; an adapter that has no strength but 0 and 1 (an odd number of reflections).
        CheckpointError: an adapter's layer is not in the base, has another shape, or is bound to another base; a
            residual without the rotation that it was extracted with directly before it.
        NumericsError: a merged weight is not finite.
        OutputError: see `plan.run`.

    Cost: the changed weights are read, multiplied (``4 out in r`` FLOPs a layer) and written; the rest is copied.
    """
    paths, strengths = given_strengths(adapters, strength)
    plan = plan_merge(
        *open_all(base, paths), Path(output), strengths=strengths, exact=exact, dtype=dtype,
        max_shard_size=max_shard_size, keep_undo=None if keep_undo is None else Path(keep_undo), force_base=force,
    )  # fmt: skip
    return run(plan, force=force, dry_run=dry_run, progress=progress)


def plan_merge(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    output: Path,
    *,
    strengths: Strengths = WHOLE,
    exact: bool = False,
    dtype: str = "keep",
    max_shard_size: str | None = None,
    keep_undo: Path | None = None,
    force_base: bool = False,
) -> Plan:
    """Plan `merge` from headers alone (and 8 kB a layer for the base's fingerprint); arguments as there."""
    check_choice("--dtype", dtype, tuple(DTYPES))
    if factored_layers(base):
        raise TargetError(
            f"{base.root.name} holds factors in place of weights, which an adapter cannot be folded into",
            hint=f"multiply them out first: ortho convert {base.root.name} --to dense -o DENSE",
        )
    own = has_hra(base)
    if own and adapters:
        raise UsageError(
            f"{base.root.name} holds an adapter of its own",
            hint=f"fold it first: ortho merge {base.root.name} -o FOLDED",
        )
    if not own and not adapters:
        raise UsageError(f"no adapter given, and {base.root.name} holds none", hint="ortho merge BASE ADAPTER -o OUT")
    folded = [adapter_of(base)] if own else list(adapters)
    changes = changes_of(base, folded, strengths, force_base=force_base)
    check_residuals(folded, force_base, changes.notes.append)
    cast = DTYPES[dtype]
    renamed = plain_names(base) if own else {}
    options: dict[str, object] = {
        "strength": list(strengths.values),
        "exact": exact,
        "dtype": None if dtype == "keep" else dtype,
        "max_shard_size": max_shard_size,
        "keep_undo": keep_undo,
    }
    inputs = [base.source.rstrip("/"), *([] if own else spelled(adapters, strengths))]
    dropped = {name for name in base.tensors if own and name.endswith(".hra_u")}
    plan = plan_fold(
        "merge", base, folded, changes, output, provenance("merge", inputs, options), exact=exact, cast=cast,
        max_shard_size=max_shard_size, renamed=renamed, dropped=dropped,
    )  # fmt: skip
    casts = _casts(base, changes) if cast is None else []
    if casts:
        kinds = ", ".join(dict.fromkeys(casts))
        plan.notes.append(f"{len(casts)} tensors of the adapters were cast to the base's float type ({kinds})")
    if keep_undo is not None:
        recast = {name for name, info in base.tensors.items() if _target(info, cast) != info.dtype}
        changed = {name: base.tensors[name] for name in {*changes.steps, *dropped, *recast}}
        leave_undo(plan, base, keep_undo, changed, renamed)
    _fit_vocabulary(plan, base, changes)
    return plan


def plan_fold(
    command: str,
    base: Checkpoint,
    adapters: Sequence[Adapter],
    changes: Changes,
    output: Path,
    metadata: dict[str, str],
    *,
    exact: bool,
    cast: str | None = None,
    max_shard_size: str | None = None,
    renamed: Mapping[str, str] | None = None,
    dropped: Collection[str] = (),
) -> Plan:
    """Plan a checkpoint like `base` in which some tensors go through steps.

    Args:
        command: the verb.
        base: the checkpoint to follow.
        adapters: what the steps are from.
        changes: of `changes_of` or `reversals_of`.
        output: a file or a folder.
        metadata: of the output.
        exact: compute in float64.
        cast: safetensors dtype of all float tensors, None: as they are.
        max_shard_size: split anew.
        renamed: names of the output, where they differ.
        dropped: tensors to leave out.
    """
    details: list[dict[str, Any]] = []

    def transform(name: str, info: TensorInfo) -> Sequence[Piece]:
        if name in dropped:
            return []
        plain = (renamed or {}).get(name, name)
        if name in changes.steps:
            steps, target = changes.steps[name], _target(info, cast)
            value = taken_whole(info, steps)
            if value is not None:
                details.append(_detail(plain, info, steps))
                return [_taken_over(value, plain, cast)]
            fold = Fold(info, steps, target, exact, _detail(plain, info, steps))
            details.append(fold.detail)
            return [computed(plain, target, fold.shape, fold.produce)]
        return [_taken_over(info, plain, cast)]

    limit = parse_size(max_shard_size) if max_shard_size else None
    extra = [_taken_over(info, name, cast) for name, info in changes.new.items()]
    written = mirror(base, output, transform, metadata, extra=extra, max_shard_bytes=limit)
    plan = Plan(command, input_files(base, adapters), output, written.files, copies=written.copies, texts=written.texts)
    plan.details = [detail for detail in details if detail["kind"] != "replaced"]
    plan.layers = len(plan.details)
    plan.parameters = sum(detail["parameters"] for detail in plan.details)
    plan.notes = list(dict.fromkeys([*base.notes, *changes.notes]))
    plan.totals = {
        "adapters": [adapter.kind for adapter in adapters],
        **strength_totals(adapters, changes.strengths),
        "arithmetic": "float64" if exact else "float32",
        "replaced": len(details) - len(plan.details) + len(changes.new),
    }
    # A block, its upcast copy, two products and the result; rotations in blocks need the largest matrix whole.
    largest = max([prod(detail["shape"]) * 4 for detail in details if detail["kind"] not in _BY_ROWS], default=0)
    plan.working_bytes = 5 * max(BLOCK_BYTES, largest) * (2 if exact else 1)
    ema = sum(name.startswith("model_ema.") for name in base.tensors)
    if ema > 2:  # two counters stand even in files without EMA weights
        plan.notes.append(f"EMA: {ema} model_ema tensors are left as they are; only the model's own weights are merged")
    plan.finish = _note_half_turns
    return plan


def _note_half_turns(plan: Plan) -> None:
    split = sum(detail.get("half_turn_split", False) for detail in plan.details)
    if split:
        plan.notes.append(
            f"{split} layers turn planes by pi (Gram-Schmidt adapters do), where a rotation has no single half: "
            "which planes those are was chosen, always in the same way"
        )


def _target(info: TensorInfo, cast: str | None) -> str:
    """The dtype a tensor is written in."""
    return cast if cast is not None and info.dtype in FLOAT_DTYPES else info.dtype


def _taken_over(info: TensorInfo, name: str, cast: str | None) -> Piece:
    """A tensor that no adapter changes: its bytes, or its values in another float type."""
    target = _target(info, cast)
    if target == info.dtype:
        return copied(info, name)
    return computed(name, target, info.shape, lambda: cast_blocks(info, target))


def _detail(name: str, info: TensorInfo, steps: Sequence[Step]) -> dict[str, Any]:
    acting = [step.adapter.layers[step.layer] for step in steps if isinstance(step, Operate)]
    ranks = [layer.rank for layer in acting if layer.rank is not None]
    strengths = [step.strength for step in steps]
    return {
        "name": name.removesuffix(".weight"),
        "shape": list(info.shape),
        "dtype": info.dtype,
        "kind": "+".join(layer.kind for layer in acting) or "replaced",
        "rank": sum(ranks) if ranks else None,
        **({"strength": strengths[0] if len(strengths) == 1 else strengths} if set(strengths) != {1.0} else {}),
        "parameters": sum(layer.parameters for layer in acting),
    }


def _casts(base: Checkpoint, changes: Changes) -> list[str]:
    """`F32 -> F16` for every tensor that takes the place of values of another float type."""
    return [
        f"{step.value.dtype} -> {base.tensors[name].dtype}"
        for name, steps in changes.steps.items()
        for step in steps
        if isinstance(step, (Replace, ReplaceRows)) and step.value.dtype != base.tensors[name].dtype
    ]


def _fit_vocabulary(plan: Plan, base: Checkpoint, changes: Changes) -> None:
    """Give the written config the number of tokens of embeddings that an adapter resized."""
    sizes = {
        (step.value.shape[0], base.tensors[name].shape[0])
        for name, steps in changes.steps.items()
        for step in steps
        if isinstance(step, Replace) and step.value.shape != base.tensors[name].shape
    }
    source = next((path for path, relative in plan.copies if relative == "config.json"), None)
    if not sizes or source is None:
        return
    new, old = max(sizes)
    config = read_json(source)
    if len(sizes) > 1 or config.get("vocab_size") != old:
        plan.notes.append(f"the adapter resized tensors ({old:,} to {new:,} rows); config.json is left as it was")
    else:
        plan.copies = [(path, relative) for path, relative in plan.copies if relative != "config.json"]
        plan.texts["config.json"] = json.dumps({**config, "vocab_size": new}, indent=2) + "\n"
        plan.notes.append(f"vocab_size in config.json is now {new:,} (was {old:,}): the adapter resized the embeddings")
