"""Take adapters out of a checkpoint they were merged into: exactly by an undo file, to rounding by their inverses."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from pathlib import Path

from ortho_cli.checkpoints import layouts
from ortho_cli.checkpoints.adapters import Adapter
from ortho_cli.checkpoints.factored import factored_layers
from ortho_cli.checkpoints.fingerprint import base_fingerprint
from ortho_cli.checkpoints.store import Checkpoint, open_checkpoint
from ortho_cli.errors import TargetError, UsageError

from .changes import reversals_of
from .fit import open_all, refuse_adapter
from .hra_repo import has_hra
from .merge import plan_fold
from .plan import Plan, Progress, Report, provenance, run
from .strengths import WHOLE, AdapterArgument, Strengths, given_strengths, spelled
from .undo_restore import plan_undo

__all__ = ["plan_inverse", "plan_unmerge", "unmerge"]

# Unit roundoff: half the distance from 1 to the next number.
ROUNDOFF = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
# Measured on rank-8 rotations of 768 x 768 weights, in units of roundoff. The merged weight's own rounding survives the
# inverse, but rounding the result lands most numbers on the base's again: the more so, the less the rotation turns.
STORED_TWICE, COMPUTED_TWICE = 0.18, 1.8


def unmerge(
    merged: str | Path,
    adapters: str | Path | Sequence[AdapterArgument] = (),
    output: str | Path | None = None,
    *,
    undo: str | Path | None = None,
    strength: float | str | Sequence[float | str] = 1.0,
    exact: bool = False,
    max_shard_size: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Restore the base of a merged checkpoint.

    With an undo file of ``merge(..., keep_undo=FILE)`` every byte of every file comes back. Without one the adapters'
    inverses are applied, the last first: right but for the rounding of the merged weights.

    Args:
        merged: what `merge` wrote.
        adapters: what was merged, in the same order and at the same strengths; none with an undo file.
        output: the base's new place, a file or a folder as it was.
        undo: the undo file.
        strength: as for `merge`.
        exact: compute the inverses in float64.
        max_shard_size: split the output anew (without an undo file).
        force: overwrite.
        dry_run: plan only.
        progress: told of every byte.

    Returns:
        The report; without an undo file, ``totals["expected_error"]`` is the relative error to expect in each dtype.

    Raises:
        CheckpointError: ``merged`` is not what the undo file was made for, byte for byte; nothing is written then.
        TargetError: an adapter has no inverse (DoRA, soft reflections, replaced tensors).
        OutputError: see `plan.run`.

    Cost: with an undo file, two passes over the merged checkpoint; without, that of `merge`.

    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> import ortho_cli as ortho
    >>> folder = Path(tempfile.mkdtemp())
    >>> save_file({"net.0.weight": torch.randn(4, 4)}, folder / "base.safetensors")
    >>> _ = ortho.add_hra(folder / "base.safetensors", folder / "adapter", rank=2, targets=["net.0"], seed=1)
    >>> _ = ortho.merge(folder / "base.safetensors", folder / "adapter", folder / "merged.safetensors",
    ...     keep_undo=folder / "undo.safetensors")
    >>> _ = ortho.unmerge(folder / "merged.safetensors", output=folder / "again.safetensors",
    ...     undo=folder / "undo.safetensors")
    >>> (folder / "again.safetensors").read_bytes() == (folder / "base.safetensors").read_bytes()
    True
    """
    if output is None:
        raise UsageError("no place for the base was given", hint='unmerge(merged, output="BASE.safetensors", ...)')
    paths, strengths = given_strengths(adapters, strength)
    plan = plan_unmerge(
        merged, paths, Path(output), undo=None if undo is None else Path(undo), strengths=strengths, exact=exact,
        max_shard_size=max_shard_size,
    )  # fmt: skip
    return run(plan, force=force, dry_run=dry_run, progress=progress)


