"""Choosing layers: by glob or preset, with a value for each, and as the suffixes PEFT would choose them by.

Patterns (`globs.py`) are tried on the checkpoint's own layer names and on the canonical ones, so that a file in LDM
naming takes patterns in diffusers naming. A pattern that chooses nothing is an error, never an empty selection.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from ortho_cli.errors import TargetError, UsageError

from .globs import ROOT, compile_glob
from .layouts import to_canonical
from .presets import PRESETS, Preset, default_preset, preset_scope

__all__ = ["PRESETS", "Preset", "Selection", "default_preset", "per_layer", "select", "suffixes"]

Layers = Mapping[str, tuple[int, ...]]  # native layer name -> weight shape
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen layers in file order, and how many each pattern chose (overlaps count for each)."""

    layers: tuple[str, ...]
    counts: dict[str, int]


def select(patterns: Sequence[str], layers: Layers, layout: str, exclude: Sequence[str] = ()) -> Selection:
    """Choose layers by patterns.

    Args:
        patterns: globs over layer names, or names of presets; the union counts.
        layers: native layer name -> weight shape, in file order.
        layout: the naming of `layers`.
        exclude: patterns of layers to leave out.

    Returns:
        The selection, in the order of `layers`.

    Raises:
        TargetError: a pattern, to choose or to leave out, that matches nothing, or whose layers are all left out.
        UsageError: a pattern that is no glob.

    Cost: microseconds per name and pattern, whatever the pattern.

    >>> select(["attn1.*"], {"unet.attn1.to_q": (8, 8), "unet.attn2.to_q": (8, 8)}, "plain").layers
    ('unet.attn1.to_q',)
    """
    out = {layer for pattern in exclude for layer in _matched(pattern, layers, layout)}
    chosen: set[str] = set()
    counts = {}
    for pattern in patterns:
        matched = _matched(pattern, layers, layout)
        kept = [layer for layer in matched if layer not in out]
        if not kept:
            raise TargetError(
                f"pattern {pattern!r} matched {len(matched)} of {len(layers)} layers, all of them excluded",
                hint="leave out the pattern or the exclusion",
            )
        counts[pattern] = len(kept)
        chosen.update(kept)
    return Selection(tuple(layer for layer in layers if layer in chosen), counts)


@overload
def per_layer(values: Sequence[str], layers: Layers, layout: str) -> dict[str, int]: ...


@overload
def per_layer(values: Sequence[str], layers: Layers, layout: str, parse: Callable[[str], T]) -> dict[str, T]: ...


def per_layer(values: Sequence[str], layers: Layers, layout: str, parse: Callable[[str], Any] = int) -> dict[str, Any]:
    """Read an option that may differ by layer, such as `--rank 8 --rank '**.attn2.**=16'`.

    Args:
        values: each a value for all layers, or `PATTERN=VALUE`; of several that fit a layer the last one counts.
        layers: native layer name -> weight shape.
        layout: the naming of `layers`.
        parse: turns the text of a value into the value, or raises ValueError.

    Returns:
        Layer -> value, for the layers that any value fits.

    Raises:
        UsageError: a value that `parse` refuses.
        TargetError: a pattern that matches none of `layers`.

    >>> per_layer(["8", "*_b=4"], {"net.lin_a": (8, 8), "net.lin_b": (8, 8)}, "plain")
    {'net.lin_a': 8, 'net.lin_b': 4}
    """
    result: dict[str, Any] = {}
    for given in values:
        pattern, equals, text = given.rpartition("=")
        try:
            value = parse(text)
        except ValueError:
            kind = "a whole number" if parse is int else "a number" if parse is float else "a value this option takes"
            raise UsageError(
                f"{text!r} in {given!r} is not {kind}" if equals else f"{text!r} is not {kind}",
                hint="write VALUE for all layers, or 'PATTERN=VALUE' for some",
            ) from None
        result.update(dict.fromkeys(_matched(pattern, layers, layout) if equals else layers, value))
    return {layer: result[layer] for layer in layers if layer in result}


