"""Attacks inside a well-formed pickle: tensors that lie about their bytes, state dicts that hold other things."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from pickle_assembler import (
    HOOKS,
    TOUCH,
    Case,
    archive,
    called,
    checkpoint,
    imported,
    listed,
    mapping,
    number,
    numbers,
    several,
    storage,
    storage_of,
    tensor,
    text,
)


def tensor_attacks() -> Iterator[Case]:
    """Tensors that are not where, or not what, they say."""
    leaves = "leaves its storage"

    def of(**fields: bytes) -> Callable[[], bytes]:
        return lambda: archive(mapping(("w", tensor(**fields))))  # type: ignore[arg-type]

    def raw(fragment: bytes) -> Callable[[], bytes]:
        return lambda: archive(mapping(("w", fragment)))

    yield "numel-lie", of(of=storage(numel=10**9)), "has 24 bytes, the pickle says 4,000,000,000"
    yield "numel-small", of(of=storage(numel=5)), "has 24 bytes, the pickle says 20"
    yield "numel-2^300", of(of=storage(numel=2**300)), "named by a tuple of 5"
    yield "numel-negative", of(of=storage(numel=-6)), "named by a tuple of 5"
    yield "type-lie", of(of=storage(kind="DoubleStorage")), "has 24 bytes, the pickle says 48"
    yield "storage-missing", of(of=storage(text("1"))), "storage '1' is missing"
    yield "storage-climbs", of(of=storage(text("../../x"))), "storage '../../x' is missing"
    yield "storage-is-pickle", of(of=storage(text("../data.pkl"))), "is missing"
    yield "storage-key-number", of(of=storage(number(0))), "named by a tuple of 5"
    yield "storage-text", of(of=text("0") + b"Q"), "named by '0'"
    yield "storage-no-reference", of(of=several(text("storage"))), "named by a tuple of 1"
    yield "storage-class-text", of(of=storage_of(text("FloatStorage"))), "named by a tuple of 5"
    yield "shape-beyond", of(shape=numbers(2, 4)), leaves
    yield "shape-2^62", of(shape=numbers(2**62, 3)), leaves
    yield "shape-2^63", of(shape=numbers(2**63, 3)), "whole numbers from 0"
    yield "shape-2^40000", of(shape=numbers(2**40_000, 3)), "an integer of 40001 bits"
    yield "shape-negative", of(shape=numbers(-2, 3)), "whole numbers from 0"
    yield "shape-bool", of(shape=several(b"\x88", number(3))), "whole numbers from 0"
    yield "shape-float", of(shape=several(b"F2.0\n", number(3))), "whole numbers from 0"
    yield "shape-list", of(shape=listed(number(2), number(3))), "whole numbers from 0"
    yield "shape-17-dims", of(shape=numbers(*[1] * 17), strides=numbers(*[1] * 17)), "up to 16"
    yield "shape-100k-dims", of(shape=numbers(*[1] * 100_000)), "up to 16"
    yield "stride-beyond", of(strides=numbers(4, 1)), leaves
    yield "stride-negative", of(strides=numbers(3, -1)), "whole numbers from 0"
    yield "stride-missing", of(strides=numbers(1)), r"strides \[1\]"
    yield "offset-beyond", of(first=number(1)), leaves
    yield "offset-2^62", of(first=number(2**62)), leaves
    yield "offset-negative", of(first=number(-1)), "from element -1"
    yield "offset-text", of(first=text("0")), "from element '0'"
    yield "empty-beyond", of(shape=numbers(0, 3), first=number(7)), leaves
    yield "expanded", of(shape=numbers(2**40, 3), strides=numbers(0, 1)), "expanded view of only 6"
    yield "no-arguments", raw(called("torch._utils", "_rebuild_tensor_v2")), "with 0 arguments"
    yield "parameter-of-nothing", raw(called("torch._utils", "_rebuild_parameter")), "only dense tensors"
    yield "parameter-of-text", raw(called("torch._utils", "_rebuild_parameter", text("x"))), "a parameter made of 'x'"
    for kind in ("qtensor", "sparse_tensor", "meta_tensor_no_storage", "nested_tensor", "wrapper_subclass"):
        yield kind, raw(called("torch._utils", f"_rebuild_{kind}", several())), f"stored as a {kind}"
    yield "quantised-storage", of(of=storage(kind="QInt8Storage")), "entry 'w' of the weights holds torch.QInt8Storage"
    yield "complex128", of(of=storage(kind="ComplexDoubleStorage")), "torch.ComplexDoubleStorage cannot be held"
    raw_storage = several(
        text("storage"), imported("torch.storage", "UntypedStorage"), text("0"), text("cpu"), number(24)
    )
    yield "untyped-v2", of(of=raw_storage + b"Q"), "UntypedStorage cannot be read"
    for name, dtype in (("size", imported("torch", "Size")), ("text", text("float32"))):
        fragment = tensor(
            numbers(2, 3), numbers(3, 1), number(0), raw_storage + b"Q", dtype, rebuild="_rebuild_tensor_v3"
        )
        yield f"dtype-{name}", raw(fragment), "its type .* cannot be read"
    for bit in ("conj", "neg"):
        bits = mapping((bit, b"\x88"))
        yield bit, raw(tensor(numbers(2, 3), numbers(3, 1), number(0), storage(), bits)), "conjugate or negative"
    plain = several(storage(), number(0), numbers(2, 3), numbers(3, 1))
    subclass = (imported("torch._utils", "_rebuild_tensor_v2"), imported("torch", "Size"), plain, b"}")
    yield (
        "subclass",
        raw(called("torch._tensor", "_rebuild_from_type_v2", *subclass)),
        "tensors of the class torch.Size",
    )


def weight_attacks() -> Iterator[Case]:
    """State dicts that hold what is no weight, or cannot be found."""
    strange = "entry 'x' of the weights holds my.models.Thing, not only tensors"
    thing = called("my.models", "Thing", text(TOUCH))
    yield "placeholder", lambda: checkpoint(("x", thing)), strange
    yield "placeholder-class", lambda: checkpoint(("x", imported("my.models", "Thing"))), strange
    yield "placeholder-nested", lambda: checkpoint(("x", listed(several(mapping(("y", thing)))))), strange
    yield "placeholder-state", lambda: checkpoint(("x", HOOKS + several(thing) + b"b")), strange
    hooked = called("torch._utils", "_rebuild_tensor_v2", storage(), number(0), numbers(6), numbers(1), b"I00\n", thing)
    yield "placeholder-hook", lambda: checkpoint(("x", hooked)), strange
    yield "placeholder-name", lambda: checkpoint((thing, tensor())), "of my.models.Thing' of the|holds my.models.Thing"
    ordered = HOOKS + text("w") + tensor() + b"s" + mapping(("_metadata", thing)) + b"b"
    yield (
        "placeholder-metadata",
        lambda: archive(mapping(("state_dict", ordered))),
        "'_metadata' of the weights holds my",
    )
    yield "name-number", lambda: checkpoint((number(3), tensor())), "named 3, not by a string"
    yield "name-none", lambda: checkpoint((b"N", tensor())), "named None, not by a string"
    yield "name-bytes", lambda: checkpoint((b"C\1x", tensor())), "named b'x', not by a string"
    yield "name-twice", lambda: checkpoint(("w", tensor())), "'w' appears twice"
    yield "name-surrogate", lambda: checkpoint(("a\ud800", tensor())), "no valid Unicode"
    yield "module", lambda: _torch_saved(torch.nn.Linear(2, 2)), "holds an object of torch.nn.modules.linear.Linear"
    yield "module-inside", lambda: _torch_saved({"model": torch.nn.Linear(2, 2)}), r"model \(an object of torch.nn"
    yield "bare-tensor", lambda: _torch_saved(torch.ones(2)), "not a dict of tensors"
    yield "list-of-tensors", lambda: _torch_saved([torch.ones(2)]), "holds a list of 1"
    yield "numpy-only", lambda: _torch_saved({"w": np.ones(2)}), "no tensors found"
    yield "no-tensors", lambda: _torch_saved({"epoch": 3}), r"no tensors found; the file holds: epoch \(3\)"
    yield "empty-dict", lambda: _torch_saved({}), "an empty dict"
    two = {"params": {"w": torch.ones(1)}, "params_ema": {"w": torch.ones(1)}}
    yield "two-sets", lambda: _torch_saved(two), "several sets of weights: params, params_ema"
    nested = mapping(("w", tensor()))
    for _ in range(9):
        nested = mapping(("state_dict", nested))
    yield "nested-9", partial(archive, nested), "more than 8 dicts"


def _torch_saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()
