"""Put Householder adapters (HRA, arXiv 2405.17484) into a checkpoint, as an adapter beside it or inside it.

The adapter starts as the identity: equal column pairs cancel, and the Gram-Schmidt variant begins at the inverse of
its own frozen start. A layer's vectors depend on the seed and its canonical name alone, so that the LDM file, the
diffusers folder and any sharding of one model get the same adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.checkpoints import layouts
from ortho_cli.checkpoints.fingerprint import base_fingerprint
from ortho_cli.checkpoints.store import Checkpoint, open_checkpoint
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.checkpoints.writer import Piece, copied
from ortho_cli.errors import TargetError, UsageError, check_choice

from .adapter_folder import Factor, hra_folder
from .fit import refuse_adapter
from .hra_repo import control_pieces, foreign_names, has_hra, is_sd15_ldm
from .hra_selection import HraLayer, check_repo_layers, select_layers
from .mirror import check_output_name, mirror, parse_size
from .plan import Plan, Progress, Report, provenance, run

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_hra", "initial_vectors", "plan_add_hra"]


def add_hra(
    checkpoint: str | Path,
    output: str | Path,
    *,
    rank: int | str | Sequence[int | str] = 8,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    form: str | None = None,
    layout: str = "keep",
    gram_schmidt: bool = False,
    ema: str | None = None,
    seed: int = 0,
    max_shard_size: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Add Householder adapters to a checkpoint; the model's function does not change.

    Args:
        checkpoint: any checkpoint argument (file, folder, hub id).
        output: ``X.safetensors`` or a folder.
        rank: reflections a layer, even; per layer as ``[8, "**.attn2.**=16"]``, the last match wins.
        targets: glob patterns or a preset's name, one or several; by default the model family's preset.
        exclude: patterns to leave out of ``targets``.
        form: ``adapter`` (a PEFT folder) or ``checkpoint``; by default by the output's suffix.
        layout: ``hra-repo`` writes what the HRA authors' strict loader wants (SD1.5 LDM files).
        gram_schmidt: the orthogonalised variant (lambda = infinity), started at the identity.
        ema: ``use``, ``keep`` or ``drop`` the file's EMA copy.
        seed: of the start vectors.
        max_shard_size: split the output anew, e.g. ``5GB``.
        force: overwrite.
        dry_run: plan only.
        progress: told of every byte.

    Returns:
        The report; one entry of ``details`` for each adapted layer.

    Raises:
        TargetError: a pattern matches nothing, or a layer cannot take this rank.
        OutputError: see `plan.run`.

    Cost: reads headers and 8 kB a layer; ``checkpoint`` copies the file once.
    """
    plan = plan_add_hra(
        open_checkpoint(checkpoint), Path(output), rank=rank, targets=targets, exclude=exclude, form=form,
        layout=layout, gram_schmidt=gram_schmidt, ema=ema, seed=seed, max_shard_size=max_shard_size,
    )  # fmt: skip
    return run(plan, force=force, dry_run=dry_run, progress=progress)


