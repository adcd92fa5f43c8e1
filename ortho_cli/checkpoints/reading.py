"""Read tensors by position into one reused buffer.

Never through a memory map: mapped pages count into peak memory, and one pass over a 4 GB file would show as 4 GB.
A pread into a buffer that is reused costs the largest block asked for, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ortho_cli.errors import CheckpointError

from .tensors import DTYPE_BITS, TORCH_DTYPES, Stamp, TensorInfo, stamp_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BLOCK_BYTES", "TensorReader", "open_input", "row_blocks", "same_bits", "tensor_bytes"]

# Rows of a large weight are read in blocks of about this size: large enough that a disk streams, small enough that
# the block and what is computed from it (upcast copy, product, difference) stay in a core's cache from step to step.
BLOCK_BYTES = 2 * 2**20


def open_input(info: TensorInfo) -> int:
    """A descriptor of the tensor's file, which is still the one whose header was read.

    Raises:
        CheckpointError: the file is gone, cannot be read, or another one (or other content) has taken its place.
    """
    try:
        descriptor = os.open(info.path, os.O_RDONLY)
        if info.stamp is None or stamp_of(os.fstat(descriptor)) == info.stamp:
            return descriptor
        os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=str(info.path)) from error
    raise CheckpointError(
        "changed while it was read", hint="run the command again when the file is complete", where=str(info.path)
    )


class TensorReader:
    """Reads tensors of any checkpoint; keeps its files open and its buffer allocated until closed.

    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> from ortho_cli.checkpoints.store import open_checkpoint
    >>> path = tempfile.mkdtemp() + "/x.safetensors"
    >>> save_file({"w": torch.arange(6.).view(3, 2)}, path)
    >>> with TensorReader() as reader:
    ...     reader.read(open_checkpoint(path).tensors["w"], rows=slice(1, 3)).tolist()
    [[2.0, 3.0], [4.0, 5.0]]
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._files: dict[tuple[Path, Stamp | None], int] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files and free the buffer."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._buffer = bytearray()

    def read(self, info: TensorInfo, rows: slice | None = None) -> Tensor:
        """The tensor, or rows ``[start, stop)`` of its first dimension, in the dtype it is stored in.

        The result lies in the reader's buffer: it is valid until the next `read`. Use `read_copy` to keep it.

        Raises:
            CheckpointError: the dtype has no torch counterpart, or the file changed under us.
        """
        import torch

        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"tensor {info.name!r} is {info.dtype}, which torch cannot hold", where=str(info.path)
            )
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
        if info.strides is not None:
            return self._read_strided(info, dtype)[rows if rows is not None else slice(None)]
        shape, offset = info.shape, info.offset
        if rows is not None:
            start, stop, step = rows.indices(info.shape[0])
            if step != 1:
                raise ValueError(f"rows are read one after the other, not in steps of {step}")
            row_bytes = info.nbytes // max(info.shape[0], 1)
            shape, offset = (max(stop - start, 0), *info.shape[1:]), offset + start * row_bytes
        count = prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        view = self.read_bytes(info, offset, count * DTYPE_BITS[info.dtype] // 8)
        return torch.frombuffer(view, dtype=dtype).view(shape)

    def read_copy(self, info: TensorInfo, rows: slice | None = None) -> Tensor:
        """Like `read`, in memory of its own."""
        return self.read(info, rows).clone()

    def read_bytes(self, info: TensorInfo, offset: int, count: int) -> memoryview:
        """`count` raw bytes at an absolute offset of the tensor's file, in the reused buffer.

        Raises:
            CheckpointError: the file is gone, cannot be read, has changed, or has become shorter.
        """
        if len(self._buffer) < count:
            self._buffer = bytearray(count)
        view = memoryview(self._buffer)[:count]
        filled = 0
        try:
            descriptor = self._files.get((info.path, info.stamp))
            if descriptor is None:
                descriptor = self._files[info.path, info.stamp] = open_input(info)
            while filled < count:
                got = os.preadv(descriptor, [view[filled:]], offset + filled)
                if got == 0:
                    raise CheckpointError(f"file ended inside tensor {info.name!r}", where=str(info.path))
                filled += got
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror or error}", where=str(info.path)) from error
        return view

    def _read_strided(self, info: TensorInfo, dtype: object) -> Tensor:
        """A non-contiguous view of a pickled storage: read the span it covers, then stride over it."""
        import torch

        assert info.strides is not None and isinstance(dtype, torch.dtype)
        if info.numel == 0:
            return torch.empty(info.shape, dtype=dtype)
        span = 1 + sum((size - 1) * stride for size, stride in zip(info.shape, info.strides, strict=True))
        view = self.read_bytes(info, info.offset, span * DTYPE_BITS[info.dtype] // 8)
        return torch.frombuffer(view, dtype=dtype).as_strided(info.shape, info.strides).contiguous()


def row_blocks(info: TensorInfo, multiple: int = 1, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
    """Slices of whole rows that cover a tensor, each about `block_bytes` and a multiple of `multiple` rows high.

    `multiple` 0, and tensors that are not row-major, give one slice over everything.
    """
    rows = info.shape[0]
    if multiple == 0 or info.strides is not None:
        yield slice(0, rows)
        return
    row_bytes = max(info.nbytes // max(rows, 1), 1)
    height = max(block_bytes // row_bytes // multiple, 1) * multiple
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two row-major tensors hold the same bytes: a NaN is its own equal, and 0 is not -0.

    >>> import torch
    >>> nan, zero = torch.tensor([float("nan")]), torch.zeros(1)
    >>> same_bits(nan, nan.clone()), same_bits(zero, -zero)
    (True, False)
    """
    import torch

    one, two = (tensor.reshape(-1).view(torch.uint8) for tensor in (first, second))
    words = len(one) // 8 * 8  # compared as int64, which is ten times as fast
    return torch.equal(one[words:], two[words:]) and torch.equal(
        one[:words].view(torch.int64), two[:words].view(torch.int64)
    )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The row-major bytes of a tensor on the CPU, without a copy where it is row-major already."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
