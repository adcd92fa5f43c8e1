"""The pickle reader against torch: what torch saves is found, byte for byte, without torch."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pickle_assembler import (
    SIX_FLOATS,
    Member,
    called,
    imported,
    legacy,
    mapping,
    members,
    number,
    numbers,
    pickle_of,
    several,
    storage,
    tensor,
    text,
    write_zip,
)

from ortho_cli.checkpoints.pickle_policy import admit
from ortho_cli.checkpoints.pickle_records import Made
from ortho_cli.checkpoints.pickle_tree import read_tree
from ortho_cli.checkpoints.pickles import PickleContents, read_pickle, scan_globals
from ortho_cli.checkpoints.tensors import TORCH_DTYPES, TensorInfo

CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
# dtypes without a storage class: torch writes them into its old format, and cannot read them back
UNTYPED = [
    f"dtype.{name}" for name in TORCH_DTYPES.values() if "float8" in name or name in ("uint16", "uint32", "uint64")
]
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


@pytest.fixture
def lightning() -> Iterator[type]:
    """The class that v1-5 uses as a key, in modules that exist only during the test."""
    modules = [CALLBACK.rsplit(".", depth)[0] for depth in (3, 2, 1)]
    made = type("ModelCheckpoint", (), {"__module__": modules[-1]})
    for name in modules:
        sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[modules[-1]])["ModelCheckpoint"] = made
    yield made
    for name in modules:
        del sys.modules[name]


def weights() -> dict[str, torch.Tensor]:
    """Dtypes, tied tensors, views, transposed and expanded views, parameters, scalars and empty tensors."""
    torch.manual_seed(0)
    large = torch.randn(6, 8)
    tied = torch.randn(4, 3)
    with_attributes = torch.randn(3)
    with_attributes.note = "x"  # type: ignore[attr-defined]
    return {
        "model.diffusion_model.a.weight": torch.randn(5, 7).half(),
        "model.diffusion_model.b.weight": torch.nn.Parameter(torch.randn(2, 3, 3, 3)),
        "position_ids": torch.arange(77)[None],
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
        "large": large,
        "view": large[2:5, 1:4],
        "rows": large[2:5],
        "transposed": large.T,
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "expanded": torch.randn(1, 4).expand(3, 4),
        "tied.a": tied,
        "tied.b": tied,
        "empty": torch.empty(0, 5),
        "frozen": torch.nn.Parameter(torch.randn(2), requires_grad=False),
        "attributes": with_attributes,
        "buffer": torch.nn.Buffer(torch.randn(3)),
        **{f"dtype.{name}": torch.arange(5).to(getattr(torch, name)) for name in TORCH_DTYPES.values()},
    }


def value_of(info: TensorInfo, data: bytes) -> torch.Tensor:
    """The tensor that an info describes, cut from the file's bytes with torch's own strides."""
    dtype = getattr(torch, TORCH_DTYPES[info.dtype])
    if info.numel == 0:
        return torch.empty(info.shape, dtype=dtype)
    strides = info.strides or torch.empty(info.shape, device="meta").stride()
    span = 1 + sum((size - 1) * stride for size, stride in zip(info.shape, strides, strict=True))
    raw = bytearray(data[info.offset : info.offset + span * dtype.itemsize])
    return torch.frombuffer(raw, dtype=dtype).as_strided(info.shape, strides)


def assert_equals_torch(contents: PickleContents, path: Path, expected: dict[str, torch.Tensor]) -> None:
    data = path.read_bytes()
    assert list(contents.tensors) == list(expected)
    for name, info in contents.tensors.items():
        ours, theirs = value_of(info, data), expected[name].detach()
        assert (info.name, info.path) == (name, path)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert (info.strides is None) == (theirs.is_contiguous() or theirs.numel() == 0)
        same = ours.contiguous().view(torch.uint8) if ours.ndim else ours[None].view(torch.uint8)
        assert torch.equal(same, theirs.reshape(ours.shape or (1,)).contiguous().view(torch.uint8))


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_lightning_checkpoint(zipped: bool, protocol: int, lightning: type, tmp_path: Path) -> None:
    path = tmp_path / "v1-5.ckpt"
    checkpoint = {
        "epoch": 12,
        "global_step": 840000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": weights()
        if zipped
        else {name: value for name, value in weights().items() if name not in UNTYPED},
        "callbacks": {lightning: {"monitor": "val/loss", "best": lightning(), "score": torch.tensor(0.5)}},
        "lr_schedulers": [{"_last_lr": [np.float64(1e-4), np.float32(1e-5)], "steps": np.arange(3)}],
    }
    torch.save(checkpoint, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    contents = read_pickle(path)
    assert_equals_torch(contents, path, torch.load(path, weights_only=False)["state_dict"])
    assert contents.placeholders == (CALLBACK,)
    assert set(contents.placeholders) < set(contents.globals)
    assert contents.notes == (
        "not read, beside the weights: epoch (12), global_step (840000), pytorch-lightning_version ('1.4.2'), "
        "callbacks (a dict of 1), lr_schedulers (a list of 1)",
        f"1 class outside the weights left inert, never imported: {CALLBACK}",
    )
    assert contents.tensors["tied.a"].offset == contents.tensors["tied.b"].offset
    assert scan_globals(path) == list(contents.globals)


def test_globals_agree_with_torch(lightning: type, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": weights(), "callbacks": {lightning: np.float64(1)}}, path)
    unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    assert CALLBACK in unsafe
    assert unsafe <= set(scan_globals(path))


@FORMATS
def test_module_state_dict_with_metadata(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    contents = read_pickle(path)
    assert_equals_torch(contents, path, model.state_dict())
    assert (contents.notes, contents.placeholders) == ((), ())


def _saved(value: object, path: Path) -> PickleContents:
    torch.save(value, path)
    return read_pickle(path)


def test_nested_state_dicts_are_unwrapped(tmp_path: Path) -> None:
    contents = _saved({"state_dict": {"state_dict": {"w": torch.ones(2)}, "step": 3}}, tmp_path / "x.pt")
    assert list(contents.tensors) == ["w"]
    assert contents.notes == ("not read, beside the weights: step (3)",)


@pytest.mark.parametrize("key", ["model", "module", "params_ema", "model_state_dict"])
def test_usual_name_is_taken_and_noted(key: str, tmp_path: Path) -> None:
    value = {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, key: {"w": torch.ones(2)}}
    contents = _saved(value, tmp_path / "x.pt")
    assert list(contents.tensors) == ["w"]
    assert contents.notes == (
        f"the weights were taken from the entry {key}",
        "not read, beside the weights: optimizer (a dict of 1)",
    )


def test_leftovers_are_noted(tmp_path: Path) -> None:
    extra = {"version": 3, "name": "x\x1b", "lists": [torch.ones(1)], "array": np.ones(2), 7: None, "set": {1, 2}}
    contents = _saved({"w": torch.ones(2), **extra}, tmp_path / "x.pt")
    assert list(contents.tensors) == ["w"]
    assert contents.notes == (
        "not tensors, left out of the weights: version (3), name ('x\\x1b'), lists (a list of 1) with tensors, "
        "array (an object of numpy._core.multiarray._reconstruct), 7 (None), set (an object of builtins.set)",
    )


def test_views_of_old_files(tmp_path: Path) -> None:
    """Files of before torch 0.4 name a part of a storage: elements 2 and 3 of six."""
    path = tmp_path / "x.pt"
    part = several(text("view"), number(2), number(2))
    fragment = tensor(numbers(2), numbers(1), number(0), storage(text("0"), 6, "FloatStorage", part))
    path.write_bytes(legacy(mapping(("w", fragment))))
    assert value_of(read_pickle(path).tensors["w"], path.read_bytes()).tolist() == [2.0, 3.0]


def test_ordered_dict_of_python_2(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    pairs = b"]" + b"](" + text("w") + tensor() + b"ea"
    path.write_bytes(legacy(called("collections", "OrderedDict", pairs)))
    assert value_of(read_pickle(path).tensors["w"], path.read_bytes()).tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


@pytest.mark.parametrize("rebuild", ["_rebuild_tensor", "_rebuild_tensor_v2"])
@pytest.mark.parametrize("zip64", [False, True])
@pytest.mark.parametrize("descriptor", [False, True])
def test_archives_of_every_writer(rebuild: str, zip64: bool, descriptor: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    entries = members(pickle_of(mapping(("w", tensor(rebuild=rebuild)))))
    for member in entries:
        member.descriptor = descriptor
    with open(path, "wb") as file:
        write_zip(file, entries, zip64=zip64)
    info = read_pickle(path).tensors["w"]
    assert path.read_bytes()[info.offset : info.offset + info.nbytes] == SIX_FLOATS


def test_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Sizes and offsets of more than 32 bits, in a file with a hole; torch reads the same values."""
    path = tmp_path / "v1-5-pruned.ckpt"
    count = 2**32 + 1024
    big = tensor(numbers(count), numbers(1), number(0), storage(text("1"), count, "ByteStorage"))
    small = tensor(of=storage(text("2")))
    pickled = pickle_of(mapping(("state_dict", mapping(("big", big), ("small", small)))))
    more = (Member("archive/data/1", count, descriptor=True), Member("archive/data/2", SIX_FLOATS, descriptor=True))
    with open(path, "wb") as file:
        write_zip(file, members(pickled, *more))
    tensors = read_pickle(path).tensors
    assert tensors["big"].nbytes == count
    assert tensors["small"].offset > 2**32
    with open(path, "rb") as file:
        file.seek(tensors["small"].offset)
        assert file.read(24) == SIX_FLOATS
    theirs = torch.load(path, mmap=True, weights_only=False)["state_dict"]
    assert torch.equal(theirs["small"], torch.arange(6.0).view(2, 3))


