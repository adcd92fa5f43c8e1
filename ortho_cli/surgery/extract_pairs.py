"""What of a fine-tuned checkpoint corresponds to what of its base, and which of it an adapter can carry.

Names are matched through the layout tables, so either side may be an LDM file, a diffusers folder, or one component.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from ortho_cli.checkpoints import layouts, targets
from ortho_cli.checkpoints.matrices import LOOKUPS, has_conv1d, layer_view
from ortho_cli.checkpoints.reading import BLOCK_BYTES, TensorReader, row_blocks, same_bits
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.checkpoints.tensors import FLOAT_DTYPES, TensorInfo
from ortho_cli.errors import TargetError

from .factorize_selection import FactorLayer

__all__ = ["BLOCKS_READ", "LayerPair", "Pairs", "TensorPair", "pair_checkpoints", "same_values"]

COMPARED_BYTES = BLOCK_BYTES // 4  # two stay in a core's cache, and little is read of a layer that differs at once
BLOCKS_READ = 3 * COMPARED_BYTES  # what a comparison holds: a block of each, and one of them in the other's type


class TensorPair(NamedTuple):
    """One tensor in both checkpoints; `kind` says why an adapter cannot carry its change, if so."""

    base: TensorInfo
    tuned: TensorInfo
    kind: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.base.nbytes + self.tuned.nbytes


class LayerPair(NamedTuple):
    """A layer in both checkpoints, its change a matrix `(out, in kh kw)`; `still` says why it cannot be turned."""

    layer: FactorLayer
    weights: TensorPair
    still: str = ""


@dataclass
class Pairs:
    """The layers that an adapter may carry, and the tensors it cannot, which are compared all the same."""

    layers: list[LayerPair] = field(default_factory=list)
    others: list[TensorPair] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> list[TensorPair]:
        """All of them."""
        return [*(pair.weights for pair in self.layers), *self.others]


def pair_checkpoints(
    base: Checkpoint, tuned: Checkpoint, patterns: Sequence[str] | None, exclude: Sequence[str]
) -> Pairs:
    """Find for every layer of the base the same one of the fine-tuned model.

    Args:
        base: a plain checkpoint.
        tuned: likewise, in any layout.
        patterns: globs or presets over the layers that both have; None: all of them.
        exclude: patterns of layers to leave out.

    Raises:
        TargetError: they share no layer, a shape differs, a pattern matches nothing, or no layer can be carried.
    """
    found = _counterparts(base, tuned)
    shapes = {name: shape for name, shape in base.layers().items() if f"{name}.weight" in found}
    compare = f"compare them: ortho inspect {base.root.name} --diff {tuned.root.name}"
    if not shapes:
        raise TargetError(f"{tuned.root.name} has no layer of {base.root.name}: another model", hint=compare)
    pairs = Pairs(notes=list(_left_out(base, tuned, found)))
    chosen = targets.select(patterns or ["**"], shapes, base.layout, exclude).layers
    conv1d = has_conv1d(base)
    for name in chosen:
        weights = TensorPair(base.tensors[f"{name}.weight"], found[f"{name}.weight"])
        kind = _obstacle(name, weights)
        if kind:
            pairs.others.append(weights._replace(kind=kind))
        else:
            pairs.layers.append(_layer_pair(base, name, weights, conv1d))
    if not pairs.layers:
        first = pairs.others[0]
        raise TargetError(
            f"no adapter can carry the layers chosen: {first.base.name} is one of the {first.kind}",
            hint=f"list the layers: ortho inspect {base.root.name} --layers",
        )
    misfits = [pair.layer for pair in pairs.layers if not _same_shape(base, tuned, pair.weights)]
    if misfits:
        info, other = misfits[0].info, found[misfits[0].info.name]
        raise TargetError(
            f"layer {misfits[0].name} is {_by(info.shape)} in {base.root.name} and {_by(other.shape)} in "
            f"{tuned.root.name}, and {len(misfits) - 1} more differ: another model",
            hint=compare,
        )
    plain = [name for name in found if name.removesuffix(".weight") not in shapes]
    pairs.others += [TensorPair(base.tensors[name], found[name], _plain_kind(base.tensors[name])) for name in plain]
    return pairs


def same_values(pair: TensorPair) -> bool:
    """Whether two tensors are equal, or one is the other rounded to its type; read until they differ."""
    import torch

    base, tuned = pair.base, pair.tuned
    if base.numel != tuned.numel:
        return False
    blocks: Sequence[slice | None] = [None]
    if base.shape[:1] == tuned.shape[:1] != () and base.numel:
        blocks = list(row_blocks(base, block_bytes=COMPARED_BYTES))
    with TensorReader() as reader, TensorReader() as other:
        for rows in blocks:
            left, right = reader.read(base, rows).reshape(-1), other.read(tuned, rows).reshape(-1)
            if left.dtype == right.dtype:
                equal = same_bits(left, right)
            else:
                equal = torch.equal(left.to(right.dtype), right) or torch.equal(left, right.to(left.dtype))
            if not equal:
                return False
    return True


def _counterparts(base: Checkpoint, tuned: Checkpoint) -> dict[str, TensorInfo]:
    """Tensors of the base -> those of the fine-tuned model that mean the same; the EMA copies left out."""
    own = [name for name in tuned.tensors if "." in name and not name.startswith("model_ema.")]
    index = layouts.LayerIndex(dict.fromkeys(name.rpartition(".")[0] for name in own), tuned.layout)
    names = [name for name in base.tensors if "." in name and not name.startswith("model_ema.")]
    modules = {module: None for module in (name.rpartition(".")[0] for name in names)}
    resolved = {module: index.resolve(layouts.to_canonical(module, base.layout)) for module in modules}
    found = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        other = tuned.tensors.get(f"{resolved[module]}.{leaf}")
        if other is not None:
            found[name] = other
    return found


def _left_out(base: Checkpoint, tuned: Checkpoint, found: Mapping[str, TensorInfo]) -> Iterator[str]:
    """What is not compared."""
    met = {info.name for info in found.values()}
    lone = {
        base.root.name: [name for name in base.layers() if f"{name}.weight" not in found],
        tuned.root.name: [name for name in tuned.layers() if f"{name}.weight" not in met],
    }
    for holder, names in lone.items():
        if names:
            yield f"{len(names)} layers are in {holder} only, first {names[0]}: they are left out"
    copies = sum(name.startswith("model_ema.") for name in (*base.tensors, *tuned.tensors))
    if copies > 2 * 2:  # two counters stand even in files without EMA weights
        yield f"EMA: {copies} model_ema tensors are not compared"


def _layer_pair(base: Checkpoint, name: str, weights: TensorPair, conv1d: bool) -> LayerPair:
    from ortho_cli.linalg.ranks import LayerSize

    info, kernel = weights.base, weights.base.shape[2:]
    view = layer_view(name, (info.shape[0], prod(info.shape[1:])), conv1d=conv1d)
    layer = FactorLayer(name, layouts.to_canonical(name, base.layout), info, view, LayerSize(view.rows, view.cols))
    if view.kind == "conv1d":
        return LayerPair(layer, weights, "is a transformers Conv1D, which keeps its weight transposed")
    return LayerPair(layer, weights, f"has a kernel of {_by(kernel)}" if len({*kernel}) > 1 else "")


def _obstacle(name: str, weights: TensorPair) -> str:
    """What kind of layer no adapter of ours can carry this is, if so."""
    stored = [info.dtype for info in (weights.base, weights.tuned) if info.dtype not in FLOAT_DTYPES]
    if stored:
        return f"weights stored as {stored[0]}"
    if name.rpartition(".")[2] in LOOKUPS:
        return "embeddings"
    return "" if len(weights.base.shape) in (2, 4) and weights.base.numel else f"{len(weights.base.shape)}-D weights"


def _plain_kind(info: TensorInfo) -> str:
    leaf = info.name.rpartition(".")[2]
    return "biases" if leaf == "bias" else "norms" if leaf == "weight" else "other tensors"


def _same_shape(base: Checkpoint, tuned: Checkpoint, weights: TensorPair) -> bool:
    shapes = [
        layouts.canonical_shape(layouts.to_canonical(info.name, checkpoint.layout), info.shape)
        for checkpoint, info in ((base, weights.base), (tuned, weights.tuned))
    ]
    return shapes[0] == shapes[1]


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
