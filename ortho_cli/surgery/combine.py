"""Several adapters become one: rotations on their manifold, low-rank sums in their joint factors.

Adding two rotations is not a rotation. In the span of all reflections the product and every mean are exact and cost
`r x r`; the result is refactored into reflections, again a plain HRA adapter. Adapters are small: everything is known
before anything is written, and only what holds weights of a base is made while it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from ortho_cli.checkpoints import layouts, targets
from ortho_cli.checkpoints.adapters import Adapter, base_bound, read_adapter
from ortho_cli.checkpoints.fingerprint import base_fingerprint
from ortho_cli.checkpoints.layer_pool import LayerPool, default_workers
from ortho_cli.checkpoints.store import Checkpoint, open_checkpoint
from ortho_cli.errors import CheckpointError, UsageError, check_choice

from .combine_layers import ADDITIVE, DENSITY, ROTATIONS, Combined, Mixing, combine_layer
from .combine_output import adapter_files, settled
from .combine_parts import Gathered, gather
from .fit import input_files
from .plan import Plan, Progress, Report, provenance, run
from .strengths import AdapterArgument, split_strength

__all__ = ["combine", "plan_combine"]


def combine(
    adapters: Sequence[AdapterArgument],
    output: str | Path,
    *,
    mode: str | Sequence[str] = (),
    rank: int | Sequence[int | str] | None = None,
    base: str | Path | None = None,
    density: float | None = None,
    restore_angles: bool = False,
    seed: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Make one adapter of several.

    Args:
        adapters: paths, `PATH=W` or `(path, W)`: a share for means, a strength for products and sums; 1 by default.
        output: a folder: a PEFT HRA adapter where all are rotations of the input side, else a PEFT LoRA.
        mode: for rotations `mean` (default), `compose`, `log-mean`, `orthomerge`, `slerp` or `grassmann`; for sums
            `linear` (default), `svd`, `ties` or `dare`; one of each for adapters of both kinds.
        rank: the most reflections or components of a layer, or `PATTERN=N`; None: what the result needs.
        base: needed where rotations and sums meet, and for rotations of the output side.
        density: the share of entries that `ties` and `dare` keep, by default half.
        restore_angles: turn rotations on until their angles have the parts' mean norm.
        seed: of `dare`.
        force: overwrite, and accept another base.
        dry_run: combine and report, write nothing.
        progress: told of every byte.

    Returns:
        The report: for each layer the largest angles before and after, how much order matters (the norm of the
        commutator), the defect of orthogonality, and the relative error of a lower rank.

    Raises:
        UsageError: fewer than two adapters, a mode that fits none of them, a base that is needed.
        TargetError: kinds that cannot be combined.
        CheckpointError: adapters that are bound to their base and do not agree on it.
        NumericsError: rotations that have no one mean.
        OutputError: see `plan.run`.

    Cost: per layer `O(d m^2 + m^3)`, `m` the sum of the ranks; no `d x d` matrix.
    Reference: OrthoMerge, arXiv:2602.05943; OrthoFuse, arXiv:2604.05183; for sums TIES, arXiv:2306.01708, and DARE,
        arXiv:2311.03099.
    """
    split = [split_strength(item) for item in adapters]
    opened = open_checkpoint(base) if base is not None else None
    plan = plan_combine(
        [read_adapter(path) for path, _ in split],
        [weight for _, weight in split],
        Path(output),
        mode=[mode] if isinstance(mode, str) else mode,
        rank=rank,
        base=opened,
        density=density,
        restore_angles=restore_angles,
        seed=seed,
        force_base=force,
    )
    return run(plan, force=force, dry_run=dry_run, progress=progress)


