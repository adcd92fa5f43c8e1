"""The layers of a series: which weights its checkpoints have in common, however each of them stores them.

A layer is a tensor of two or more dimensions, or the factors `X.U`, `X.VT` and perhaps a core `X.M` between them, which
stand for their product: a training that factors its layers on the way keeps their names. What is looked up rather than
multiplied (embeddings, position tables) and what has one row has no basis to speak of, and is taken only if named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from ortho_cli.errors import CheckpointError, OrthoError, TargetError

from . import targets
from .checkpoint import Checkpoint
from .factored import factored_layers
from .header import printable
from .matrices import LOOKUPS, has_conv1d
from .series import Entry
from .series_factors import choose_kinds, fitting_views
from .tensors import FLOAT_DTYPES, TensorInfo
from .tied import tied_layers

if TYPE_CHECKING:
    from torch import Tensor

    from ortho_cli.linalg.matricize import Matricization

__all__ = [
    "OPT_IN",
    "LayerSelection",
    "SeriesLayer",
    "Stored",
    "layer_kind",
    "layer_name",
    "read_flat",
    "series_layers",
]

Shape = tuple[int, ...]
OPT_IN = ("embedding", "position", "row")
COARSE_FIRST = ("BF16", "F16", "F32", "F64")
WEIGHT_ENDS = (".weight", "_weight")
POSITIONS = re.compile(r"pos(ition)?_?(embed|emb|ition)|relative_position|rel_pos|wpe|embed_positions")
EMBEDDINGS = re.compile(r"(^|\.)(tok(en)?|word)_?emb|(^|\.)emb(ed|edding)?s?$")
# A file that sorts its names says nothing of the order of layers; these come first and last in nearly every model.
FIRST = re.compile(r"embed|stem|conv_in|wte|wpe|token|(^|\.)conv1(\.|$)")
LAST = re.compile(r"(^|\.)(head|heads|lm_head|classifier|score|fc|output|conv_out|proj_out|pooler)(\.|$)")


@dataclass(frozen=True)
class Stored:
    """A layer as one checkpoint stores it: a weight, or factors `U`, perhaps `M`, and `VT` with their `view`."""

    parts: tuple[TensorInfo, ...]
    view: Matricization | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(part.nbytes for part in self.parts)

    @property
    def is_read_off(self) -> bool:
        """Whether the weight is there, or a view tells how factors make it."""
        return self.view is not None or len(self.parts) == 1

    @property
    def ends(self) -> tuple[Shape, Shape]:
        """The shapes of the first factor and of the last."""
        return self.parts[0].shape, self.parts[-1].shape

    @property
    def dtype(self) -> str:
        """The coarsest type of its parts, whose rounding the weight has."""
        return min((part.dtype for part in self.parts), key=COARSE_FIRST.index)


@dataclass(frozen=True)
class SeriesLayer:
    """One layer of a series.

    Attributes:
        name: without `.weight`.
        kind: `linear`, `conv`, `embedding`, `position` or `row`.
        shape: of the weight.
        stored: one a checkpoint; None where it lacks the layer.
    """

    name: str
    kind: str
    shape: Shape
    stored: tuple[Stored | None, ...]

    @property
    def flat_shape(self) -> tuple[int, int]:
        """The first dimension, and all others together."""
        return self.shape[0], prod(self.shape[1:])


@dataclass(frozen=True)
class LayerSelection:
    """The chosen layers, what a reader should know of those that were not, and the shape of every weight."""

    layers: tuple[SeriesLayer, ...]
    notes: tuple[str, ...]
    shapes: Mapping[str, Shape]


def series_layers(
    entries: Sequence[Entry], patterns: Sequence[str] = (), exclude: Sequence[str] = ()
) -> LayerSelection:
    """Find the layers of a series.

    Args:
        entries: its checkpoints.
        patterns: globs or presets; empty: all that are multiplied, with more than one row.
        exclude: patterns of layers to leave out.

    Raises:
        TargetError: a pattern that matches nothing, or no layers.

    Cost: headers, and a few kilobytes of weights of the same shape, to find those that are tied.
    """
    found = [_stored(entry.checkpoint) for entry in entries]
    shapes, changed = _shapes(found)
    read_as = _kinds(found, shapes, any(has_conv1d(entry.checkpoint) for entry in entries))
    layers = {}
    for name in _ordered(list(shapes)):
        try:
            stored = tuple(_viewed(each.get(name), shapes[name], read_as.get(name)) for each in found)
        except OrthoError as error:
            changed.append(f"{name} is left out: {error.message}")
            continue
        layers[name] = SeriesLayer(name, layer_kind(name, shapes[name]), shapes[name], stored)
    tied = tied_layers({name: [s.parts if s else () for s in layer.stored] for name, layer in layers.items()})
    for name, first in tied.items():  # a weight that is also looked up is opt-in by either name
        kinds = [layers[name].kind, layers[first].kind]
        opted = next((kind for kind in kinds if kind in OPT_IN), kinds[0])
        layers[name], layers[first] = (replace(layers[each], kind=opted) for each in (name, first))
    known = {name: layer.shape for name, layer in layers.items()}
    chosen: Sequence[str] = targets.select(patterns or ["**"], known, entries[0].checkpoint.layout, exclude).layers
    if not patterns:
        chosen = [name for name in chosen if layers[name].kind not in OPT_IN]
    once = [name for name in chosen if tied.get(name) not in chosen]
    if not once:
        raise TargetError("there are no layers with a basis: weights of two or more dimensions, stored as floats")
    notes = [f"{name} is {tied[name]}: measured once" for name in chosen if name not in once]
    notes += [*changed, *_unreadable(entries)]
    return LayerSelection(tuple(layers[name] for name in once), tuple(notes), known)


def layer_name(tensor: str) -> str:
    """What a layer is called after its tensor.

    >>> layer_name("head.weight"), layer_name("attn.in_proj_weight"), layer_name("pos_embed")
    ('head', 'attn.in_proj', 'pos_embed')
    """
    return tensor.removesuffix("weight")[:-1].removesuffix(".fixed_linear") if tensor.endswith(WEIGHT_ENDS) else tensor


def layer_kind(name: str, shape: Shape) -> str:
    """What a layer does with its weight, as far as name and shape tell.

    >>> layer_kind("wte", (50257, 768)), layer_kind("cls_token", (1, 1, 768)), layer_kind("conv1", (8, 3, 3, 3))
    ('embedding', 'row', 'conv')
    """
    last = name.rpartition(".")[2]
    if POSITIONS.search(last):
        return "position"
    if last in LOOKUPS or EMBEDDINGS.search(name):
        return "embedding"
    if 1 in (shape[0], prod(shape[1:])):
        return "row"
    return "conv" if len(shape) > 2 else "linear"


def read_flat(layer: SeriesLayer, place: int, entry: Entry) -> Tensor:
    """The weight of a layer in one checkpoint as `(out, rest)`, at least float32; factors are multiplied out.

    Raises:
        CheckpointError: it cannot be read.
    """
    from ortho_cli.linalg.precision import at_least_float32

    stored = layer.stored[place]
    assert stored is not None, "this checkpoint lacks the layer"
    parts = [at_least_float32(entry.read(info), info.name) for info in stored.parts]
    if stored.view is None:
        return parts[0].reshape(layer.flat_shape)
    u, vt = stored.view.unstack(parts[0], parts[-1])
    if len(parts) == 3:
        u = u @ parts[1].reshape(*u.shape[:-2], u.shape[-1], u.shape[-1])
    return stored.view.to_weight(u @ vt).reshape(layer.flat_shape)


def _stored(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Every layer of one checkpoint, factors without a table not viewed yet."""
    tensors, tabled = checkpoint.tensors, factored_layers(checkpoint)
    found = {name: Stored((layer.u, layer.vt), layer.view) for name, layer in tabled.items()}
    used = {part.name for stored in found.values() for part in stored.parts}
    for name, info in tensors.items():
        if name.startswith("model_ema.") or len(info.shape) < 2 or info.dtype not in FLOAT_DTYPES or name in used:
            continue
        stem, _, last = name.rpartition(".")
        factors = [tensors[f"{stem}.{part}"] for part in ("U", "M", "VT") if f"{stem}.{part}" in tensors]
        if last in ("U", "M", "VT") and f"{stem}.U" in tensors and f"{stem}.VT" in tensors:
            found.setdefault(stem, Stored(tuple(factors)))
        else:
            found[layer_name(name)] = Stored((info,))
    return found


