"""MNIST's idx files, plain and gzipped, whole or refused."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch
from picture_sets import pixels, save_mnist

from ortho_cli.errors import RecipeError
from ortho_cli.tasks.idx_files import find_mnist, read_idx


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("below", ["", "MNIST/raw"])
def test_both_files_of_a_split(tmp_path: Path, zipped: bool, below: str) -> None:
    images = pixels(5, 1, 28)
    save_mnist(tmp_path / below, "t10k", images, [5, 0, 4, 1, 9], zipped=zipped)
    found = find_mnist(tmp_path, "eval")
    assert found is not None
    assert torch.equal(read_idx(found[0], 3), torch.from_numpy(images[:, 0]))
    assert read_idx(found[1], 1).tolist() == [5, 0, 4, 1, 9]
    assert find_mnist(tmp_path, "train") is None
    found[1].unlink()
    assert find_mnist(tmp_path, "eval") is None


GOOD = struct.pack(">2I", 0x801, 2) + b"ab"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no idx file"),
        (GOOD[:6], "no idx file"),
        (struct.pack(">2I", 0x803, 2) + b"ab", "no idx file of 1-dimensional bytes"),
        (struct.pack(">2I", 0xD01, 2) + b"ab", "no idx file"),
        (GOOD[:-1], "asks for 2 bytes, the file has other"),
        (GOOD + b"c", "asks for 2 bytes, the file has other"),
        (struct.pack(">2I", 0x801, 0), "asks for 0 bytes"),
        (struct.pack(">2I", 0x801, 2**32 - 1) + b"ab", "asks for 4,294,967,295 bytes"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_what_is_no_such_file_is_refused(tmp_path: Path, data: bytes, reason: str, zipped: bool) -> None:
    path = tmp_path / ("x.gz" if zipped else "x")
    path.write_bytes(gzip.compress(data) if zipped else data)
    with pytest.raises(RecipeError, match=reason) as caught:
        read_idx(path, 1)
    assert caught.value.where == str(path)


PACKED = gzip.compress(GOOD, mtime=0)


@pytest.mark.parametrize("data", [b"no gzip at all", PACKED[:-9], PACKED[:10] + b"\xff" * 20])
def test_a_broken_gzip(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.gz").write_bytes(data)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_idx(tmp_path / "x.gz", 1)
