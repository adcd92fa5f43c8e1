"""Layers that share one weight: told by the bytes where it lies, or, where a file repeats it, by the weight's edges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .reading import TensorReader
from .tensors import TensorInfo

__all__ = ["tied_layers"]

EDGE_BYTES = 4096

Parts = Sequence[TensorInfo]


def tied_layers(layers: Mapping[str, Sequence[Parts]]) -> dict[str, str]:
    """Find layers that share their weight with an earlier one, in every checkpoint of a series.

    Args:
        layers: name -> the tensors of the layer, one group a checkpoint.

    Returns:
        Name -> the first layer with the same weight. Only weights that lie in files of this machine are compared.

    Cost: 8 kB a tensor of those whose shape is not their own, in the first and the last checkpoint.
    """
    groups: dict[object, list[str]] = {}
    for name, stored in layers.items():
        if all(len(parts) == 1 for parts in stored):
            groups.setdefault(tuple((parts[0].shape, parts[0].dtype) for parts in stored), []).append(name)
    found, first = dict[str, str](), dict[object, str]()
    with TensorReader() as reader:
        for names in (names for names in groups.values() if len(names) > 1):
            for name in names:
                ends = (layers[name][0][0], layers[name][-1][0])
                mark = tuple(_mark(reader, info) for info in ends)
                if None in mark:
                    continue
                if mark in first:
                    found[name] = first[mark]
                else:
                    first[mark] = name
    return found


def _mark(reader: TensorReader, info: TensorInfo) -> object:
    """What two tensors have in common only if they are one; None of zeros, which layers begin with."""
    if info.strides is not None or not info.path.exists():
        return None
    count = min(EDGE_BYTES, info.nbytes)
    starts: Iterable[int] = (info.offset, info.offset + info.nbytes - count)
    edges = tuple(bytes(reader.read_bytes(info, start, count)) for start in starts)
    return (info.shape, info.dtype, edges) if any(any(edge) for edge in edges) else None