def _unreadable(entries: Sequence[Entry]) -> list[str]:
    """A note on the weights that are stored as no plain float, a type at a time."""
    types: dict[str, dict[str, None]] = {}
    for entry in entries:
        for name, info in entry.checkpoint.tensors.items():
            if len(info.shape) > 1 and info.dtype not in FLOAT_DTYPES and name.endswith("weight"):
                types.setdefault(info.dtype, {})[name] = None
    return [
        f"{len(names)} weight{'s' * (len(names) > 1)} stored as {dtype}, first {printable(next(iter(names)))}: not "
        "measured, dequantise them first"
        for dtype, names in sorted(types.items())
    ]


def _shapes(found: Sequence[Mapping[str, Stored]]) -> tuple[dict[str, Shape], list[str]]:
    """The weight shape of each layer, and a note for each whose shape is not the same everywhere."""
    dense: dict[str, dict[Shape, None]] = {}
    products: dict[str, Shape] = {}
    for checkpoint in found:
        for name, stored in checkpoint.items():
            if stored.is_read_off:
                shape = stored.parts[0].shape if stored.view is None else stored.view.shape
                dense.setdefault(name, {})[shape] = None
            else:  # no table: another checkpoint may have the weight, else it is a matrix
                products[name] = (stored.parts[0].shape[0], stored.parts[-1].shape[1])
    names = dict.fromkeys(name for checkpoint in found for name in checkpoint)
    shapes = {name: next(iter(dense[name])) if name in dense else products[name] for name in names}
    notes = []
    for name, each in dense.items():
        if len(each) > 1:
            del shapes[name]
            notes.append(f"{name} is left out: its shape changes, {' and '.join(map(str, each))}")
    return shapes, notes


