"""Which base an adapter belongs to: a hash that survives renaming (LDM, diffusers) and storage in half precision.

SHA-256 over the adapted layers' canonical names, matrix shapes, and the first and last 2,048 values rounded to
float16. Needs no torch, so that a plan stays a plan: 144 layers take a tenth of a second.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterable
from math import inf, prod
from typing import TYPE_CHECKING

from ortho_cli.errors import CheckpointError

from .checkpoint import Checkpoint
from .layouts import fingerprint_name, to_canonical
from .reading import TensorReader
from .tensors import DTYPE_BITS, FLOAT_DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["base_fingerprint", "edge_values", "fingerprint_of"]

EDGE_VALUES = 2048
HALF_LIMIT = 65520.0  # from here on a float rounds to infinity in float16


def base_fingerprint(checkpoint: Checkpoint, layers: Iterable[str]) -> str:
    """Hash of the weights of some layers, equal in every naming and float type of the same model.

    Args:
        checkpoint: the base; a checkpoint that holds HRA is hashed without it.
        layers: native layer names, as `Checkpoint.layers` gives them; their order does not matter.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: a weight is not a float tensor.

    Cost: two reads of at most 8 kB for each layer.
    """
    with TensorReader() as reader:
        return fingerprint_of(
            (to_canonical(layer, checkpoint.layout), info.shape, _edges(reader, info))
            for layer, info in {layer: checkpoint.weight(layer) for layer in layers}.items()
        )


def fingerprint_of(layers: Iterable[tuple[str, tuple[int, ...], bytes]]) -> str:
    """Hash layers that may not be in a file yet: of each the canonical name, the shape, and its `edge_values`."""
    digest = hashlib.sha256()
    # Two text encoders of one pipeline have layers of the same name: the canonical name decides between them.
    for full, shape, edges in sorted(layers, key=lambda layer: (fingerprint_name(layer[0]), layer[0])):
        digest.update(f"{fingerprint_name(full)}:{shape[0]}x{prod(shape[1:])}\n".encode())
        digest.update(edges)
    return digest.hexdigest()


def edge_values(weight: Tensor) -> bytes:
    """The first and the last values of a weight, as little-endian float16."""
    values = weight.double().reshape(-1)
    return _half(values[:EDGE_VALUES].tolist()) + _half(values[-EDGE_VALUES:].tolist())


def _edges(reader: TensorReader, info: TensorInfo) -> bytes:
    """The first and the last values of a tensor, as little-endian float16."""
    if info.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"weight {info.name!r} is {info.dtype}; a fingerprint needs floats", where=str(info.path))
    if info.strides is not None:
        return edge_values(reader.read(info))
    width = DTYPE_BITS[info.dtype] // 8
    count = min(EDGE_VALUES, info.numel) * width
    places = (info.offset, info.offset + info.nbytes - count)
    raws = (bytes(reader.read_bytes(info, place, count)) for place in places)
    return b"".join(raw if info.dtype == "F16" else _half(_floats(raw, info.dtype)) for raw in raws)


def _floats(raw: bytes, dtype: str) -> list[float]:
    if dtype == "BF16":  # the upper half of a float32
        padded = array("I", (value << 16 for value in struct.unpack(f"<{len(raw) // 2}H", raw)))
        return list(struct.unpack(f"{len(padded)}f", padded.tobytes()))
    code, width = ("f", 4) if dtype == "F32" else ("d", 8)
    return list(struct.unpack(f"<{len(raw) // width}{code}", raw))


def _half(values: list[float]) -> bytes:
    try:
        return struct.pack(f"<{len(values)}e", *values)
    except OverflowError:
        clipped = [value if abs(value) < HALF_LIMIT or value != value else inf * value for value in values]
        return struct.pack(f"<{len(values)}e", *clipped)
