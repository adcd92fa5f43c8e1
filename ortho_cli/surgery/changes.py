"""What adapters change in a base: for each tensor the steps, in the order they act, or in reverse to undo them.

Names are resolved, shapes and the base's fingerprint checked, strengths shared out; no value is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ortho_cli.checkpoints import layouts
from ortho_cli.checkpoints.adapters import Adapter
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.errors import TargetError

from .fit import check_base, check_floats, check_tensors
from .fold import AddTo, Operate, Replace, ReplaceRows, Step
from .strengths import Strengths

__all__ = ["Changes", "changes_of", "reversals_of", "taken_whole"]


@dataclass
class Changes:
    """Native tensor name -> its steps; tensors the base lacks; what the report should say, strengths among it."""

    steps: dict[str, list[Step]] = field(default_factory=dict)
    new: dict[str, TensorInfo] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    strengths: list[tuple[float, float]] = field(default_factory=list)  # of each adapter: the least and the largest

    def resized(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that were replaced so far."""
        replaced = {name: steps[0] for name, steps in self.steps.items()}  # a replacement is always the first step
        return {name: step.value.shape for name, step in replaced.items() if isinstance(step, Replace)}

    def push(self, name: str, step: Step) -> None:
        """Add a step; one of strength 0 is none."""
        if step.strength != 0:
            self.steps.setdefault(name, []).append(step)


@dataclass(frozen=True)
class _Resolved:
    """An adapter whose names were found in the base, and its strength on each of them."""

    adapter: Adapter
    native: dict[str, str]  # its layers -> the base's
    names: dict[str, str]  # whole tensors it brings -> the base's, for those the base has
    strength: dict[str, float]  # layers of the base, and modules of its tensors


def changes_of(base: Checkpoint, adapters: Sequence[Adapter], strengths: Strengths, *, force_base: bool) -> Changes:
    """Resolve every adapter's names in the base, check shapes and fingerprints, and line the steps up.

    Raises:
        CheckpointError: a layer that is not in the base, or does not fit; an adapter that is bound to another base.
        TargetError: a pattern of strengths that matches nothing; a resized tensor that should be taken in part.
    """
    changes = Changes()
    for found in _resolved(base, adapters, strengths):
        adapter, names = found.adapter, found.names
        changes.notes += adapter.notes
        resized = changes.resized()
        check_base(base, adapter, found.native, force_base, changes.notes.append, resized)
        check_tensors(base, adapter, names, resized)
        changes.strengths.append((min(found.strength.values(), default=1.0), max(found.strength.values(), default=1.0)))
        for name, info in adapter.replacements.items():
            if name in names:
                _replace(changes, names[name], base.tensors[names[name]], info, found.strength[_module(names[name])])
            elif changes.strengths[-1] != (0.0, 0.0):
                changes.new[name] = info
                changes.notes.append(f"{name} is not in the base and was added from the adapter")
        for name, (rows, info) in adapter.row_replacements.items():
            changes.push(names[name], ReplaceRows(rows, info, found.strength[_module(names[name])]))
        for layer, native in found.native.items():
            changes.push(base.weight(native).name, Operate(adapter, layer, found.strength[native]))
        for name, addition in adapter.additions.items():
            changes.push(names[name], AddTo(addition, found.strength[_module(names[name])]))
    for name, steps in changes.steps.items():
        if taken_whole(base.tensors[name], steps) is None:
            check_floats(base.tensors[name], [value for step in steps if (value := step.brings) is not None])
    return changes


def reversals_of(merged: Checkpoint, adapters: Sequence[Adapter], strengths: Strengths) -> Changes:
    """The steps that undo adapters in a checkpoint they were merged into, last one first.

    Raises:
        CheckpointError: a layer that is not in the checkpoint, or does not fit.
        TargetError: an adapter that left nothing to go back to.
    """
    for adapter in adapters:
        _check_reversible(adapter)
    changes = changes_of(merged, adapters, strengths, force_base=True)
    turned = {name: [_turned(step) for step in reversed(steps)] for name, steps in changes.steps.items()}
    notes = [note for adapter in adapters for note in adapter.notes]
    return Changes(turned, {}, notes, changes.strengths)


def taken_whole(info: TensorInfo, steps: Sequence[Step]) -> TensorInfo | None:
    """The tensor that takes the base's place byte for byte; None where anything is to be computed."""
    step = steps[0]
    whole = isinstance(step, Replace) and step.value.dtype == info.dtype and step.strength == 1 and len(steps) == 1
    return step.value if whole and isinstance(step, Replace) else None


def _resolved(base: Checkpoint, adapters: Sequence[Adapter], strengths: Strengths) -> list[_Resolved]:
    index = layouts.LayerIndex(base.layers(), base.layout)
    native = [index.resolve_all(list(adapter.layers)) for adapter in adapters]
    names = [_tensor_names(base, adapter) for adapter in adapters]
    touched = [
        {layer: base.weight(layer).shape for layer in layers.values()}
        | {_module(name): base.tensors[name].shape for name in tensors.values()}
        for layers, tensors in zip(native, names, strict=True)
    ]
    everything = {layer: shape for part in touched for layer, shape in part.items()}
    given = strengths.by_layer(everything, base.layout)
    return [
        _Resolved(adapter, native[i], names[i], {layer: strengths.of(i) * given[layer] for layer in touched[i]})
        for i, adapter in enumerate(adapters)
    ]


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0].removesuffix(".fixed_linear")


def _replace(changes: Changes, name: str, info: TensorInfo, value: TensorInfo, strength: float) -> None:
    if strength == 0:
        return
    if strength != 1 and value.shape != changes.resized().get(name, info.shape):
        raise TargetError(
            f"the adapter resizes {name} from {info.shape} to {value.shape}: there is nothing at strength {strength:g}",
            hint=f"leave it whole: --strength '{_module(name)}=1'",
        )
    if strength == 1 and changes.steps.pop(name, []):  # nothing of them would be left
        changes.notes.append(f"{name}: a later adapter replaces what earlier ones made of it")
    changes.push(name, Replace(value, strength))


def _turned(step: Step) -> Step:
    assert isinstance(step, (Operate, AddTo)), "whole tensors have no way back"
    return replace(step, undo=True)


def _check_reversible(adapter: Adapter) -> None:
    """Refuse what a header already says is no way back from."""
    lost = [*adapter.replacements, *adapter.row_replacements]
    reason = f"the adapter replaced {lost[0]}, whose values are nowhere in it" if lost else None
    for name, layer in adapter.layers.items():
        if layer.options.get("dora"):
            reason = f"layer {name} is DoRA, which replaced the norms of the base"
        elif layer.options.get("eps"):
            reason = f"layer {name} reflects softly (eps > 0), which is no rotation"
    if reason is not None:
        raise TargetError(
            f"{adapter.path.name} has no inverse: {reason}",
            hint="keep the base, or merge with --keep-undo FILE; then: ortho unmerge MERGED --undo FILE -o BASE",
            where=str(adapter.path),
        )


def _tensor_names(base: Checkpoint, adapter: Adapter) -> dict[str, str]:
    """Names of whole tensors an adapter brings -> names in the base, for those the base has."""
    modules = dict.fromkeys(_module(name) for name in base.tensors)
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