def _kinds(found: Sequence[Mapping[str, Stored]], shapes: Mapping[str, Shape], conv1d: bool) -> dict[str, str]:
    """How each layer with factors without a table is to be read."""
    fits: dict[str, list[str]] = {}
    for checkpoint in found:
        for name, stored in checkpoint.items():
            if name in shapes and not stored.is_read_off:
                fits.setdefault(name, list(fitting_views(*stored.ends, shapes[name])))
    return choose_kinds(fits, conv1d=conv1d)


def _viewed(stored: Stored | None, shape: Shape, kind: str | None) -> Stored | None:
    """Factors with the view by which they multiply out to a weight of this shape.

    Raises:
        CheckpointError: there is none.
    """
    if stored is None or stored.is_read_off:
        return stored
    view = fitting_views(*stored.ends, shape).get(kind or "")
    if view is None:
        raise CheckpointError("its factors {} and {} are not those of a weight {}".format(*stored.ends, shape))
    return Stored(stored.parts, view)


def _ordered(names: list[str]) -> list[str]:
    """File order; where that is the alphabet's, numbers ascending, the input's layers first, the output's last."""
    if names != sorted(names):
        return names

    def key(name: str) -> tuple[int, list[tuple[int, int, str]]]:
        numbered = re.search(r"\.\d+\.", name) is not None
        place = 1 if numbered else 0 if FIRST.search(name) else 2 if LAST.search(name) else 1
        parts = [
            (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"[.]|(?<=\D)(?=\d)", name)
        ]
        return place, parts

    return sorted(names, key=key)
