"""Fold adapters into the weights they belong to, streaming: one block of rows in memory, the rest copied as bytes.

Arithmetic is float32 (float64 with `exact`) and is cast once, at the end. Adapters act in the order given; the base's
layout, sharding and small files are kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ortho_cli.checkpoints import layouts
from ortho_cli.checkpoints.adapters import Adapter, adapter_of
from ortho_cli.checkpoints.factored import factored_layers
from ortho_cli.checkpoints.reading import BLOCK_BYTES
from ortho_cli.checkpoints.store import Checkpoint, read_json
from ortho_cli.checkpoints.tensors import FLOAT_DTYPES, TensorInfo
from ortho_cli.checkpoints.writer import Piece, computed, copied
from ortho_cli.errors import TargetError, UsageError, check_choice

from .fit import check_base, check_floats, check_tensors, input_files, open_all
from .fold import AddTo, Fold, Operate, Replace, ReplaceRows, Step, cast_blocks
from .hra_repo import has_hra, plain_names
from .mirror import mirror, parse_size
from .plan import Plan, Progress, Report, provenance, run

__all__ = ["merge", "plan_merge"]

# Kinds whose operators act on any block of rows.
_BY_ROWS = ("hra", "lora", "loha", "replaced")
DTYPES = {"keep": None, "fp16": "F16", "bf16": "BF16", "fp32": "F32"}


def merge(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    exact: bool = False,
    dtype: str = "keep",
    max_shard_size: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write a checkpoint with adapters folded into its weights.

    Args:
        base: any checkpoint argument.
        adapters: any readable adapters, applied in order; none (``[]``) to fold the one ``base`` itself holds.
        output: ``X.safetensors`` or a folder like the base's.
        exact: compute in float64.
        dtype: ``keep``, ``fp16``, ``bf16`` or ``fp32`` for every float tensor of the output.
        max_shard_size: split the output anew, e.g. ``5GB``.
        force: overwrite, and merge a base-bound adapter into another base.
        dry_run: plan only.
        progress: told of every byte.

    Returns:
        The report: for each layer the relative change ``||W' - W||_F / ||W||_F`` and the largest rotation angle.

    Raises:
        TargetError: the base holds factors.
        CheckpointError: an adapter's layer is not in the base, has another shape, or is bound to another base.
        NumericsError: a merged weight is not finite.
        OutputError: see `plan.run`.

    Cost: the changed weights are read, multiplied (``4 out in r`` FLOPs a layer) and written; the rest is copied.
    """
    opened, found = open_all(base, [adapters] if isinstance(adapters, (str, Path)) else adapters)
    plan = plan_merge(
        opened, found, Path(output), exact=exact, dtype=dtype, max_shard_size=max_shard_size, force_base=force
    )
    return run(plan, force=force, dry_run=dry_run, progress=progress)


