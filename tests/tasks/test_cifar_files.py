"""CIFAR in all its layouts; and pickles that are none are refused without being run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_sets import pixels, save_cifar_binary, save_cifar_pickle, save_cifar_python2

from ortho_cli.errors import RecipeError
from ortho_cli.tasks.cifar_files import find_cifar, read_cifar

KEYS = {"cifar10": "labels", "cifar100": "fine_labels"}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_pickles_of_python_3(tmp_path: Path, name: str, protocol: int) -> None:
    images = pixels(4, 3, 32)
    save_cifar_pickle(tmp_path / "train", images, [3, 1, 99, 0], KEYS[name], protocol)
    read, labels = read_cifar([tmp_path / "train"], name)
    assert torch.equal(read, torch.from_numpy(images))
    assert labels.tolist() == [3, 1, 99, 0]
    assert (read.dtype, labels.dtype) == (torch.uint8, torch.int64)


def test_the_pickles_that_are_handed_out_are_of_python_2(tmp_path: Path) -> None:
    images = pixels(3, 3, 32)
    path = tmp_path / "data_batch_1"
    save_cifar_python2(path, images, [9, 0, 4], "labels")
    peer = pickle.loads(path.read_bytes(), encoding="bytes")  # our own bytes, made above: the writer is right
    assert np.array_equal(peer[b"data"].reshape(-1, 3, 32, 32), images)
    read, labels = read_cifar([path], "cifar10")
    assert torch.equal(read, torch.from_numpy(images))
    assert labels.tolist() == [9, 0, 4]


def test_binary_records_and_their_last_label_byte(tmp_path: Path) -> None:
    images = pixels(3, 3, 32)
    save_cifar_binary(tmp_path / "ten.bin", images, [9, 0, 4])
    save_cifar_binary(tmp_path / "hundred.bin", images, [99, 0, 4], coarse=[19, 1, 2])
    for file, name, expected in (("ten.bin", "cifar10", [9, 0, 4]), ("hundred.bin", "cifar100", [99, 0, 4])):
        read, labels = read_cifar([tmp_path / file], name)
        assert torch.equal(read, torch.from_numpy(images))
        assert labels.tolist() == expected


def test_batches_are_found_whole_and_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    for number in (5, 3, 1, 2):
        save_cifar_python2(folder / f"data_batch_{number}", pixels(1, 3, 32, number), [number], "labels")
    assert find_cifar(tmp_path, "cifar10", "train") is None
    save_cifar_python2(folder / "data_batch_4", pixels(1, 3, 32, 4), [4], "labels")
    for root in (tmp_path, folder):
        paths = find_cifar(root, "cifar10", "train")
        assert paths is not None
        assert read_cifar(paths, "cifar10")[1].tolist() == [1, 2, 3, 4, 5]
    assert find_cifar(tmp_path, "cifar10", "eval") is None
    assert find_cifar(tmp_path, "cifar100", "train") is None


class Attack:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.proof}",)


def test_a_pickle_that_would_run_something_is_refused_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    path = tmp_path / "train"
    path.write_bytes(pickle.dumps({b"data": Attack(proof), b"labels": [1]}))
    with pytest.raises(RecipeError, match=r"imports \w+\.system") as caught:
        read_cifar([path], "cifar10")
    assert caught.value.where == str(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "expected a dict, found a list of 2"),
        ({b"data": np.zeros((1, 3072), np.uint8)}, "its labels are None"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["cat"]}, "its labels are a list of 1"),
        ({b"data": np.zeros((1, 3072), np.float32), b"labels": [1]}, "expected a row-major array of uint8"),
        ({b"data": np.asfortranarray(np.zeros((2, 3072), np.uint8)), b"labels": [1, 2]}, "row-major array of uint8"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1, 2]}, "2 labels, but 3,072 bytes"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, "its labels are a list of 0"),
        ({b"data": "\u2603", b"labels": [1]}, "expected a row-major array"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_of_something_else(tmp_path: Path, content: object, reason: str, protocol: int) -> None:
    (tmp_path / "train").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(RecipeError, match=reason):
        read_cifar([tmp_path / "train"], "cifar10")


@pytest.mark.parametrize("data", [b"", b"hello", b"\x80\x02}("])
def test_a_file_that_is_no_pickle(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "train").write_bytes(data)
    with pytest.raises(RecipeError, match="no cifar10 file: malformed pickle"):
        read_cifar([tmp_path / "train"], "cifar10")


@pytest.mark.parametrize("size", [0, 3072, 3074])
def test_a_binary_file_cut_short(tmp_path: Path, size: int) -> None:
    (tmp_path / "train.bin").write_bytes(bytes(size))
    with pytest.raises(RecipeError, match="no whole number of cifar10 records of 3073"):
        read_cifar([tmp_path / "train.bin"], "cifar10")


def test_a_file_far_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "train.bin").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(RecipeError, match="more than any CIFAR file"):
        read_cifar([tmp_path / "train.bin"], "cifar10")
