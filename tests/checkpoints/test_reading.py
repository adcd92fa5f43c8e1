"""Tensors read by position are what the library reads, whatever their type, place, rows or strides."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from safetensors_attacks import entry, packed

from ortho_cli.checkpoints.reading import TensorReader, row_blocks, tensor_bytes
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.checkpoints.tensors import TORCH_DTYPES, TensorInfo
from ortho_cli.errors import CheckpointError

Save = Callable[..., Path]


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal in type, shape and every bit (NaN, -0.0 and subnormals included)."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*flat) if left.numel() else True


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
def test_every_dtype_and_every_bit(dtype: str, tmp_path: Path, save: Save) -> None:
    kind = getattr(torch, TORCH_DTYPES[dtype])
    raw = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    values = (raw % 2 if dtype == "BOOL" else raw).view(kind)
    path = save(tmp_path / "x.safetensors", {"first": torch.ones(1, dtype=torch.uint8), "x": values.reshape(8, -1)})
    info = open_checkpoint(path).tensors["x"]
    with TensorReader() as reader:
        found = reader.read(info)
        assert same_bytes(found, load_file(path)["x"])
        assert bytes(tensor_bytes(found)) == bytes(raw % 2 if dtype == "BOOL" else raw)
        assert same_bytes(reader.read(info, slice(3, 5)), load_file(path)["x"][3:5])


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 5e-324])
def test_special_values_keep_their_bits(special: float, tmp_path: Path, save: Save) -> None:
    tensors = {str(kind): torch.tensor([special, 1.0], dtype=kind) for kind in (torch.float32, torch.float64)}
    path = save(tmp_path / "x.safetensors", tensors)
    with TensorReader() as reader:
        for name, info in open_checkpoint(path).tensors.items():
            assert same_bytes(reader.read(info), tensors[name])


@pytest.mark.parametrize("lead", range(8))
def test_any_offset(lead: int, tmp_path: Path) -> None:
    values = torch.arange(12, dtype=torch.float64).reshape(4, 3)
    fields = {"lead": entry((lead,), 0, lead), "x": entry((4, 3), lead, lead + 96, "F64")}
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed(fields, bytes(lead) + bytes(tensor_bytes(values))))
    info = open_checkpoint(path).tensors["x"]
    with TensorReader() as reader:
        assert torch.equal(reader.read(info), values)
        assert torch.equal(reader.read(info, slice(1, 3)), values[1:3])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows") / "x.safetensors"


EDGES = st.integers(-6, 6) | st.none()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), EDGES, EDGES)
def test_rows_are_those_of_a_slice(scratch: Path, shape: list[int], start: int | None, stop: int | None) -> None:
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    scratch.write_bytes(save({"x": values}))
    with TensorReader() as reader:
        found = reader.read(open_checkpoint(scratch).tensors["x"], slice(start, stop))
        assert found.dtype == torch.float32
        assert torch.equal(found, values[start:stop])


def test_rows_in_steps_are_refused(tmp_path: Path, save: Save) -> None:
    info = open_checkpoint(save(tmp_path / "x.safetensors", {"x": torch.ones(4, 2)})).tensors["x"]
    with TensorReader() as reader, pytest.raises(ValueError, match="steps of 2"):
        reader.read(info, slice(0, 4, 2))


STORAGE = torch.arange(60, dtype=torch.float32)
VIEWS = {
    "transposed": STORAGE.view(6, 10).T,
    "columns": STORAGE.view(6, 10)[:, 2:5],
    "steps": STORAGE[1::7],
    "permuted": STORAGE.view(3, 4, 5).permute(2, 0, 1),
    "expanded": STORAGE[3:6].view(3, 1).expand(3, 4),
    "offset": STORAGE.view(6, 10)[4:, 1:].T,
    "half": STORAGE.half().view(6, 10).T,
}


@pytest.mark.parametrize("name", VIEWS)
def test_strided_tensors_of_pickles(name: str, tmp_path: Path) -> None:
    torch.save({"x": VIEWS[name]}, tmp_path / "x.ckpt")
    info = open_checkpoint(tmp_path / "x.ckpt").tensors["x"]
    assert info.strides is not None
    with TensorReader() as reader:
        assert same_bytes(reader.read(info), VIEWS[name])
        assert same_bytes(reader.read_copy(info, slice(1, 3)), VIEWS[name][1:3])
    assert list(row_blocks(info, 1, 1)) == [slice(0, info.shape[0])]


def test_tied_and_contiguous_tensors_of_pickles(tmp_path: Path) -> None:
    tied = STORAGE.view(6, 10)
    torch.save({"a": tied, "b": tied, "part": tied[2:4], "scalar": STORAGE[7]}, tmp_path / "x.ckpt")
    tensors = open_checkpoint(tmp_path / "x.ckpt").tensors
    assert tensors["a"].offset == tensors["b"].offset
    with TensorReader() as reader:
        assert torch.equal(reader.read(tensors["part"]), tied[2:4])
        assert reader.read(tensors["scalar"]).item() == 7
        assert torch.equal(reader.read(tensors["b"], slice(5, 6)), tied[5:6])


def test_the_buffer_is_reused(tmp_path: Path, save: Save) -> None:
    path = save(tmp_path / "x.safetensors", {"a": torch.zeros(4, 4), "b": torch.ones(2, 4), "c": torch.ones(8, 8)})
    tensors = open_checkpoint(path).tensors
    with TensorReader() as reader:
        first = reader.read(tensors["a"])
        kept = reader.read_copy(tensors["a"])
        second = reader.read(tensors["b"])
        assert second.data_ptr() == first.data_ptr() != kept.data_ptr()
        assert torch.equal(first[:2], torch.ones(2, 4))  # overwritten, as it says
        assert torch.equal(kept, torch.zeros(4, 4))
        third = reader.read(tensors["c"])  # does not fit: a new buffer, and the old one lives on in `second`
        assert third.sum() == 64
        assert torch.equal(second, torch.ones(2, 4))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_files_are_opened_once_and_closed(tmp_path: Path, save: Save) -> None:
    infos = [open_checkpoint(save(tmp_path / f"{n}.safetensors", {"x": torch.ones(2)})).tensors["x"] for n in range(3)]
    before = open_files()
    with TensorReader() as reader:
        for info in infos * 3:
            reader.read(info)
        assert open_files() == before + 3
    assert open_files() == before


def test_a_file_that_changes_under_us_is_an_error(tmp_path: Path, save: Save) -> None:
    path = save(tmp_path / "x.safetensors", {"x": torch.ones(64)})
    info = open_checkpoint(path).tensors["x"]
    with TensorReader() as reader:
        reader.read(info)
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(CheckpointError, match="file ended inside tensor 'x'"):
            reader.read(info)
    path.unlink()
    with TensorReader() as reader, pytest.raises(CheckpointError, match="cannot be read: No such file") as caught:
        reader.read(info)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_another_file_under_the_name_is_an_error(kind: str, tmp_path: Path) -> None:
    path, before = tmp_path / f"x.{kind}", open_files()

    def write(value: float) -> None:
        tensors = {"x": torch.full((64,), value)}
        torch.save(tensors, tmp_path / "new") if kind == "ckpt" else (tmp_path / "new").write_bytes(save(tensors))
        os.replace(tmp_path / "new", path)

    write(1.0)
    info = open_checkpoint(path).tensors["x"]
    write(2.0)  # as long, at the same offset
    with TensorReader() as reader:
        with pytest.raises(CheckpointError, match="changed while it was read") as caught:
            reader.read(info)
        assert caught.value.where == str(path)
        assert reader.read(open_checkpoint(path).tensors["x"])[0] == 2
    assert open_files() == before


def test_what_torch_cannot_hold_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed({"x": entry((4,), 0, 2, "F4")}, bytes(2)))
    with TensorReader() as reader, pytest.raises(CheckpointError, match="'x' is F4, which torch cannot hold"):
        reader.read(open_checkpoint(path).tensors["x"])


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 50), st.integers(1, 40), st.integers(0, 7), st.integers(1, 4000))
def test_row_blocks_cover_every_row_once(rows: int, width: int, multiple: int, block_bytes: int) -> None:
    info = TensorInfo("x", "F32", (rows, width), Path("x"), 0)
    blocks = list(row_blocks(info, multiple, block_bytes))
    assert [row for block in blocks for row in range(rows)[block]] == list(range(rows))
    if multiple:
        assert all(block.start % multiple == 0 for block in blocks)
        assert all((block.stop - block.start) * width * 4 <= max(block_bytes, multiple * width * 4) for block in blocks)
    else:
        assert blocks == [slice(0, rows)]


def test_bytes_of_tensors_are_row_major() -> None:
    values = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    assert bytes(tensor_bytes(values.T)) == bytes(tensor_bytes(values.T.contiguous()))
    assert bytes(tensor_bytes(torch.ones(2, 2, requires_grad=True))) == bytes(tensor_bytes(torch.ones(2, 2)))
    assert bytes(tensor_bytes(torch.ones(0, 3))) == b""
    assert bytes(tensor_bytes(torch.tensor(3, dtype=torch.uint8))) == b"\3"
    assert tensor_bytes(values).obj is not None
    values[0, 0] = 7
    assert tensor_bytes(values)[0] == 7
