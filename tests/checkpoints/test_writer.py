"""Files written by streaming are those the reference library reads, byte for byte the same each time, or nothing."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from safetensors_attacks import packed

from ortho_cli.checkpoints import writer
from ortho_cli.checkpoints.header import read_header
from ortho_cli.checkpoints.output import atomic
from ortho_cli.checkpoints.reading import tensor_bytes
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.checkpoints.tensors import DTYPE_BITS, TORCH_DTYPES
from ortho_cli.checkpoints.writer import Piece, computed, copied, file_bytes, write_file
from ortho_cli.errors import CheckpointError, NumericsError, OutputError

Tensors = dict[str, torch.Tensor]


def of(name: str, tensor: torch.Tensor, parts: int = 1) -> Piece:
    """A computed piece, produced in so many buffers."""
    names = {value: key for key, value in TORCH_DTYPES.items()}

    def produce() -> Iterator[memoryview]:
        raw = tensor_bytes(tensor)
        for part in range(parts):
            yield raw[len(raw) * part // parts : len(raw) * (part + 1) // parts]

    return computed(name, names[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), produce)


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, Tensors]:
    """A file of every type torch has, and its tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {"empty": torch.ones(0, 3), "scalar": torch.tensor(2.5), "権重 [x]": torch.ones(3)}
    for number, dtype in enumerate(sorted(TORCH_DTYPES)):
        width = DTYPE_BITS[dtype] // 8
        raw = torch.randint(0, 2, (number + 3, 5 * width), dtype=torch.uint8, generator=generator)
        tensors[f"t.{dtype}"] = raw.view(getattr(torch, TORCH_DTYPES[dtype]))
    save_file(tensors, tmp_path / "source.safetensors", {"format": "pt"})
    return tmp_path / "source.safetensors", tensors


def equal_files(path: Path, tensors: Tensors) -> bool:
    found = load_file(path)
    raw = {name: bytes(tensor_bytes(tensor)) for name, tensor in tensors.items()}
    return {name: (tensor.dtype, tensor.shape, bytes(tensor_bytes(tensor))) for name, tensor in found.items()} == {
        name: (tensor.dtype, tensor.shape, raw[name]) for name, tensor in tensors.items()
    }


def test_copies_are_read_by_the_library(source: tuple[Path, Tensors], tmp_path: Path) -> None:
    path, tensors = source
    pieces = [copied(info) for info in open_checkpoint(path).tensors.values()]
    size = write_file(tmp_path / "out.safetensors", pieces, {"format": "pt", "ü": "[bold]\n"})
    assert (
        size == (tmp_path / "out.safetensors").stat().st_size == file_bytes(pieces, {"format": "pt", "ü": "[bold]\n"})
    )
    assert equal_files(tmp_path / "out.safetensors", tensors)
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "ü": "[bold]\n"}


def test_the_bytes_are_those_of_the_library(source: tuple[Path, Tensors], tmp_path: Path) -> None:
    pieces = [of(name, tensor) for name, tensor in source[1].items()]
    write_file(tmp_path / "out", pieces, {"format": "pt"})
    assert (tmp_path / "out").read_bytes() == source[0].read_bytes()
    write_file(tmp_path / "out", pieces, {})
    assert (tmp_path / "out").read_bytes() == save(source[1])


def test_computed_copied_renamed_and_reshaped_together(source: tuple[Path, Tensors], tmp_path: Path) -> None:
    path, tensors = source
    infos = open_checkpoint(path).tensors
    pieces = [copied(infos["t.F32"], "renamed", (5, *infos["t.F32"].shape[:1])), of("new", torch.arange(1000.0), 7)]
    pieces += [copied(info) for name, info in infos.items() if name != "t.F32"]
    random.Random(0).shuffle(pieces)
    write_file(tmp_path / "out", pieces, {"format": "pt"})
    expected = {name: tensor for name, tensor in tensors.items() if name != "t.F32"}
    expected |= {"renamed": tensors["t.F32"].reshape(5, -1), "new": torch.arange(1000.0)}
    assert equal_files(tmp_path / "out", expected)


def test_strided_tensors_of_pickles_become_row_major(tmp_path: Path) -> None:
    values = torch.arange(12.0).reshape(3, 4)
    torch.save({"x": values.T, "y": values}, tmp_path / "x.ckpt")
    write_file(tmp_path / "out", [copied(info) for info in open_checkpoint(tmp_path / "x.ckpt").tensors.values()], {})
    assert equal_files(tmp_path / "out", {"x": values.T.contiguous(), "y": values})


def test_same_pieces_same_bytes_in_any_order(source: tuple[Path, Tensors], tmp_path: Path) -> None:
    infos = open_checkpoint(source[0]).tensors
    pieces = [*(copied(info) for info in infos.values()), of("new", torch.arange(100.0))]
    seen = set()
    for seed in range(4):
        random.Random(seed).shuffle(pieces)
        metadata = dict(sorted({"a": "1", "b": "2"}.items(), reverse=bool(seed % 2)))
        write_file(tmp_path / "out", pieces, metadata)
        seen.add((tmp_path / "out").read_bytes())
    assert len(seen) == 1