def _matched(pattern: str, layers: Layers, layout: str) -> list[str]:
    """The layers that a glob or preset means; at least one."""
    preset = PRESETS.get(pattern)
    if preset is None:
        matched = _globbed(pattern, layers, layout)
        if not matched:
            raise TargetError(
                f"pattern {pattern!r} matched 0 of {len(layers)} layers", hint=_hint(pattern, layers, layout)
            )
        return matched
    found: set[str] = set()
    scope = [layer for layer in preset_scope(layers, layout) if not preset.matrices_only or len(layers[layer]) == 2]
    for part in preset.patterns:
        matched = _globbed(part, scope, layout)
        if not matched:
            own = default_preset(layers, layout)
            raise TargetError(
                f"preset {pattern!r} does not fit this checkpoint: {part!r} matched 0 of {len(layers)} layers",
                hint=(f"use --targets {own}, or " if own else "give patterns; ") + _LIST,
            )
        found.update(matched)
    for part in preset.exclude:
        found.difference_update(_globbed(part, scope, layout))
    if not found:
        raise TargetError(f"preset {pattern!r} matched 0 of {len(layers)} layers", hint=_LIST)
    return [layer for layer in layers if layer in found]


def _globbed(pattern: str, layers: Collection[str], layout: str) -> list[str]:
    glob = compile_glob(pattern)
    return [x for x in layers if glob.fullmatch(x) or glob.fullmatch(to_canonical(x, layout))]


_LIST = "list them with: ortho inspect CHECKPOINT --layers"


def _hint(pattern: str, layers: Collection[str], layout: str) -> str:
    """What the writer of a pattern that matches nothing may have meant."""
    names = {spelling for layer in layers for spelling in (layer, to_canonical(layer, layout))}
    words = {_tail(name) for name in names} | {part for name in names for part in name.split(".") if not part.isdigit()}
    literal = [part for part in re.split(r"[.*?{},\[\]!^]+", pattern) if part]
    if pattern.startswith(ROOT):
        deeper = _globbed(pattern.lstrip(ROOT), layers, layout)
        if deeper:
            return f"{ROOT} starts at the root; without it {len(deeper)} match, first {deeper[0]}; " + _LIST
    near = difflib.get_close_matches(_tail(".".join(literal)), sorted(words | set(PRESETS)), 3)
    return (f"nearest names: {', '.join(near)}; " if near else "") + _LIST


def _tail(name: str) -> str:
    """The last component of a name, with the one before where it is an index."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def suffixes(selected: Collection[str], all_layers: Collection[str]) -> list[str] | None:
    """The shortest list of name suffixes that chooses exactly these layers, as PEFT's `target_modules` understands it.

    PEFT takes a module whose name is an entry or ends in "." and an entry. No entry fits a module that merely contains
    layers, nor starts with an index (`to_out.0`, not `0`). Of equally selective suffixes the telling one is taken:
    inside a numbered container the container's owner is named too (`ff.net.0.proj`, not `proj`).

    Args:
        selected: layer names, all in the naming that PEFT will see.
        all_layers: every layer of the model, in the same naming.

    Returns:
        The suffixes in the order of `selected`, or None where listing the names is no longer.

    Cost: linear in the number of names.

    >>> suffixes(["l.0.q", "l.1.q", "l.0.v", "l.1.v"], ["l.0.q", "l.0.k", "l.0.v", "l.1.q", "l.1.k", "l.1.v"])
    ['q', 'v']
    """
    others = set(all_layers) - set(selected)
    containers = {name[:i] for name in (*selected, *all_layers) for i, char in enumerate(name) if char == "."}
    blocked = {suffix for name in others | containers for suffix in _suffixes(name)}
    reach = Counter(suffix for name in selected for suffix in _suffixes(name))
    chosen: dict[str, None] = {}
    for name in selected:
        usable = [s for s in _suffixes(name) if s not in blocked and (s == name or not s.partition(".")[0].isdigit())]
        if not usable:
            return None
        # The shortest suffix of each name makes the shortest list: whatever a longer one chooses, it chooses too.
        best = usable[0]
        for longer in usable[1:]:
            if reach[longer] != reach[best] or not _needs_owner(name, best):
                break
            best = longer
        chosen[best] = None
    return list(chosen) if len(chosen) < len(selected) else None


def _suffixes(name: str) -> Iterator[str]:
    """The dotted suffixes of a name, the shortest first."""
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))


def _needs_owner(name: str, suffix: str) -> bool:
    """Whether a suffix names only what lies at an index (`proj` of `net.0.proj`), or starts at the list around it."""
    before = name[: -len(suffix)].rstrip(".").rpartition(".")[2]
    parts = suffix.split(".")
    return (before.isdigit() and len(parts) == 1) or (len(parts) > 1 and parts[1].isdigit())
