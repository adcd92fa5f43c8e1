"""A Householder adapter and its base as one checkpoint in the form of the HRA authors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ortho_cli.checkpoints import layouts
from ortho_cli.checkpoints.adapters import read_adapter
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.errors import TargetError, UsageError

from .adapter_factors import NamedLayer, is_span, reflection_factor, with_strengths
from .add_hra import plan_add_hra
from .convert_adapter import method_at, named_layers, refuse_leftovers
from .fit import input_files
from .plan import OutputFile, Plan, provenance

__all__ = ["plan_hra_repo"]


def plan_hra_repo(source: Path, output: Path, base: Checkpoint | None, strength: Sequence[str] = ()) -> Plan:
    """A Householder adapter and its base as the HRA authors' strict loader wants them, on all 144 layers.

    Layers the adapter leaves alone get column pairs that cancel, so that the set is complete.

    Raises:
        UsageError: no base.
        TargetError: an adapter of another kind, on other layers, or of several ranks.
        CheckpointError: the adapter brings whole tensors, or does not fit the base.
    """
    if base is None:
        raise UsageError("--to hra-repo writes a whole checkpoint", hint="add --base V1-5-FILE")
    adapter = read_adapter(source)
    notes = list(adapter.notes)
    layers = with_strengths(named_layers(adapter, base, notes.append), base, strength)
    refuse_leftovers(adapter, "the authors' checkpoint")
    rank, apply_gs = _repo_method(layers)
    plan = plan_add_hra(base, output, rank=rank, layout="hra-repo")
    if apply_gs and len(layers) < plan.layers:
        raise TargetError(
            f"a Gram-Schmidt adapter on {len(layers)} of the {plan.layers} layers has no such form: "
            "with --hra_apply_GS the authors' code would reflect the other layers too"
        )
    index = layouts.LayerIndex(base.layers(), base.layout)
    given = {f"{index.resolve(layer.canonical)}.hra_u": reflection_factor(adapter, layer) for layer in layers}
    strangers = given.keys() - {piece.name for file in plan.files for piece in file.pieces}
    if strangers:
        raise TargetError(f"the authors' loader has no place for an adapter on {sorted(strangers)[0]}")
    added = json.loads(plan.files[0].metadata["ortho.method"])["added"]
    metadata = provenance(
        "convert",
        [adapter.source.rstrip("/")],
        {"to": "hra-repo", "base": Path(base.source.rstrip("/")), "strength": list(strength)},
        method={"name": "hra", **method_at(adapter, strength), "rank": rank, "apply_GS": apply_gs, "added": added},
    )
    plan.files = [
        OutputFile(
            file.relative,
            [given[piece.name].piece(piece.name) if piece.name in given else piece for piece in file.pieces],
            {**file.metadata, **metadata},
        )
        for file in plan.files
    ]
    plan.command, plan.inputs = "convert", input_files(base, [adapter])
    plan.notes += notes
    if len(given) < plan.layers:
        plan.notes.append(f"{plan.layers - len(given)} layers without an adapter got column pairs that cancel")
    return plan


def _repo_method(layers: Sequence[NamedLayer]) -> tuple[int, bool]:
    """Rank and `apply_GS` of an adapter, which the authors' code has once for all layers."""
    for layer in layers:
        options = layer.layer.options
        if layer.layer.kind != "hra" or options.get("side") == "output" or options.get("eps"):
            kind = layer.layer.kind if layer.layer.kind != "hra" else "reflected on the output side, or softly"
            raise TargetError(
                f"the authors' loader takes Householder adapters of the input side; {layer.name} is {kind}"
            )
    ranks = sorted({layer.layer.rank or 0 for layer in layers})
    if len(ranks) > 1 or ranks[0] % 2:
        raise TargetError(f"the authors' loader takes one even rank for all layers; found {', '.join(map(str, ranks))}")
    apply_gs = {is_span(layer) for layer in layers}
    if len(apply_gs) > 1:
        raise TargetError("some layers are Gram-Schmidt and some are not; the authors' code has one setting for all")
    return ranks[0], apply_gs.pop()