def plan_unmerge(
    merged: str | Path,
    adapters: Sequence[str | Path],
    output: Path,
    *,
    undo: Path | None = None,
    strengths: Strengths = WHOLE,
    exact: bool = False,
    max_shard_size: str | None = None,
) -> Plan:
    """Plan `unmerge` from headers; arguments as there."""
    if undo is not None:
        if adapters or strengths != WHOLE or exact or max_shard_size:
            raise UsageError(
                "an undo file restores the very files of the base: adapters, strengths, --exact and --max-shard-size "
                "are for unmerging without one",
                hint="ortho unmerge MERGED --undo FILE -o BASE",
            )
        opened = open_checkpoint(merged)
        refuse_adapter(opened, "the merged checkpoint comes first: ortho unmerge MERGED --undo FILE -o BASE")
        return plan_undo(opened, undo, output)
    if not adapters:
        raise UsageError(
            "neither an undo file nor an adapter was given",
            hint="ortho unmerge MERGED --undo FILE -o BASE, or ortho unmerge MERGED ADAPTER -o BASE",
        )
    return plan_inverse(*open_all(merged, adapters), output, strengths, exact=exact, max_shard_size=max_shard_size)


def plan_inverse(
    merged: Checkpoint,
    adapters: Sequence[Adapter],
    output: Path,
    strengths: Strengths = WHOLE,
    *,
    exact: bool = False,
    max_shard_size: str | None = None,
) -> Plan:
    """Plan the inverses of adapters, last one first; arguments as for `unmerge`."""
    if has_hra(merged) or factored_layers(merged):
        raise TargetError(
            f"{merged.root.name} holds {'an adapter' if has_hra(merged) else 'factors'} of its own: nothing is merged "
            "into its weights",
            hint=f"take it out: ortho convert {merged.root.name} --to {'base' if has_hra(merged) else 'dense'} -o OUT",
        )
    _refuse_base(merged, adapters)
    changes = reversals_of(merged, adapters, strengths)
    options: dict[str, object] = {"strength": list(strengths.values), "exact": exact, "max_shard_size": max_shard_size}
    metadata = provenance("unmerge", [merged.source.rstrip("/"), *spelled(adapters, strengths)], options)
    plan = plan_fold("unmerge", merged, adapters, changes, output, metadata, exact=exact, max_shard_size=max_shard_size)
    dtypes = dict.fromkeys(detail["dtype"] for detail in plan.details)
    plan.totals["exact"] = False
    plan.totals["expected_error"] = {dtype: expected_error(dtype, exact=exact) for dtype in dtypes}
    plan.notes.append(
        "inverses restore the base to rounding, and only where these adapters were merged, in this order and at these "
        "strengths; merge with --keep-undo to restore every byte"
    )
    return plan


def _refuse_base(merged: Checkpoint, adapters: Sequence[Adapter]) -> None:
    """Refuse a checkpoint that is the base an adapter was made for, unchanged: there is nothing to undo in it.

    Raises:
        TargetError: naming the adapter.
    """
    index = layouts.LayerIndex(merged.layers(), merged.layout)
    for adapter in adapters:
        recorded = adapter.metadata.get("ortho.base_fingerprint")
        native = index.resolve_all(list(adapter.layers)) if recorded else {}
        if recorded and recorded == base_fingerprint(merged, native.values()):
            raise TargetError(
                f"{merged.root.name} is the base that {adapter.path.name} was made for: it was not merged into it",
                hint="name the merged file; what it differs by: ortho inspect BASE --diff MERGED",
            )


def expected_error(dtype: str, *, exact: bool = False) -> float:
    """The relative error ``||W - W_0||_F / ||W_0||_F`` to expect of a rotation merged and undone in a dtype.

    An estimate: within a factor of three for rotations between weak and strong.

    >>> [f"{expected_error(dtype):.0e}" for dtype in ("F32", "F16", "BF16")]
    ['1e-07', '9e-05', '7e-04']
    """
    computed = ROUNDOFF["F64" if exact or dtype == "F64" else "F32"]
    return hypot(STORED_TWICE * ROUNDOFF[dtype], COMPUTED_TWICE * computed)
