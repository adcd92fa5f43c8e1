"""Where a tensor lies: its name, type, shape and byte range in a file.

Surgery plans with these alone; no value is read before a plan runs, and unchanged tensors are never decoded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

__all__ = ["DTYPE_BITS", "FLOAT_DTYPES", "TORCH_DTYPES", "Stamp", "TensorInfo", "stamp_of"]

# Every dtype of the safetensors format (0.8) and its width in bits, in the format's own order.
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

# Those that torch can hold, by the name of its attribute (no torch import here).
TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip

# Weights in these types can be adapted and merged; fp8 and packed integers need a scale we would have to guess.
FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})

Stamp = tuple[int, int, int, int]


def stamp_of(status: os.stat_result) -> Stamp:
    """By what an opened file is known again: its device, inode, size and time of change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, as its header describes it.

    `offset` is the absolute byte position of the first element in `path`; `strides` (in elements) is None for
    row-major data, which safetensors always is and pickled checkpoints nearly always are. `stamp` is that of the file
    when its header was read: offsets mean nothing in another file that has taken its name since.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    strides: tuple[int, ...] | None = None
    stamp: Stamp | None = field(default=None, compare=False, repr=False)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor when row-major; sub-byte types fill whole bytes."""
        return (self.numel * DTYPE_BITS[self.dtype] + 7) // 8
