"""The bytes of a tensor as its difference from another: XOR, split in byte planes, deflated block by block.

After a merge sign, exponent and leading bits mostly agree, so the planes that hold them are nearly all zeros; those of
the last bits are noise and stay as long as they are. Run lengths and Huffman codes are all there is to find in either:
deflate's `Z_RLE` is twice as fast here as its match search, and smaller.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from ortho_cli.checkpoints.layer_pool import default_workers
from ortho_cli.checkpoints.reading import BLOCK_BYTES, TensorReader, same_bits
from ortho_cli.checkpoints.tensors import DTYPE_BITS, TensorInfo
from ortho_cli.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["blocks_of", "decoded", "encoded", "same_bytes"]

LEVEL = 1
LENGTH_BYTES = 4  # before each plane of each block
# No block may claim to be larger than any that is written: what is read is a stranger's file.
LONGEST_PLANE = BLOCK_BYTES + BLOCK_BYTES // 1000 + 64


def blocks_of(reader: TensorReader, info: TensorInfo) -> Iterator[memoryview]:
    """The raw bytes of a tensor in blocks, each valid until the next."""
    for start in range(0, info.nbytes, BLOCK_BYTES):
        yield reader.read_bytes(info, info.offset + start, min(BLOCK_BYTES, info.nbytes - start))


def same_bytes(info: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors hold the same type, shape and bytes; stops at the first block that differs."""
    if (info.dtype, info.shape) != (other.dtype, other.shape):
        return False
    with TensorReader() as first, TensorReader() as second:
        pairs = zip(blocks_of(first, info), blocks_of(second, other), strict=True)
        return all(same_bits(_bytes(one), _bytes(two)) for one, two in pairs)


def encoded(info: TensorInfo, previous: TensorInfo | None, see: Callable[[memoryview], None]) -> Iterator[bytes]:
    """A tensor as its difference from `previous`, or alone where there is none of its type and shape.

    Args:
        info: what `decoded` is to give back.
        previous: what will be there then.
        see: shown every block of `info` before it is encoded.

    Cost: one pass over both; planes are deflated on all processors, two each in memory.
    """
    workers = default_workers()
    ahead: deque[Future[bytes]] = deque()
    with TensorReader() as reader, TensorReader() as other, ThreadPoolExecutor(workers) as pool:
        after = blocks_of(other, previous) if previous is not None else None
        for block in blocks_of(reader, info):
            see(block)
            for plane in _planes(_exclusive(block, next(after) if after is not None else None), _width(info)):
                ahead.append(pool.submit(_deflated, plane))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def decoded(stored: TensorInfo, target: TensorInfo, previous: TensorInfo | None) -> Iterator[memoryview]:
    """The bytes of `target`, of which only type and shape are used, from what `encoded` made.

    Raises:
        CheckpointError: what is stored is not of that length, or damaged.
    """
    import torch

    width = _width(target)
    with TensorReader() as reader, TensorReader() as other:
        after = blocks_of(other, previous) if previous is not None else None
        position, end = stored.offset, stored.offset + stored.nbytes
        for start in range(0, target.nbytes, BLOCK_BYTES):
            count = min(BLOCK_BYTES, target.nbytes - start)
            planes = torch.empty(width, count // width, dtype=torch.uint8)
            for plane in planes:
                length = int.from_bytes(_read(reader, stored, position, LENGTH_BYTES, end), "little")
                packed = _read(reader, stored, position + LENGTH_BYTES, length, end)
                plane.copy_(_bytes(_inflated(packed, stored, len(plane))))
                position += LENGTH_BYTES + length
            block = planes.T.reshape(-1)
            if after is not None:
                block = block.bitwise_xor_(_bytes(next(after)))
            yield block.numpy().data
        if position != end:
            raise _damaged(stored)


def _width(info: TensorInfo) -> int:
    """Bytes of one number; of packed types, 1."""
    return max(DTYPE_BITS[info.dtype] // 8, 1)


def _bytes(block: memoryview | bytearray) -> Tensor:
    import torch

    return torch.frombuffer(block, dtype=torch.uint8)


def _exclusive(block: memoryview, other: memoryview | None) -> Tensor:
    return _bytes(block) if other is None else _bytes(block).bitwise_xor(_bytes(other))


def _planes(block: Tensor, width: int) -> Iterator[memoryview]:
    """First bytes of all numbers, then second bytes, and so on; in memory of their own, as the block's is reused."""
    import torch

    for plane in block.view(-1, width).T.clone(memory_format=torch.contiguous_format):
        yield plane.numpy().data


def _deflated(plane: memoryview) -> bytes:
    """A plane behind its length; the interpreter is free meanwhile."""
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    packed = packer.compress(plane) + packer.flush()
    return len(packed).to_bytes(LENGTH_BYTES, "little") + packed


def _read(reader: TensorReader, stored: TensorInfo, position: int, count: int, end: int) -> memoryview:
    if count > LONGEST_PLANE or position + count > end:
        raise _damaged(stored)
    return reader.read_bytes(stored, position, count)


def _inflated(packed: memoryview, stored: TensorInfo, count: int) -> bytearray:
    """Exactly `count` bytes; never more, whatever the stream claims."""
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(packed, count + 1)
    except zlib.error as error:
        raise _damaged(stored) from error
    if len(found) != count or not unpacker.eof or unpacker.unused_data:
        raise _damaged(stored)
    return bytearray(found)  # torch wants memory that may be written


def _damaged(stored: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"{stored.name} of the undo file is damaged", hint="fetch or copy the undo file again", where=str(stored.path)
    )
