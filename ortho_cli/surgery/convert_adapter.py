"""Adapters from one dialect to another: names through the tables, factors through the operators.

A Householder adapter is exactly a LoRA of rank r on its own base: ``A = V^T``, ``B = -W V T``; at a strength, it is
another Householder adapter. Nothing is approximated here; what has no exact form in the other dialect is refused with
the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ortho_cli.checkpoints import layouts
from ortho_cli.checkpoints.adapters import Adapter, base_bound
from ortho_cli.checkpoints.dialects.diffusers_lora import COMPONENTS
from ortho_cli.checkpoints.dialects.hra_repo import RAW_VECTORS
from ortho_cli.checkpoints.dialects.kinds import dimensions
from ortho_cli.checkpoints.dialects.writing import diffusers_metadata, kohya_metadata, lora_tensor_names, peft_name
from ortho_cli.checkpoints.fingerprint import base_fingerprint
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.checkpoints.writer import Piece
from ortho_cli.errors import CheckpointError, TargetError, UsageError

from .adapter_factors import NamedLayer, is_span, lora_factors, reflection_factor, with_strengths
from .adapter_folder import AdapterFiles, Factor, by_component, hra_folder, lora_configs, lora_folder
from .fit import check_base, input_files
from .plan import OutputFile, Plan, provenance

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ADAPTER_DIALECTS",
    "method_at",
    "named_layers",
    "plan_convert_adapter",
    "refuse_leftovers",
    "without_hint_encoder",
]

ADAPTER_DIALECTS = ("peft-hra", "peft-lora", "kohya-lora", "diffusers-lora")
SPAN_KEYS = ("gram_schmidt", "start", "apply_GS")  # of `ortho.method`, about the Gram-Schmidt variant
HINT_ENCODER = "control_model."  # how names of what listens to a hint begin, in adapters and in LDM files
LORA_KINDS = ("hra", "lora", "loha", "lokr")


def plan_convert_adapter(
    adapter: Adapter,
    output: Path,
    to: str,
    base: Checkpoint | None,
    *,
    strength: Sequence[str] = (),
    force_base: bool = False,
) -> Plan:
    """Plan the conversion of an adapter to another dialect, or another strength.

    Args:
        adapter: any readable adapter.
        output: a folder for PEFT, ``X.safetensors`` for kohya, either for diffusers.
        to: one of `ADAPTER_DIALECTS`.
        base: needed where values of the weights enter (HRA to LoRA); otherwise only its names are used.
        strength: as for `merge`; of a Householder adapter the power, again of its rank.
        force_base: convert although the fingerprint says another base.

    Raises:
        TargetError: the adapter has no exact form in `to`.
        UsageError: a base is needed and was not given, or the output's name does not suit the dialect.
    """
    _check_output(output, to)
    _check_kinds(adapter, to)
    adapter = without_hint_encoder(adapter)
    notes = list(adapter.notes)
    layers = with_strengths(named_layers(adapter, base, notes.append, force_base=force_base), base, strength)
    refuse_leftovers(adapter, to)
    native = [
        layer.weight.name.removesuffix(".weight").removesuffix(".fixed_linear") for layer in layers if layer.weight
    ]
    metadata = _metadata(adapter, to, base, base_fingerprint(base, native) if base is not None else None, strength)
    files = _written(adapter, layers, to, base, metadata, output)
    plan = Plan("convert", input_files(base, [adapter]), output, files.files)
    plan.texts, plan.notes = files.texts, notes + files.notes
    plan.layers = len(layers)
    plan.parameters = sum(piece.nbytes // 4 for file in files.files for piece in file.pieces if piece.shape)
    plan.details = [
        {
            "name": layer.canonical,
            "shape": list(layer.weight.shape) if layer.weight else list(dimensions(layer.layer)),
            "dtype": "F32",
            "kind": layer.layer.kind,
            "rank": layer.layer.rank,
            "parameters": layer.layer.parameters,
            **({"strength": layer.strength} if strength else {}),
        }
        for layer in layers
    ]
    plan.totals = {"from": f"{adapter.dialect} ({adapter.kind})", "to": to}
    return plan


def _check_output(output: Path, to: str) -> None:
    if to.startswith("peft") and output.suffix == ".safetensors":
        raise UsageError("a PEFT adapter is a folder", hint=f"use -o {output.with_suffix('').name}")
    if to == "kohya-lora" and output.suffix != ".safetensors":
        raise UsageError("a kohya LoRA is one file", hint=f"use -o {output.name}.safetensors")


def _check_kinds(adapter: Adapter, to: str) -> None:
    """Refuse what has no exact counterpart."""
    for name, layer in adapter.layers.items():
        if to == "peft-hra" and layer.kind != "hra":
            raise TargetError(
                f"layer {name} is {layer.kind}: not a product of reflections, so there is no exact HRA form",
                hint="to peft-lora, kohya-lora or diffusers-lora it converts exactly",
            )
        if layer.options.get("dora"):
            raise TargetError(
                f"layer {name} is DoRA: its magnitudes depend on the base and have no LoRA form",
                hint="merge it instead: ortho merge BASE ADAPTER -o OUT",
            )
        if to != "peft-hra" and layer.kind not in LORA_KINDS:
            raise TargetError(
                f"layer {name} is {layer.kind}: a rotation of full rank has no exact LoRA form",
                hint="merge it instead: ortho merge BASE ADAPTER -o OUT",
            )
        if layer.options.get("transposed"):
            raise TargetError(
                f"layer {name} acts on a transposed weight (fan_in_fan_out), which no other dialect knows",
                hint="merge it instead: ortho merge BASE ADAPTER -o OUT",
            )
        if to == "peft-hra" and (layer.options.get("side") == "output" or layer.options.get("eps")):
            raise TargetError(
                f"layer {name} reflects the output side, or softly (eps > 0); PEFT's HRA does neither",
                hint="its exact form is a LoRA on its base: --to peft-lora --base BASE",
            )


def without_hint_encoder(adapter: Adapter) -> Adapter:
    """An adapter for controllable generation as what it does to the UNet alone, which a note says."""
    kept = {name: info for name, info in adapter.replacements.items() if not name.startswith(HINT_ENCODER)}
    if len(kept) == len(adapter.replacements):
        return adapter
    holders = f"{adapter.path.name} holds it, and merged LDM files of LDM bases"
    note = f"the hint encoder ({HINT_ENCODER}*) is left out: {holders}"
    return replace(adapter, replacements=kept, notes=(*adapter.notes, note))


def refuse_leftovers(adapter: Adapter, to: str) -> None:
    """Refuse an adapter that brings whole tensors, which no other dialect has a place for.

    Raises:
        CheckpointError: how many, and the first.
    """
    left = [*adapter.replacements, *adapter.row_replacements, *adapter.additions]
    if left:
        raise CheckpointError(
            f"{len(left)} whole tensors of the adapter (first {left[0]}) have no place in {to}",
            hint="merge it instead: ortho merge BASE ADAPTER -o OUT",
            where=str(adapter.path),
        )


def named_layers(
    adapter: Adapter, base: Checkpoint | None, note: Callable[[str], None], *, force_base: bool = False
) -> list[NamedLayer]:
    """The adapter's layers under canonical names: resolved in the base, else in the SD1.5 tables, else as they are.

    Names that transformers gives in memory stay: it is by them that PEFT finds its layers.
    """
    if base is not None:
        index = layouts.LayerIndex(base.layers(), base.layout)
        native = index.resolve_all(list(adapter.layers))
        check_base(base, adapter, native, force_base, note)
        called = {name: index.canonical(native[name]) for name in adapter.layers}
        called |= {name: name for name in called if layouts.filed_name(name) == called[name]}
        return [
            NamedLayer(name, called[name], layer, base.weight(native[name])) for name, layer in adapter.layers.items()
        ]
    table = layouts.LayerIndex(layouts.sd15_layers(), "sd15-diffusers")
    found = {name: table.resolve(name) for name in adapter.layers}
    if all(found.values()):
        return [NamedLayer(name, found[name] or name, layer, None) for name, layer in adapter.layers.items()]
    return [NamedLayer(name, name, layer, None) for name, layer in adapter.layers.items()]


def method_at(adapter: Adapter, strength: Sequence[str]) -> dict[str, object]:
    """What `ortho.method` says of an adapter, and still holds of its power."""
    # A power of a Gram-Schmidt adapter is a plain chain, without a frozen start.
    return {key: value for key, value in adapter.method.items() if not (strength and key in SPAN_KEYS)}


def _metadata(
    adapter: Adapter, to: str, base: Checkpoint | None, fingerprint: str | None, strength: Sequence[str]
) -> dict[str, str]:
    method = method_at(adapter, strength) or {"name": adapter.kind}
    method.pop("added", None)  # said of the checkpoint the adapter was in
    recorded = adapter.metadata.get("ortho.base_fingerprint")
    if to != "peft-hra" and "hra" in adapter.kind:
        method |= {"name": "hra", "form": "lora", "base_bound": True}
    elif base_bound(adapter):
        method["base_bound"] = True
    inputs = [adapter.source.rstrip("/")]
    named_base = Path(base.source.rstrip("/")) if base is not None else None
    options: dict[str, object] = {"to": to, "base": named_base, "strength": list(strength)}
    return provenance("convert", inputs, options, method=method, fingerprint=fingerprint or recorded)


def _written(
    adapter: Adapter,
    layers: list[NamedLayer],
    to: str,
    base: Checkpoint | None,
    metadata: dict[str, str],
    output: Path,
) -> AdapterFiles:
    if to == "peft-hra":
        gram_schmidt = {is_span(layer) for layer in layers}
        if len(gram_schmidt) > 1:
            raise TargetError("some layers are Gram-Schmidt and some are not; PEFT has one setting for all")
        vectors = {layer.canonical: reflection_factor(adapter, layer) for layer in layers}
        return hra_folder(vectors, base, metadata, gram_schmidt=gram_schmidt.pop())
    factors = {layer.canonical: lora_factors(adapter, layer) for layer in layers}
    if to == "peft-lora":
        folder = lora_folder(factors, base, metadata)
        folder.files += _raw_vectors(adapter, layers, metadata)
        return folder
    strange = [name for name in factors if layouts.component_name(name)[0] not in COMPONENTS]
    if to == "diffusers-lora" and strange:
        raise TargetError(
            f"layer {strange[0]} is in no component for which diffusers loads a LoRA ({', '.join(COMPONENTS)})",
            hint="write another format, e.g. --to peft-lora",
        )
    pieces = _lora_pieces(to, factors)
    ranks = {name: down.shape[0] for name, (_, down) in factors.items()}
    if to == "kohya-lora":
        common = next(iter(ranks.values())) if len(set(ranks.values())) == 1 else None
        extra = kohya_metadata(common, common)
    else:
        extra = diffusers_metadata(lora_configs(ranks, base))
    name = "pytorch_lora_weights.safetensors" if output.suffix != ".safetensors" else ""
    return AdapterFiles([OutputFile(name, pieces, {"format": "pt", **extra, **metadata})])


def _raw_vectors(adapter: Adapter, layers: list[NamedLayer], metadata: dict[str, str]) -> list[OutputFile]:
    """The vectors beside a LoRA export, where PEFT's HRA cannot hold them: ortho resumes from these."""
    found = {(layer.layer.options.get("side", "input"), layer.layer.options.get("eps", 0.0)) for layer in layers}
    if any(layer.layer.kind != "hra" for layer in layers) or len(found) > 1 or found == {("input", 0.0)}:
        return []
    side, eps = found.pop()
    apply_gs = any(is_span(layer) for layer in layers)
    method = json.dumps({"name": "hra", "side": side, "eps": eps, "apply_GS": apply_gs}, sort_keys=True)
    named = {layer.canonical: layer for layer in layers}
    files = []
    for component, group in by_component(named).items():
        pieces = [reflection_factor(adapter, named[name]).piece(f"{peft_name(name)}.hra_u") for name in group]
        relative = f"{component}/{RAW_VECTORS}" if component else RAW_VECTORS
        files.append(OutputFile(relative, pieces, {"format": "pt", **metadata, "ortho.method": method}))
    return files


def _lora_pieces(to: str, factors: Mapping[str, tuple[Factor, Factor]]) -> list[Piece]:
    pieces = []
    for canonical, (up, down) in factors.items():
        names = lora_tensor_names(to, canonical)
        pieces += [up.piece(names["up"]), down.piece(names["down"])]
        if "alpha" in names:
            pieces.append(Factor((), partial(_scalar, down.shape[0])).piece(names["alpha"]))
    return pieces


def _scalar(value: int) -> Tensor:
    import torch

    return torch.tensor(float(value))