def test_reader_imports_neither_torch_nor_numpy(lightning: type, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": weights(), "callbacks": {lightning: np.float64(1)}}, path)
    code = (
        "import sys; from ortho_cli.checkpoints.pickles import read_pickle; "
        f"print(len(read_pickle({str(path)!r}).tensors)); "
        "print(sorted({'torch', 'numpy', 'pytorch_lightning'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split("\n") == [str(len(weights())), "[]", ""]


def _plain(value: Any) -> Any:
    """A tree as the Python objects that pickle would have made."""
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    if not isinstance(value, Made):
        return value
    args = [_plain(arg) for arg in value.args]
    if value.path == "builtins.dict":
        return {_plain(key): _plain(item) for key, item in value.pairs or ()}
    if value.path == "_codecs.encode":
        return args[0].encode(args[1])
    kinds = {"set": set, "frozenset": frozenset, "complex": complex, "bytes": bytes, "bytearray": bytearray}
    made = kinds[value.path.removeprefix("builtins.")](*args)
    return made.union(_plain(value.items or [])) if isinstance(made, set | frozenset) else made


_ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
_VALUES = st.recursive(
    _ATOMS | st.complex_numbers(allow_nan=False) | st.frozensets(_ATOMS) | st.sets(st.integers()),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@settings(deadline=None, max_examples=150)
@given(value=_VALUES, protocol=st.integers(0, 5))
def test_trees_equal_what_pickle_makes(value: object, protocol: int) -> None:
    tree = read_tree(pickle.dumps([value, value], protocol), admit)
    assert _plain(tree.root) == [value, value]


def test_classes_and_objects_stay_names() -> None:
    tree = read_tree(pickle_of(called("my.module", "Thing", imported("other", "Class"))), admit)
    assert isinstance(tree.root, Made)
    assert tree.root.path == "my.module.Thing"
    assert tree.globals == ("my.module.Thing", "other.Class")
