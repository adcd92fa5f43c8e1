"""Tiny picture sets in every local layout, written by hand, with the pixels and labels that a reader must give back."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ortho_cli.recipe.data import Images

Pixels = NDArray[np.uint8]


def section(name: str, **settings: Any) -> Images:
    """A recipe's `data` section."""
    return Images.model_validate({"name": name, **settings})


def pixels(count: int, channels: int, size: int, seed: int = 0) -> Pixels:
    """Random pictures `(count, channels, size, size)`."""
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def save_picture(path: Path, picture: Pixels) -> None:
    """One picture `(channels, height, width)` as a PNG, whatever the suffix says."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)).save(path, format="PNG")


def save_mnist(folder: Path, split: str, images: Pixels, labels: Sequence[int], *, zipped: bool) -> None:
    """MNIST's two idx files of a split (`train` or `t10k`)."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "images-idx3-ubyte": struct.pack(">4I", 0x803, *images[:, 0].shape) + images.tobytes(),
        "labels-idx1-ubyte": struct.pack(">2I", 0x801, len(labels)) + bytes(labels),
    }
    for name, data in files.items():
        if zipped:
            (folder / f"{split}-{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / f"{split}-{name}").write_bytes(data)


def save_cifar_binary(path: Path, images: Pixels, labels: Sequence[int], coarse: Sequence[int] | None = None) -> None:
    """One binary CIFAR file; with `coarse` labels it is CIFAR-100's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    heads = (
        [bytes([label]) for label in labels] if coarse is None else [bytes(p) for p in zip(coarse, labels, strict=True)]
    )
    path.write_bytes(b"".join(head + image.tobytes() for head, image in zip(heads, images, strict=True)))


def save_cifar_pickle(path: Path, images: Pixels, labels: Sequence[int], key: str, protocol: int) -> None:
    """One pickled CIFAR file as Python 3 writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = np.ascontiguousarray(images.reshape(len(images), -1))
    content = {
        b"data": flat,
        key.encode(): list(labels),
        b"filenames": [b"a.png"] * len(labels),
        b"batch_label": b"one",
    }
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def save_cifar_python2(path: Path, images: Pixels, labels: Sequence[int], key: str) -> None:
    """One pickled CIFAR file as Python 2 wrote it, opcode by opcode: the form in which CIFAR is handed out."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    count = len(images)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text("b") + b"\x87R"
        + b"(" + number(1) + number(count) + number(3072) + b"\x86"
        + b"cnumpy\ndtype\n" + text("u1") + number(0) + number(1) + b"\x87R"
        + b"(" + number(3) + text("|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
        + b"\x89T" + struct.pack("<i", images.nbytes) + images.tobytes() + b"tb"
    )  # fmt: skip
    listed = b"](" + b"".join(number(label) for label in labels) + b"e"
    path.write_bytes(b"\x80\x02}(" + text("data") + array + text(key) + listed + b"u.")