def plan_combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    output: Path,
    *,
    mode: Sequence[str] = (),
    rank: int | Sequence[int | str] | None = None,
    base: Checkpoint | None = None,
    density: float | None = None,
    restore_angles: bool = False,
    seed: int | None = None,
    force_base: bool = False,
) -> Plan:
    """Plan `combine`; reads the adapters whole, of the base headers only."""
    if len(adapters) < 2:
        raise UsageError(f"{len(adapters)} adapter to combine", hint="ortho combine ADAPTER[=W] ADAPTER[=W] -o OUT")
    if output.suffix == ".safetensors":
        raise UsageError("a combined adapter is a PEFT folder", hint=f"use -o {output.with_suffix('').name}")
    notes = [note for adapter in adapters for note in adapter.notes]
    gathered = gather(adapters, base, notes.append, force_base=force_base)
    form = _form(gathered, base)
    mixing = _mixing(mode, gathered, weights, density=density, restore=restore_angles, seed=seed)
    ranks = _ranks(rank, gathered)

    def one(name: str) -> Combined:
        parts = gathered.layers[name]
        found = combine_layer(
            [part.rotation() if part is not None else None for part in parts],
            [part.factors() if part is not None else None for part in parts],
            mixing,
            ranks.get(name),
        )
        return settled(found, form)

    costs = {name: gathered.bytes_of(name) for name in gathered.layers}
    pool = LayerPool(one, workers=default_workers())
    combined = dict(zip(costs, pool.map(costs), strict=True))
    modes = [mixing.rotation] * gathered.rotates + [mixing.additive] * gathered.adds
    files = adapter_files(form, gathered, combined, base, _metadata(form, gathered, base, mixing, modes, rank))
    plan = Plan("combine", input_files(base, adapters), output, files.files)
    plan.texts, plan.notes = files.texts, list(dict.fromkeys([*notes, *files.notes]))
    plan.details = [_detail(name, gathered, combined[name]) for name in gathered.layers]
    plan.layers = len(plan.details)
    plan.parameters = sum(detail["parameters"] for detail in plan.details)
    plan.working_bytes = sum(found.held for found in combined.values()) + max(pool.needed, plan.working_bytes)
    plan.totals = {"adapters": _weighted(gathered, mixing), "mode": " + ".join(modes), "to": f"peft-{form}"}
    alone = sum(None in parts for parts in gathered.layers.values())
    if alone:
        plan.notes.append(f"{alone} layers are not in every adapter: one that lacks a layer leaves it as it is")
    return plan


def _form(gathered: Gathered, base: Checkpoint | None) -> str:
    """`hra` where the result is a chain of reflections on the input side, else `lora`.

    Raises:
        UsageError: a LoRA that needs a base, and none was given.
    """
    output_side = any(part.layer.layer.options.get("side") == "output" for part in gathered.parts)
    if gathered.rotates and not gathered.adds and not output_side:
        return "hra"
    if gathered.rotates and base is None:
        reason = "PEFT's HRA has no output side" if output_side else "rotations and low-rank sums meet"
        raise UsageError(f"{reason}: the result is a LoRA on its base", hint="add --base BASE")
    return "lora"


def _mixing(
    modes: Sequence[str],
    gathered: Gathered,
    weights: Sequence[float],
    *,
    density: float | None,
    restore: bool,
    seed: int | None,
) -> Mixing:
    """The modes in their families, with what belongs to them.

    Raises:
        UsageError: a mode for which there are no adapters, two of one family, or settings out of range or place.
    """
    chosen: dict[str, str] = {}
    for mode in modes:
        check_choice("--mode", mode, (*ROTATIONS, *ADDITIVE))
        family = "additive" if mode in ADDITIVE else "rotation"
        if mode in ADDITIVE and not gathered.adds:
            raise UsageError(f"--mode {mode} is for low-rank sums", hint=f"for rotations: {', '.join(ROTATIONS)}")
        if mode in ROTATIONS and not gathered.rotates:
            raise UsageError(f"--mode {mode} is for rotations", hint=f"for low-rank sums: {', '.join(ADDITIVE)}")
        if chosen.get(family, mode) != mode:
            raise UsageError(f"--mode {chosen[family]} and --mode {mode} are for the same adapters", hint="give one")
        chosen[family] = mode
    if density is not None and chosen.get("additive") not in ("ties", "dare"):
        raise UsageError(f"--density {density:g} is about --mode ties and dare", hint="leave it out")
    if seed is not None and chosen.get("additive") != "dare":
        raise UsageError(f"--seed {seed} is about --mode dare", hint="leave it out")
    mixing = Mixing(
        tuple(weights),
        gathered.rotating,
        chosen.get("rotation", ROTATIONS[0]),
        chosen.get("additive", ADDITIVE[0]),
        DENSITY if density is None else density,
        restore,
        seed or 0,
    )
    mixing.check()
    return mixing