def plan_merge(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    output: Path,
    *,
    exact: bool = False,
    dtype: str = "keep",
    max_shard_size: str | None = None,
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
    changes = _changes(base, folded, force_base)
    cast = DTYPES[dtype]
    details: list[dict[str, Any]] = []
    restored = plain_names(base) if own else {}

    def transform(name: str, info: TensorInfo) -> Sequence[Piece]:
        if own and name.endswith(".hra_u"):
            return []
        plain = restored.get(name, name)
        if name in changes.steps:
            steps, target = changes.steps[name], _target(info, cast)
            value = _taken_whole(info, steps)
            if value is not None:
                details.append(_detail(plain, info, steps))
                return [_taken_over(value, plain, cast)]
            fold = Fold(info, steps, target, exact, _detail(plain, info, steps))
            details.append(fold.detail)
            return [computed(plain, target, fold.shape, fold.produce)]
        return [_taken_over(info, plain, cast)]

    adapter_names = [] if own else [adapter.source.rstrip("/") for adapter in adapters]
    options: dict[str, object] = {
        "exact": exact,
        "dtype": None if dtype == "keep" else dtype,
        "max_shard_size": max_shard_size,
    }
    metadata = provenance("merge", [base.source.rstrip("/"), *adapter_names], options)
    limit = parse_size(max_shard_size) if max_shard_size else None
    extra = [_taken_over(info, name, cast) for name, info in changes.new.items()]
    written = mirror(base, output, transform, metadata, extra=extra, max_shard_bytes=limit)
    plan = Plan("merge", input_files(base, folded), output, written.files, copies=written.copies, texts=written.texts)
    plan.details = [detail for detail in details if detail["kind"] != "replaced"]
    plan.layers = len(plan.details)
    plan.parameters = sum(detail["parameters"] for detail in plan.details)
    plan.notes = list(dict.fromkeys([*base.notes, *changes.notes]))
    casts = _casts(base, changes) if cast is None else []
    if casts:
        kinds = ", ".join(dict.fromkeys(casts))
        plan.notes.append(f"{len(casts)} tensors of the adapters were cast to the base's float type ({kinds})")
    plan.totals = {
        "adapters": [adapter.kind for adapter in folded],
        "arithmetic": "float64" if exact else "float32",
        "replaced": len(details) - len(plan.details) + len(changes.new),
    }
    # A block, its upcast copy, two products and the result; rotations in blocks need the largest matrix whole.
    largest = max([prod(detail["shape"]) * 4 for detail in details if detail["kind"] not in _BY_ROWS], default=0)
    plan.working_bytes = 5 * max(BLOCK_BYTES, largest) * (2 if exact else 1)
    ema = sum(name.startswith("model_ema.") for name in base.tensors)
    if ema > 2:  # two counters stand even in files without EMA weights
        plan.notes.append(f"EMA: {ema} model_ema tensors are left as they are; only the model's own weights are merged")
    _fit_vocabulary(plan, base, changes)
    return plan


def _target(info: TensorInfo, cast: str | None) -> str:
    """The dtype a tensor is written in."""
    return cast if cast is not None and info.dtype in FLOAT_DTYPES else info.dtype


def _taken_over(info: TensorInfo, name: str, cast: str | None) -> Piece:
    """A tensor that no adapter changes: its bytes, or its values in another float type."""
    target = _target(info, cast)
    if target == info.dtype:
        return copied(info, name)
    return computed(name, target, info.shape, lambda: cast_blocks(info, target))


@dataclass
class _Changes:
    """Native tensor name -> its steps; tensors the base lacks; and what the report should say."""

    steps: dict[str, list[Step]] = field(default_factory=dict)
    new: dict[str, TensorInfo] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def resized(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that were replaced so far."""
        replaced = {name: steps[0] for name, steps in self.steps.items()}  # a replacement is always the first step
        return {name: step.value.shape for name, step in replaced.items() if isinstance(step, Replace)}


def _changes(base: Checkpoint, adapters: Sequence[Adapter], force_base: bool) -> _Changes:
    """Resolve every adapter's names in the base, check shapes and fingerprints, and line the steps up."""
    changes = _Changes()
    index = layouts.LayerIndex(base.layers(), base.layout)
    for adapter in adapters:
        changes.notes += adapter.notes
        native = index.resolve_all(list(adapter.layers))
        resized = changes.resized()
        check_base(base, adapter, native, force_base, changes.notes.append, resized)
        names = _tensor_names(base, adapter)
        check_tensors(base, adapter, names, resized)
        for name, info in adapter.replacements.items():
            if name in names:
                if changes.steps.pop(names[name], None):  # nothing of them would be left
                    changes.notes.append(f"{name}: a later adapter replaces what earlier ones made of it")
                _push(changes, names[name], Replace(info))
            else:
                changes.new[name] = info
                changes.notes.append(f"{name} is not in the base and was added from the adapter")
        for name, (rows, info) in adapter.row_replacements.items():
            _push(changes, names[name], ReplaceRows(rows, info))
        for layer in adapter.layers:
            _push(changes, base.weight(native[layer]).name, Operate(adapter, layer))
        for name, addition in adapter.additions.items():
            _push(changes, names[name], AddTo(addition))
    for name, steps in changes.steps.items():
        if _taken_whole(base.tensors[name], steps) is None:
            check_floats(base.tensors[name], [value for step in steps if (value := _value(step)) is not None])
    return changes


def _taken_whole(info: TensorInfo, steps: Sequence[Step]) -> TensorInfo | None:
    """The tensor that takes the base's place byte for byte; None where anything is to be computed."""
    step = steps[0]
    whole = len(steps) == 1 and isinstance(step, Replace) and step.value.dtype == info.dtype
    return step.value if whole and isinstance(step, Replace) else None


def _value(step: Step) -> TensorInfo | None:
    """The tensor a step brings whole."""
    if isinstance(step, AddTo):
        return step.addition.tensor
    return step.value if isinstance(step, (Replace, ReplaceRows)) else None


def _casts(base: Checkpoint, changes: _Changes) -> list[str]:
    """`F32 -> F16` for every tensor that takes the place of values of another float type."""
    return [
        f"{step.value.dtype} -> {base.tensors[name].dtype}"
        for name, steps in changes.steps.items()
        for step in steps
        if isinstance(step, (Replace, ReplaceRows)) and step.value.dtype != base.tensors[name].dtype
    ]


def _push(changes: _Changes, name: str, step: Step) -> None:
    changes.steps.setdefault(name, []).append(step)


def _tensor_names(base: Checkpoint, adapter: Adapter) -> dict[str, str]:
    """Names of whole tensors an adapter brings -> names in the base, for those the base has."""
    modules = dict.fromkeys(name.rpartition(".")[0].removesuffix(".fixed_linear") for name in base.tensors)
    everything = layouts.LayerIndex(modules, base.layout)
    found = {}
    for name in (*adapter.replacements, *adapter.row_replacements, *adapter.additions):
        module, _, kind = name.rpartition(".")
        native = everything.resolve(module)
        for candidate in (f"{native}.{kind}", f"{native}.fixed_linear.{kind}"):
            if native is not None and candidate in base.tensors:
                found[name] = candidate
                break
    return found


def _detail(name: str, info: TensorInfo, steps: Sequence[Step]) -> dict[str, Any]:
    acting = [step.adapter.layers[step.layer] for step in steps if isinstance(step, Operate)]
    ranks = [layer.rank for layer in acting if layer.rank is not None]
    return {
        "name": name.removesuffix(".weight"),
        "shape": list(info.shape),
        "dtype": info.dtype,
        "kind": "+".join(layer.kind for layer in acting) or "replaced",
        "rank": sum(ranks) if ranks else None,
        "parameters": sum(layer.parameters for layer in acting),
    }


def _fit_vocabulary(plan: Plan, base: Checkpoint, changes: _Changes) -> None:
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