def plan_add_hra(
    checkpoint: Checkpoint,
    output: Path,
    *,
    rank: int | str | Sequence[int | str] = 8,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    form: str | None = None,
    layout: str = "keep",
    gram_schmidt: bool = False,
    ema: str | None = None,
    seed: int = 0,
    max_shard_size: str | None = None,
) -> Plan:
    """Plan `add_hra` from headers alone; arguments as there."""
    rank = [rank] if isinstance(rank, str) else rank
    targets = [targets] if isinstance(targets, str) else targets
    exclude = [exclude] if isinstance(exclude, str) else exclude
    check_output_name(output)
    check_choice("--as", form, ("adapter", "checkpoint"))
    check_choice("--layout", layout, ("keep", "hra-repo"))
    check_choice("--ema", ema, ("use", "keep", "drop"))
    form = form or ("checkpoint" if output.suffix == ".safetensors" else "adapter")
    if form == "adapter" and output.suffix == ".safetensors":
        raise UsageError("an adapter is a folder", hint=f"use -o {output.with_suffix('').name}, or --as checkpoint")
    repo_form = layout == "hra-repo"
    if repo_form:
        _check_hra_repo(checkpoint, form, ema, output)
    if form == "adapter":
        _check_adapter_options(ema, max_shard_size)
    if form == "checkpoint" and ema is None:
        ema = "drop" if repo_form else "keep"
    if has_hra(checkpoint):
        raise TargetError(
            f"{checkpoint.root.name} already holds a Householder adapter",
            hint=f"take it out: ortho convert {checkpoint.root.name} --to base; or fold it in: ortho merge",
        )
    refuse_adapter(checkpoint, "give the model it belongs to: ortho add-hra BASE -o OUT")
    if ema == "use":
        checkpoint = _with_ema(checkpoint)
    layers, counts = select_layers(checkpoint, rank, targets, exclude, gram_schmidt=gram_schmidt)
    if repo_form:
        check_repo_layers(layers, checkpoint)
    fingerprint = base_fingerprint(checkpoint, [layer.native for layer in layers])
    # `gram_schmidt`: how it is to be trained. `apply_GS`: how the stored columns act; with a frozen start, as they are.
    method: dict[str, object] = {
        "name": "hra", "rank": _ranks(layers), "gram_schmidt": gram_schmidt, "apply_GS": gram_schmidt and repo_form,
        "seed": seed, "start": "reflection" if gram_schmidt and repo_form else "identity",
    }  # fmt: skip
    extra = control_pieces(checkpoint, seed) if repo_form else []
    if repo_form:
        method["added"] = sorted(piece.name for piece in extra)  # what `convert --to base` takes out again
    options: dict[str, object] = {
        "rank": list(rank) if not isinstance(rank, int) else rank, "targets": list(targets or []),
        "exclude": list(exclude), "as": form, "layout": None if layout == "keep" else layout,
        "gram_schmidt": gram_schmidt, "ema": ema, "seed": seed, "max_shard_size": max_shard_size,
    }  # fmt: skip
    metadata = provenance(
        "add-hra",
        [checkpoint.source.rstrip("/")],
        options,
        method=method,
        targets=list(counts),
        fingerprint=fingerprint,
    )
    details = [_detail(layer, checkpoint, gram_schmidt and not repo_form) for layer in layers]
    plan = Plan("add-hra", [file.path for file in checkpoint.files], output, [], details=details)
    plan.layers, plan.parameters = len(layers), sum(detail["parameters"] for detail in details)
    plan.totals = {"targets": counts, "layout": checkpoint.layout, "form": form}
    plan.notes += list(checkpoint.notes)
    if form == "adapter":
        factors = {layer.canonical: _vectors_of(layer, seed, gram_schmidt) for layer in layers}
        adapter = hra_folder(factors, checkpoint, metadata)
        plan.files, plan.texts = adapter.files, adapter.texts
        plan.notes += adapter.notes
        return plan
    by_tensor = {f"{layer.native}.weight": layer for layer in layers}
    biases = {f"{layer.native}.bias": layer.native for layer in layers}
    foreign = set(foreign_names(checkpoint)) if repo_form else set()

    def transform(name: str, info: TensorInfo) -> Sequence[Piece]:
        if name.startswith("model_ema.") and ema in ("drop", "use"):
            return []
        if name in biases:
            return [copied(info, f"{biases[name]}.fixed_linear.bias")]
        if name in by_tensor:
            layer = by_tensor[name]
            vectors = _vectors_of(layer, seed, gram_schmidt, plain=repo_form)
            return [copied(info, f"{layer.native}.fixed_linear.weight"), vectors.piece(f"{layer.native}.hra_u")]
        return [] if name in foreign else [copied(info, name)]

    limit = parse_size(max_shard_size) if max_shard_size else None
    written = mirror(checkpoint, output, transform, metadata, extra=extra, max_shard_bytes=limit)
    plan.files, plan.copies, plan.texts = written.files, written.copies, written.texts
    _ema_notes(plan, checkpoint, ema)
    if repo_form:
        plan.notes.append(f"{len(extra)} tensors the authors' strict loader wants were added: control_model.*, logvar")
        strange = [name for name in foreign if not name.startswith("model_ema.")]
        if strange:
            plan.notes.append(
                f"{len(strange)} tensors the authors' loader does not know were dropped, first {min(strange)}"
            )
        if gram_schmidt:
            plan.notes.append(
                "with --hra_apply_GS the authors' trainer reflects at step 0: it does not start at the identity"
            )
    return plan


