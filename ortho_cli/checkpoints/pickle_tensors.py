"""From the call that would have rebuilt a tensor (`_rebuild_tensor_v2`, ...) to its byte range in the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ortho_cli.checkpoints.pickle_policy import DTYPE_GLOBALS, STORAGE_DTYPES
from ortho_cli.checkpoints.pickle_records import Global, Made, Reference, show
from ortho_cli.checkpoints.tensors import DTYPE_BITS, TensorInfo
from ortho_cli.errors import CheckpointError

__all__ = ["Storage", "StorageId", "is_tensor", "locate_tensor", "storage_id"]

_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_PLAIN_CLASSES = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")
_DENSE = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_DENSE_TYPED = "torch._utils._rebuild_tensor_v3"  # for dtypes that have no storage class

MAX_DIMS = 16  # as for safetensors headers
MAX_DIM = 2**63 - 1
# A view with stride 0 (`expand`) may be larger than its storage, but a small file may not ask for terabytes.
MAX_EXPANDED_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class StorageId:
    """What a persistent id says of a storage: dtype (None: raw bytes), name, elements, and the view of it meant."""

    type_name: str
    dtype: str | None
    key: str
    numel: int
    view: tuple[int, int] | None = None  # first element and elements (files of before torch 0.4)

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return 1 if self.dtype is None else DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Storage:
    """The bytes of a storage in the file."""

    offset: int
    nbytes: int


def is_tensor(value: object) -> bool:
    """Whether a record of the pickle stands for a tensor of any kind."""
    return isinstance(value, Made) and (value.path.startswith("torch._utils._rebuild_") or value.path == _SUBCLASS)


def storage_id(reference: object) -> StorageId:
    """Check the tuple by which a pickle names a storage: `('storage', class, key, location, numel[, view])`."""
    fields = reference.id if isinstance(reference, Reference) else reference
    if isinstance(fields, tuple) and len(fields) in (5, 6) and fields[0] == "storage":
        _, kind, key, _, numel, *views = fields
        view = views[0] if views else None
        if isinstance(view, tuple) and len(view) == 3 and _is_size(view[1]) and _is_size(view[2]):
            view = view[1:]
        elif view is not None:
            raise CheckpointError(f"a storage has the view {show(view)}")
        if isinstance(kind, Global) and kind.path not in STORAGE_DTYPES:
            raise CheckpointError(f"tensors of type {kind.path} cannot be held in a safetensors file")
        if isinstance(kind, Global) and isinstance(key, str) and _is_size(numel):
            return StorageId(kind.path, STORAGE_DTYPES[kind.path], key, numel, view)
    raise CheckpointError(f"a tensor's storage is named by {show(fields)}, not by torch's tuple")


def locate_tensor(name: str, value: Made, path: Path, storage_of: Callable[[StorageId], Storage]) -> TensorInfo:
    """The dtype, shape and byte range of a tensor, from the call that would have rebuilt it.

    Args:
        name: the tensor's name, for the result and for messages.
        value: a record that :func:`is_tensor` accepts.
        path: the file.
        storage_of: where a storage lies in the file; raises CheckpointError where it is missing or of another size.

    Raises:
        CheckpointError: sparse, quantised, meta or complex128 tensors, conjugate views, tensor subclasses; a shape,
            stride or offset that is negative or leaves the storage.

    Cost: constant.
    """
    try:
        return _locate(name, _unwrap(value), path, storage_of)
    except CheckpointError as error:
        raise CheckpointError(f"tensor {show(name)}: {error.message}", hint=error.hint) from None


def _unwrap(value: object) -> Made:
    """The plain tensor inside parameters and inside tensors that carry attributes."""
    while isinstance(value, Made):
        if value.path in _PARAMETERS and value.args:
            value = value.args[0]
        elif value.path == _SUBCLASS and len(value.args) == 4:
            function, kind, args, _ = value.args
            if not (isinstance(kind, Global) and kind.path in _PLAIN_CLASSES and isinstance(args, tuple)):
                raise CheckpointError(f"tensors of the class {show(kind)} cannot be read")
            value = Made(function, args) if isinstance(function, Global) else function
        else:
            return value
    raise CheckpointError(f"a parameter made of {show(value)}")


def _locate(name: str, value: Made, path: Path, storage_of: Callable[[StorageId], Storage]) -> TensorInfo:
    typed = value.path == _DENSE_TYPED
    if not typed and value.path not in _DENSE:
        kind = value.path.removeprefix("torch._utils._rebuild_")
        raise CheckpointError(
            f"it is stored as a {kind} ({show(value)}); only dense tensors can be read",
            hint="turn it into a dense tensor (.to_dense(), .dequantize()) and save the checkpoint again",
        )
    if len(value.args) < 4 + 3 * typed:
        raise CheckpointError(f"{value.path} with {len(value.args)} arguments")
    reference, first, shape, strides = value.args[:4]
    if _has_math_bits(value.args[6 + typed : 8]):
        raise CheckpointError("it is a conjugate or negative view; save it again after .resolve_conj().resolve_neg()")
    named = storage_id(reference)
    dtype = named.dtype
    if typed:
        given = value.args[6]
        dtype = DTYPE_GLOBALS.get(given.path) if isinstance(given, Global) else None
    if dtype is None:
        raise CheckpointError(f"its type {show(value.args[6]) if typed else named.type_name} cannot be read")
    shape, strides = _sizes(shape, "shape"), _sizes(strides, "strides")
    if len(shape) != len(strides) or not isinstance(first, int) or not _is_size(first):
        raise CheckpointError(f"shape {list(shape)} with strides {list(strides)} from element {show(first)}")

    storage = storage_of(named)
    itemsize = DTYPE_BITS[dtype] // 8
    start, numel = (0, storage.nbytes // itemsize) if named.view is None else named.view
    last = first + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    count = prod(shape)
    if (last >= numel if count else first > numel) or (start + numel) * itemsize > storage.nbytes:
        raise CheckpointError(
            f"shape {list(shape)} with strides {list(strides)} from element {first} leaves its storage of {numel:,}"
        )
    if count > numel and count * itemsize > MAX_EXPANDED_BYTES:
        raise CheckpointError(f"shape {list(shape)} is an expanded view of only {numel:,} stored elements")
    offset = storage.offset + (start + first) * itemsize
    return TensorInfo(name, dtype, shape, path, offset, None if _is_row_major(shape, strides) else strides)


def _sizes(value: object, what: str) -> tuple[int, ...]:
    if isinstance(value, tuple) and len(value) <= MAX_DIMS and all(map(_is_size, value)):
        return value
    shown = ", ".join(map(show, value[:MAX_DIMS])) if isinstance(value, tuple) else show(value)
    raise CheckpointError(f"{what} ({shown}): up to {MAX_DIMS} whole numbers from 0 were expected")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_DIM


def _is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return prod(shape) == 0
        expected *= size
    return True


def _has_math_bits(metadata: tuple[object, ...]) -> bool:
    """Whether torch's optional dict `{"conj": bool, "neg": bool}` of a tensor sets one (or is no such dict)."""
    for made in metadata:
        pairs = made.pairs or [] if isinstance(made, Made) else []
        if len(pairs) > 2 or any(value is not False for _, value in pairs):
            return True
    return False