def test_data_is_aligned(source: tuple[Path, Tensors], tmp_path: Path) -> None:
    for length in range(9):
        pieces = [copied(info) for info in open_checkpoint(source[0]).tensors.values()]
        write_file(tmp_path / "out", pieces, {"x": "y" * length})
        found = read_header(tmp_path / "out")
        assert found.data_start % 8 == 0
        for info in found.tensors.values():
            assert info.offset % (DTYPE_BITS[info.dtype] // 8) == 0, info


def test_misaligned_inputs_come_out_aligned(tmp_path: Path) -> None:
    header = (
        '{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},"b":{"dtype":"F32","shape":[2],"data_offsets":[2,10]}} '
    )
    (tmp_path / "in.safetensors").write_bytes(packed(header, bytes(range(10))))
    infos = open_checkpoint(tmp_path / "in.safetensors").tensors
    assert infos["b"].offset % 4
    write_file(tmp_path / "out", [copied(info) for info in infos.values()], {})
    out = read_header(tmp_path / "out").tensors
    raw = (tmp_path / "out").read_bytes()
    assert {name: raw[info.offset : info.offset + info.nbytes] for name, info in out.items()} == {
        "a": bytes(range(2)), "b": bytes(range(2, 10))
    }  # fmt: skip
    assert out["b"].offset % 8 == 0


def test_neighbouring_ranges_are_copied_as_one(source: tuple[Path, Tensors]) -> None:
    infos = open_checkpoint(source[0]).tensors
    everything = [copied(info) for info in infos.values()]
    _, placed = writer._layout(everything, {})
    assert len(writer._merged(placed)) == 1  # the order of the reference writer is ours
    middle = sorted(infos)[len(infos) // 2]
    _, placed = writer._layout([piece for piece in everything if piece.name != middle], {})
    ranges = writer._merged(placed)
    assert len(ranges) == 2
    assert sum(item.count for item in ranges) == sum(i.nbytes for i in infos.values()) - infos[middle].nbytes


def kernel_refuses(number: int) -> Callable[..., int]:
    def copy(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return copy


@pytest.mark.parametrize("how", ["EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP", "EPERM", "zero", "missing", "short"])
def test_copies_without_the_kernel(
    how: str, source: tuple[Path, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.copy_file_range
    if how == "missing":
        monkeypatch.delattr(os, "copy_file_range")
    elif how == "zero":
        monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    elif how == "short":
        monkeypatch.setattr(os, "copy_file_range", lambda a, b, count, *at: real(a, b, min(count, 7), *at))
    else:
        monkeypatch.setattr(os, "copy_file_range", kernel_refuses(getattr(errno, how)))
    monkeypatch.setattr(writer, "BUFFER_BYTES", 64)
    write_file(tmp_path / "out", [copied(info) for info in open_checkpoint(source[0]).tensors.values()], {})
    assert equal_files(tmp_path / "out", source[1])


def test_a_disk_that_takes_no_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing back early is asked for where it pays, and only asked for."""
    asked: list[int] = []

    def refuse(descriptor: int, offset: int, count: int, advice: int) -> None:
        asked.append(count)
        raise OSError(errno.ENOSYS, "no advice")

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    tensors = {"a": torch.arange(400_000.0), "b": torch.arange(300_000.0), "c": torch.ones(3)}
    save_file(tensors, tmp_path / "in.safetensors")
    infos = open_checkpoint(tmp_path / "in.safetensors").tensors
    write_file(tmp_path / "out.safetensors", [copied(infos["a"]), of("b", tensors["b"], 3), of("c", tensors["c"])], {})
    assert equal_files(tmp_path / "out.safetensors", tensors)
    assert sorted(asked) == [1_200_000, 1_600_000]


def test_progress_counts_every_byte(source: tuple[Path, Tensors], tmp_path: Path) -> None:
    counts: list[int] = []
    pieces = [*(copied(info) for info in open_checkpoint(source[0]).tensors.values()), of("new", torch.ones(99), 3)]
    write_file(tmp_path / "out", pieces, {}, advance=counts.append)
    assert sum(counts) == sum(piece.nbytes for piece in pieces)


def failing(error: BaseException) -> Piece:
    def produce() -> Iterator[bytes]:
        yield bytes(8)
        raise error

    return computed("x", "F32", (4,), produce)


def attempt(output: Path, pieces: list[Piece]) -> None:
    with atomic(output) as partial:
        write_file(partial, pieces, {})


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
        (OSError(errno.EIO, "Input/output error"), OutputError),
        (NumericsError("not finite"), NumericsError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryError),
    ],
)
def test_a_failure_leaves_nothing(
    error: BaseException, raised: type[BaseException], source: tuple[Path, Tensors], tmp_path: Path
) -> None:
    pieces = [failing(error), *(copied(info) for info in open_checkpoint(source[0]).tensors.values())]
    before = threading.active_count()
    with pytest.raises(raised) as caught:
        attempt(tmp_path / "new" / "out.safetensors", pieces)
    if isinstance(caught.value, OutputError):
        assert caught.value.exit_code == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.safetensors"]
    assert threading.active_count() == before


def test_a_full_disk_in_the_copying_thread(
    source: tuple[Path, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", kernel_refuses(errno.ENOSPC))
    with pytest.raises(OutputError, match="No space left"):
        attempt(tmp_path / "out", [copied(info) for info in open_checkpoint(source[0]).tensors.values()])
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


LIMITED = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from ortho_cli.checkpoints.output import atomic
from ortho_cli.checkpoints.writer import computed, write_file
from ortho_cli.errors import OutputError
try:
    with atomic(Path(sys.argv[1])) as partial:
        write_file(partial, [computed("x", "U8", (200_000,), lambda: iter([bytes(200_000)]))], {})
except OutputError as error:
    sys.exit(f"{error.exit_code}: {error.message}")
"""


def test_a_system_that_limits_files(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "out.safetensors")], capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == "6: cannot be written: File too large"
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_shrink_or_vanish_are_input_errors(source: tuple[Path, Tensors], tmp_path: Path) -> None:
    path, _ = source
    # Without their stamp, as if the file had shrunk only after it was opened.
    pieces = [copied(replace(info, stamp=None)) for info in open_checkpoint(path).tensors.values()]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="ended while it was copied") as caught:
        attempt(tmp_path / "out", pieces)
    assert caught.value.where == str(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        attempt(tmp_path / "out", pieces)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["another file", "other content", "computed from another"])
def test_inputs_replaced_since_they_were_planned(how: str, source: tuple[Path, Tensors], tmp_path: Path) -> None:
    path, tensors = source
    infos = open_checkpoint(path).tensors
    pieces = [copied(info) for info in infos.values()]
    other = bytes(reversed(path.read_bytes()))  # as long
    if how == "other content":
        path.write_bytes(other)
        os.utime(path, ns=(0, 0))
    else:
        status = path.stat()
        (tmp_path / "new").write_bytes(other)
        os.replace(tmp_path / "new", path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    if how == "computed from another":
        piece = replace(infos["t.F32"], strides=(1, tensors["t.F32"].shape[0]))
        pieces = [copied(piece)]
    with pytest.raises(CheckpointError, match="changed while it was read") as caught:
        attempt(tmp_path / "out", pieces)
    assert caught.value.where == str(path)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("count", [0, 7, 9])
def test_computed_bytes_that_are_not_those_planned(count: int, tmp_path: Path) -> None:
    piece = computed("x", "F32", (2,), lambda: iter([bytes(count)]))
    with pytest.raises(OutputError, match=f"tensor 'x' was computed as {count} bytes, 8 were planned"):
        attempt(tmp_path / "out", [piece])
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = save({"y": torch.ones(2)})

    def damage(content: bytes) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            os.pwrite(descriptor, content, 0)

        return fsync

    for content, pattern in ((other, "does not hold the tensors"), (b"\xff" * 8, "cannot be read back: not a safe")):
        monkeypatch.setattr(os, "fsync", damage(content))
        with pytest.raises(OutputError, match=pattern) as caught:
            write_file(tmp_path / "out", [of("x", torch.ones(2))], {})
        assert caught.value.where == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["x", "x"], "two tensors have the name 'x'"),
        (["__metadata__"], "no place for a tensor named '__metadata__'"),
        (["a\x1b[2J"], r"no place for a tensor named 'a\\\\u001b"),
    ],
)
@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_names_that_no_file_can_hold(names: list[str], pattern: str, metadata: dict[str, str], tmp_path: Path) -> None:
    pieces = [of(name, torch.ones(2)) for name in names]
    for act in (lambda: file_bytes(pieces, metadata), lambda: write_file(tmp_path / "out", pieces, metadata)):
        with pytest.raises(CheckpointError, match=pattern):
            act()
    assert list(tmp_path.iterdir()) == []


def test_ranges_are_copied_while_the_rest_is_computed(source: tuple[Path, Tensors], tmp_path: Path) -> None:
    copied_bytes = threading.Event()

    def produce() -> Iterator[bytes]:
        assert copied_bytes.wait(10), "nothing was copied while this piece was computed"
        yield bytes(4)

    def advance(count: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            copied_bytes.set()

    pieces = [computed("slow", "F32", (1,), produce), *map(copied, open_checkpoint(source[0]).tensors.values())]
    write_file(tmp_path / "out", pieces, {}, advance=advance)
    assert equal_files(tmp_path / "out", source[1] | {"slow": torch.zeros(1)})