def _check_adapter_options(ema: str | None, max_shard_size: str | None) -> None:
    """Refuse what only a written checkpoint has; `--ema use` stays: it decides the base's fingerprint."""
    if max_shard_size is not None:
        raise UsageError(
            "--max-shard-size splits a checkpoint; an adapter is not split", hint="leave it out, or use --as checkpoint"
        )
    if ema in ("keep", "drop"):
        raise UsageError(
            f"--ema {ema} is about a written checkpoint; an adapter holds no EMA copy",
            hint="leave it out, or use --as checkpoint",
        )


def _check_hra_repo(checkpoint: Checkpoint, form: str, ema: str | None, output: Path) -> None:
    if form != "checkpoint" or output.suffix != ".safetensors":
        raise UsageError("--layout hra-repo writes one checkpoint file", hint="use -o NAME.safetensors")
    if ema == "keep":
        raise UsageError(
            "--layout hra-repo drops the EMA copy; its loader refuses it", hint="use --ema drop or --ema use"
        )
    if not is_sd15_ldm(checkpoint):
        raise TargetError(
            f"--layout hra-repo is for Stable Diffusion 1.5 LDM files; {checkpoint.root.name} is {checkpoint.layout}",
            hint="leave --layout out, or convert first: ortho convert CKPT --to ldm",
        )


def _with_ema(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its EMA values under the model's own names."""
    tensors = dict(checkpoint.tensors)
    swapped = 0
    for name in checkpoint.tensors:
        ema = layouts.ema_name(name) if name.startswith("model.diffusion_model.") else None
        if ema is not None and ema in tensors and tensors[ema].shape == tensors[name].shape:
            tensors[name] = tensors[ema]
            swapped += 1
    if not swapped:
        raise TargetError(
            f"--ema use: {checkpoint.root.name} has no EMA copy of its model", hint="leave --ema out, or use --ema drop"
        )
    notes = (*checkpoint.notes, f"{swapped} tensors were taken from the EMA copy")
    return replace(checkpoint, tensors=tensors, notes=notes)


def _ema_notes(plan: Plan, checkpoint: Checkpoint, ema: str | None) -> None:
    copies = sum(name.startswith("model_ema.") for name in checkpoint.tensors)
    if copies > 2 and ema != "use":  # two counters stand even in files without EMA weights
        plan.notes.append(
            f"EMA: {copies} model_ema tensors {'kept as they are' if ema == 'keep' else 'dropped'} (--ema)"
        )


def initial_vectors(width: int, rank: int, *, seed: int, name: str, gram_schmidt: bool = False) -> Tensor:
    """Start vectors ``(width, rank)`` of one layer, from the seed and the layer's canonical name."""
    import torch

    from ortho_cli.linalg.starts import orthonormal_start, paired_start

    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return (orthonormal_start if gram_schmidt else paired_start)(width, rank, generator=generator)


def _vectors_of(layer: HraLayer, seed: int, gram_schmidt: bool, *, plain: bool = False) -> Factor:
    """The columns to store: pairs; for Gram-Schmidt the frozen start and what trains, `plain` only the latter.

    Both halves of the doubled form span the same, the second in reverse: H_1 ... H_r H_r ... H_1 is the identity
    whatever storing in float32 did to the columns' angles.
    """
    doubled = gram_schmidt and not plain

    def make() -> Tensor:
        import torch

        name = layouts.fingerprint_name(layer.canonical)
        vectors = initial_vectors(layer.width, layer.rank, seed=seed, name=name, gram_schmidt=gram_schmidt)
        return torch.cat([vectors, vectors.flip(1)], dim=1) if doubled else vectors

    return Factor((layer.width, layer.rank * (2 if doubled else 1)), make)


def _detail(layer: HraLayer, checkpoint: Checkpoint, doubled: bool) -> dict[str, Any]:
    rank = layer.rank * (2 if doubled else 1)
    return {
        "name": layer.native,
        "shape": list(layer.shape),
        "dtype": checkpoint.weight(layer.native).dtype,
        "rank": rank,
        "parameters": layer.width * rank,
    }


def _ranks(layers: Sequence[HraLayer]) -> object:
    """The rank of all layers, or the rank of each."""
    ranks = {layer.rank for layer in layers}
    return ranks.pop() if len(ranks) == 1 else {layer.canonical: layer.rank for layer in layers}
