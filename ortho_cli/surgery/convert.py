"""Convert adapters and checkpoints between the forms that tools read; the front door of the conversions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ortho_cli.checkpoints.adapters import Adapter, read_adapter
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.errors import UsageError, check_choice

from .convert_adapter import ADAPTER_DIALECTS, plan_convert_adapter
from .convert_checkpoint import (
    CHECKPOINT_FORMS,
    open_base,
    plan_base,
    plan_diffusers,
    plan_ldm,
    plan_safetensors,
)
from .convert_factored import plan_dense
from .convert_hra_repo import plan_hra_repo
from .fit import refuse_adapter
from .mirror import check_output_name
from .plan import Plan, Progress, Report, run
from .strengths import given_strengths

__all__ = ["FORMS", "convert", "plan_convert"]

FORMS = (*ADAPTER_DIALECTS, "hra-repo", *CHECKPOINT_FORMS)


def convert(
    source: str | Path,
    output: str | Path,
    to: str | None = None,
    *,
    base: str | Path | None = None,
    strength: float | str | Sequence[float | str] = 1.0,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write an adapter or a checkpoint in another form; everything is exact or refused.

    Args:
        source: an adapter (any dialect) or a checkpoint.
        output: a file or a folder, as the form wants.
        to: ``peft-hra``, ``peft-lora``, ``kohya-lora``, ``diffusers-lora`` for adapters; ``hra-repo`` (adapter and
            base as the HRA authors' checkpoint); ``ldm``, ``diffusers`` (SD1.5), ``base`` (take an adapter out),
            ``dense`` (multiply factors out), ``safetensors`` for checkpoints. An adapter may keep its own form, to
            get another strength.
        base: the adapter's base (HRA to LoRA needs its weights), or where a diffusers folder's tokenizer comes from.
        strength: of an adapter, as for `merge`: a Householder adapter becomes the Householder adapter that turns by
            this share of its angles, a LoRA is scaled.
        force: overwrite, and accept a base whose fingerprint differs.
        dry_run: plan only.
        progress: told of every byte.

    Returns:
        The report.

    Raises:
        TargetError: there is no exact form.
        CheckpointError: unreadable, or another base.
        OutputError: see `plan.run`.
    """
    _, strengths = given_strengths([], strength)
    base = None if base is None else str(base)
    plan = plan_convert(source, Path(output), to, base=base, strength=strengths.values, force_base=force)
    return run(plan, force=force, dry_run=dry_run, progress=progress)


def plan_convert(
    source: str | Path,
    output: Path,
    to: str | None = None,
    *,
    base: str | None = None,
    strength: Sequence[str] = (),
    force_base: bool = False,
) -> Plan:
    """Plan `convert` from headers alone; arguments as there."""
    check_choice("--to", to, FORMS)
    check_output_name(output)
    if to is None and not strength:
        raise UsageError("neither a form nor a strength was given", hint=f"--to, one of {', '.join(FORMS)}")
    if to is None or to in ADAPTER_DIALECTS:
        adapter = read_adapter(source)
        return plan_convert_adapter(
            adapter, output, to or _own_form(adapter), open_base(base), strength=strength, force_base=force_base
        )
    if to == "hra-repo":
        return plan_hra_repo(Path(source), output, open_base(base), strength)
    if strength:
        raise UsageError(f"--strength is for adapters, and --to {to} writes a checkpoint", hint="leave --strength out")
    if base is not None and to != "diffusers":
        raise UsageError(f"--to {to} needs nothing but the checkpoint itself", hint="leave --base out")
    opened = open_checkpoint(source)
    if to != "safetensors":
        theirs = ", ".join((*ADAPTER_DIALECTS, "hra-repo"))
        refuse_adapter(opened, f"--to {to} is for checkpoints; for adapters there are {theirs}")
    if to == "diffusers":
        return plan_diffusers(opened, output, base)
    plans = {"ldm": plan_ldm, "base": plan_base, "dense": plan_dense, "safetensors": plan_safetensors}
    return plans[to](opened, output)


def _own_form(adapter: Adapter) -> str:
    """The form in which an adapter is written where none is named: its own, where that is one of ours."""
    form = {"kohya": "kohya-lora", "diffusers": "diffusers-lora"}.get(adapter.dialect)
    return form or ("peft-hra" if adapter.kind == "hra" else "peft-lora")