def _ranks(rank: int | Sequence[int | str] | None, gathered: Gathered) -> dict[str, int]:
    if rank is None:
        return {}
    shapes = {name: gathered.first(name).shape for name in gathered.layers}
    layout = "sd15-diffusers" if all(layouts.component_name(name)[0] for name in shapes) else "plain"
    found = targets.per_layer([str(value) for value in ([rank] if isinstance(rank, int) else rank)], shapes, layout)
    for name, value in found.items():
        turns = any(part is not None and not part.adds for part in gathered.layers[name])
        if value < 1 or (turns and value % 2):
            reason = "a rotation takes two reflections for each plane" if turns else "there is no such rank"
            raise UsageError(f"--rank {value} at layer {name}: {reason}", hint=f"use --rank {max(2, value + 1)}")
    return found


def _detail(name: str, gathered: Gathered, found: Combined) -> dict[str, Any]:
    kinds = dict.fromkeys(part.layer.layer.kind for part in gathered.layers[name] if part is not None)
    shape = [size or None for size in gathered.first(name).shape]
    sides = (shape[1] or 0,) if found.vectors is not None else (shape[0] or 0, prod(size or 1 for size in shape[1:]))
    return {
        "name": name,
        "shape": shape,
        "dtype": "F32",
        "kind": "+".join(kinds),
        "rank": found.rank,
        "parameters": found.rank * sum(sides),
        **found.detail,
    }


def _weighted(gathered: Gathered, mixing: Mixing) -> list[str]:
    return [
        f"{adapter.path.name}={weight:g}" for adapter, weight in zip(gathered.adapters, mixing.weights, strict=True)
    ]


def _metadata(
    form: str,
    gathered: Gathered,
    base: Checkpoint | None,
    mixing: Mixing,
    modes: Sequence[str],
    rank: int | Sequence[int | str] | None,
) -> dict[str, str]:
    fingerprints = {adapter.metadata.get("ortho.base_fingerprint") for adapter in gathered.adapters}
    bound = next((adapter for adapter in gathered.adapters if base_bound(adapter)), None)
    if bound is not None and base is None and (len(fingerprints) > 1 or None in fingerprints):
        raise CheckpointError(
            f"{bound.path.name} is only right on the base it was made for, and the adapters do not all name that base",
            hint="add --base BASE",
            where=str(bound.path),
        )
    fingerprint = fingerprints.pop() if len(fingerprints) == 1 else None
    if base is not None:
        weights = [part.layer.weight.name for part in gathered.parts if part.layer.weight is not None]
        names = dict.fromkeys(name.removesuffix(".weight").removesuffix(".fixed_linear") for name in weights)
        fingerprint = base_fingerprint(base, list(names))
    method: dict[str, object] = {"name": form, "combined": len(gathered.adapters)}
    if form == "lora" and (gathered.rotates or bound is not None):
        method["base_bound"] = True
    options: dict[str, object] = {
        "mode": list(modes),
        "rank": None if rank is None else [rank] if isinstance(rank, int) else list(rank),
        "base": Path(base.source.rstrip("/")) if base is not None else None,
        "restore_angles": mixing.restore,
        "density": mixing.density if {"ties", "dare"} & set(modes) else None,
        "seed": mixing.seed if "dare" in modes else None,
    }
    return provenance("combine", _weighted(gathered, mixing), options, method=method, fingerprint=fingerprint)
