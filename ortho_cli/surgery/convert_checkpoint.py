"""Whole checkpoints into another form: LDM <-> diffusers for SD1.5, an adapter taken out again, pickle -> safetensors.

Nearly every tensor only changes its name, so these are copies of byte ranges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ortho_cli.checkpoints import layouts, sd15_configs
from ortho_cli.checkpoints.dialects.contents import ortho_method
from ortho_cli.checkpoints.factored import factored_config, factored_layers
from ortho_cli.checkpoints.store import Checkpoint, open_checkpoint
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.checkpoints.writer import Piece, copied
from ortho_cli.errors import CheckpointError, TargetError, UsageError

from .fit import input_files
from .hra_repo import has_hra, hra_layers, is_sd15_ldm, plain_names
from .ldm_buffers import CONTROL_SHAPES, TIMESTEPS, ldm_only_pieces
from .mirror import check_output_name, mirror
from .plan import OutputFile, Plan, provenance

__all__ = ["CHECKPOINT_FORMS", "plan_base", "plan_diffusers", "plan_ldm", "plan_safetensors"]

LDM_PREFIXES = {"UNet": "model.diffusion_model.", "VAE": "first_stage_model.", "text encoder": "cond_stage_model."}
CHECKPOINT_FORMS = ("ldm", "diffusers", "base", "dense", "safetensors")


def plan_base(checkpoint: Checkpoint, output: Path) -> Plan:
    """Take a Householder adapter out: names restored, reflections dropped, every other byte as it was read.

    Raises:
        CheckpointError: the checkpoint holds none, or reflections without their weight.
    """
    if not has_hra(checkpoint):
        raise CheckpointError(
            f"{checkpoint.root.name} holds no Householder adapter to take out", hint="ortho inspect shows what it holds"
        )
    added, plain = _added(checkpoint), plain_names(checkpoint)

    def transform(name: str, info: TensorInfo) -> Sequence[Piece]:
        if name.endswith(".hra_u") or name in added:
            return []
        return [copied(info, plain.get(name, name))]

    plan = _mirrored("base", checkpoint, output, transform)
    plan.layers = len(hra_layers(checkpoint))
    plan.notes.append(f"{plan.layers} adapters were taken out; the weights are byte for byte what they sat on")
    if added:
        plan.notes.append(f"{len(added)} tensors of the authors' trainer (control_model.*, logvar) were dropped")
    return plan


def _added(checkpoint: Checkpoint) -> set[str]:
    """What `add-hra` put beside the reflections, as it wrote down; in the authors' own files what their trainer adds.

    Raises:
        CheckpointError: the list names anything that `add-hra` never adds.
    """
    method = ortho_method(checkpoint.metadata, str(checkpoint.root))
    known = {**CONTROL_SHAPES, "logvar": (TIMESTEPS,)}
    if not method:
        tensors = checkpoint.tensors
        theirs = all(name in tensors and tensors[name].shape == shape for name, shape in known.items())
        return set(known) if theirs else set()
    added = method.get("added", [])
    possible = {*known, *layouts.LDM_ONLY}
    if not isinstance(added, list) or not all(isinstance(name, str) and name in possible for name in added):
        raise CheckpointError("ortho.method lists tensors that add-hra never adds", where=str(checkpoint.root))
    return set(added) & set(checkpoint.tensors)


def plan_safetensors(checkpoint: Checkpoint, output: Path) -> Plan:
    """The same tensors under the same names, as safetensors."""
    return _mirrored("safetensors", checkpoint, output, lambda name, info: [copied(info, name)])


def _mirrored(form: str, checkpoint: Checkpoint, output: Path, transform: object) -> Plan:
    assert callable(transform)
    kept = () if form == "base" else ("ortho.method", "ortho.targets", "ortho.base_fingerprint")
    own = {key: text for key, text in checkpoint.metadata.items() if key in kept}  # how its reflections act
    factored = factored_layers(checkpoint) if form == "safetensors" and output.suffix == ".safetensors" else {}
    if factored:  # a single file has no ortho_config.json beside it
        own["ortho.method"] = json.dumps(
            factored_config({name: (layer.view, layer.rank) for name, layer in factored.items()}), sort_keys=True
        )
    metadata = {**own, **provenance("convert", [checkpoint.source.rstrip("/")], {"to": form})}
    written = mirror(checkpoint, output, transform, metadata)
    plan = Plan("convert", input_files(checkpoint), output, written.files, copies=written.copies, texts=written.texts)
    plan.notes = list(checkpoint.notes)
    plan.totals = {"from": checkpoint.layout, "to": form, "tensors": sum(len(file.pieces) for file in written.files)}
    return plan


def plan_diffusers(checkpoint: Checkpoint, output: Path, base: str | None = None) -> Plan:
    """An SD1.5 LDM file as a diffusers folder.

    Args:
        checkpoint: the LDM file.
        output: a folder.
        base: a diffusers folder or hub id to take tokenizer, scheduler and feature extractor from; a folder's own
            `config.json` files too, where it has them.

    Raises:
        TargetError: not an SD1.5 LDM file, or of other sizes than SD1.5's and no configuration is given.
        UsageError: the output is named like a file.
    """
    if not is_sd15_ldm(checkpoint):
        raise TargetError(f"{checkpoint.root.name} is {checkpoint.layout}, not an SD1.5 LDM file")
    if has_hra(checkpoint):
        raise TargetError(
            f"{checkpoint.root.name} holds a Householder adapter, which diffusers has no place for",
            hint="fold it in (ortho merge) or take it out (ortho convert --to base) first",
        )
    check_output_name(output)
    if output.suffix == ".safetensors":
        raise UsageError("a diffusers checkpoint is a folder", hint=f"use -o {output.with_suffix('').name}")
    groups: dict[str, list[Piece]] = {}
    dropped = []
    for name, info in checkpoint.tensors.items():
        canonical = layouts.ldm_to_canonical(name)
        if canonical is None:
            dropped.append(name)
            continue
        component, _, local = canonical.partition(".")
        groups.setdefault(component, []).append(copied(info, local, layouts.canonical_shape(canonical, info.shape)))
    metadata = {"format": "pt", **provenance("convert", [checkpoint.source], {"to": "diffusers"})}
    files = [
        OutputFile(f"{component}/{sd15_configs.WEIGHT_NAMES[component]}", pieces, metadata)
        for component, pieces in groups.items()
    ]
    plan = Plan("convert", input_files(checkpoint), output, files)
    _pipeline_files(plan, groups, base)
    unknown = [name for name in dropped if name not in layouts.LDM_ONLY and not name.startswith("model_ema.")]
    plan.notes = [*checkpoint.notes, *plan.notes, *_dropped_notes(dropped, unknown)]
    plan.totals = {
        "from": "sd15-ldm",
        "to": "diffusers",
        "tensors": sum(map(len, groups.values())),
        "dropped": len(dropped),
    }
    return plan


def _dropped_notes(dropped: Sequence[str], unknown: Sequence[str]) -> list[str]:
    known = [name for name in dropped if name not in unknown]
    notes = [f"{len(known)} tensors that only LDM files have were dropped: {_some(known)}"] if known else []
    if unknown:
        notes.append(f"{len(unknown)} tensors have no diffusers name and were dropped: {_some(unknown)}")
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:15]) + (", ..." if len(names) > 15 else "")


def _pipeline_files(plan: Plan, groups: Mapping[str, Sequence[Piece]], base: str | None) -> None:
    """Configurations from a base folder, else from the tables; tokenizer and scheduler from the folder or the cache."""
    source = sd15_configs.companion_folder(base)
    for component, pieces in groups.items():
        shapes = {piece.name: piece.shape for piece in pieces}
        config = sd15_configs.component_config(component, shapes, source if base is not None else None)
        plan.texts[f"{component}/config.json"] = json.dumps(config, indent=2) + "\n"
    found: dict[str, None] = {}
    for folder in sd15_configs.COMPANIONS if source is not None else ():
        for path in sorted(source.joinpath(folder).glob("*")) if source is not None else ():
            if path.is_file():
                plan.copies.append((path, f"{folder}/{path.name}"))
                found[folder] = None
    plan.inputs += [path for path, _ in plan.copies]
    if "scheduler" not in found:
        plan.texts["scheduler/scheduler_config.json"] = json.dumps(sd15_configs.SCHEDULER, indent=2) + "\n"
    if "tokenizer" not in found:
        plan.notes.append(
            "the tokenizer is missing (an LDM file does not hold it): give a folder or hub id that has it, "
            "--base stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    absent = [component for component in sd15_configs.WEIGHT_NAMES if component not in groups]
    if absent:
        plan.notes.append(f"the file holds no {' and no '.join(absent)}: a pipeline needs them from elsewhere")
    index = sd15_configs.model_index([*groups, *found, "scheduler"], source if found else None)
    plan.texts["model_index.json"] = json.dumps(index, indent=2) + "\n"


def plan_ldm(checkpoint: Checkpoint, output: Path) -> Plan:
    """SD1.5 as one LDM file; the 15 tensors that only LDM files have are made anew where they are missing.

    Raises:
        TargetError: not SD1.5.
        UsageError: the output is not one file.
    """
    check_output_name(output)
    if output.suffix != ".safetensors":
        raise UsageError("an LDM checkpoint is one file", hint=f"use -o {output.name}.safetensors")
    if is_sd15_ldm(checkpoint):
        return _mirrored("ldm", checkpoint, output, lambda name, info: [copied(info, name)])
    if not checkpoint.layout.startswith("sd15"):
        raise TargetError(f"{checkpoint.root.name} is {checkpoint.layout}, not Stable Diffusion 1.5")
    pieces, dropped = [], []
    for name, info in checkpoint.tensors.items():
        canonical = layouts.to_canonical(name, checkpoint.layout)
        ldm = layouts.canonical_to_ldm(canonical)
        if ldm is None and name.endswith("position_ids"):
            ldm = next(key for key in layouts.LDM_ONLY if key.endswith("position_ids"))
        if ldm is None:
            dropped.append(name)
            continue
        pieces.append(copied(info, ldm, layouts.ldm_shape(canonical, info.shape)))
    have = {piece.name for piece in pieces}
    absent = [component for component, prefix in LDM_PREFIXES.items() if not any(x.startswith(prefix) for x in have)]
    without = tuple(LDM_PREFIXES[component] for component in absent)
    made = ldm_only_pieces(x for x in layouts.LDM_ONLY if x not in have and not x.startswith(without))
    metadata = {"format": "pt", **provenance("convert", [checkpoint.source.rstrip("/")], {"to": "ldm"})}
    plan = Plan("convert", input_files(checkpoint), output, [OutputFile("", [*pieces, *made], metadata)])
    plan.notes = [
        *checkpoint.notes,
        f"{len(made)} tensors that only LDM files have were made anew (noise schedule, counters)",
    ]
    if dropped:
        plan.notes.append(f"{len(dropped)} tensors have no LDM name and were dropped: {_some(dropped)}")
    if absent:
        plan.notes.append(f"{' and '.join(absent)} missing: this is a part of an LDM file")
    plan.totals = {"from": checkpoint.layout, "to": "ldm", "tensors": len(pieces) + len(made), "dropped": len(dropped)}
    return plan


def open_base(base: str | None) -> Checkpoint | None:
    """The base of a conversion, where one was named."""
    return open_checkpoint(base) if base is not None else None
