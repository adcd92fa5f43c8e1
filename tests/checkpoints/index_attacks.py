"""Sharded folders whose index lies: every way of facts 4.4 in which an `index.json` can be wrong, and those near it.

Each is (name, builder, pattern of the message); a builder turns a sound sharded folder into the attack and returns the
index. Beside the folder lies `outside.safetensors`, which no index may reach.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Case = tuple[str, Callable[[Path], Path], str]
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SIZE = 4 * 4 + 2 * 8


def sharded(folder: Path) -> Path:
    """A sound folder of two shards; returns its index."""
    folder.mkdir(parents=True)
    save_file({"a.weight": torch.ones(2, 2)}, folder / FIRST, {"format": "pt"})
    save_file({"b.weight": torch.ones(2, 2, 2).half()}, folder / SECOND, {"format": "pt", "second": "yes"})
    save_file({"b.weight": torch.ones(2, 2, 2).half()}, folder.parent / "outside.safetensors")
    return write_index(folder, {"a.weight": FIRST, "b.weight": SECOND})


def write_index(folder: Path, weight_map: Any, total_size: Any = SIZE, name: str = INDEX) -> Path:
    content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / name).write_text(json.dumps(content), "utf-8")
    return folder / name


def _shard_names() -> Iterator[Case]:
    plain = "is not a plain file name"
    names = {
        "parent": ("../outside.safetensors", plain),
        "parent-windows": ("..\\outside.safetensors", plain),
        "through-folder": ("sub/../" + SECOND, plain),
        "here": ("./" + SECOND, plain),
        "folder": ("sub/" + SECOND, plain),
        "folder-windows": ("sub\\" + SECOND, plain),
        "absolute": ("/etc/passwd.safetensors", plain),
        "drive": ("C:\\x.safetensors", plain),
        "drive-relative": ("C:x.safetensors", plain),
        "rooted": ("\\x.safetensors", plain),
        "unc": ("\\\\unc\\share\\x.safetensors", plain),
        "unc-slashes": ("//unc/share/x.safetensors", plain),
        "url": ("https://x/y.safetensors", plain),
        "home": ("~/x.safetensors", plain),
        "empty": ("", plain),
        "dot": (".", plain),
        "dot-dot": ("..", plain),
        "pickle": ("pytorch_model.bin", "is not of the kind"),
        "checkpoint": ("model.ckpt", "is not of the kind"),
        "no-suffix": ("passwd", "is not of the kind"),
        "itself": (INDEX, "is not of the kind"),
        "missing": ("model-00003-of-00002.safetensors", "is missing"),
        "nul": (SECOND[:5] + "\0.safetensors", r"'model\\u0000.safetensors' is missing"),
        "escape": ("\x1b[2J.safetensors", r"'\\u001b\[2J.safetensors' is missing"),
        "long": ("x" * 5000 + ".safetensors", "is missing"),
    }
    for name, (shard, pattern) in names.items():
        yield f"shard-{name}", _renamed(shard), pattern
    for name, value in {"number": 1, "null": None, "list": [SECOND], "object": {}}.items():
        yield f"shard-{name}", _renamed(value), "not text"


def _renamed(shard: Any) -> Callable[[Path], Path]:
    return lambda folder: write_index(folder, {"a.weight": FIRST, "b.weight": shard})


def _links() -> Iterator[Case]:
    def link(folder: Path, target: str) -> Path:
        (folder / SECOND).unlink()
        os.symlink(target, folder / SECOND)
        return folder / INDEX

    def beside(folder: Path) -> Path:  # a folder that only looks like a hub cache
        (folder / "blobs").mkdir()
        return link(folder, "../outside.safetensors")

    def prefix(folder: Path) -> Path:  # a neighbour whose name begins like the folder's
        twin = folder.with_name(folder.name + "-twin")
        twin.mkdir()
        shutil.copy(folder / SECOND, twin / SECOND)
        return link(folder, f"../{twin.name}/{SECOND}")

    out = "is a link out of the folder"
    yield "link-out", lambda folder: link(folder, "../outside.safetensors"), out
    yield "link-out-absolute", lambda folder: link(folder, str(folder.parent / "outside.safetensors")), out
    yield "link-beside-blobs", beside, out
    yield "link-to-namesake", prefix, out
    yield "link-to-nothing", lambda folder: link(folder, "none.safetensors"), "is missing"
    yield "link-to-itself", lambda folder: link(folder, SECOND), "is missing"
    yield "link-to-folder", lambda folder: link(folder, ".."), "is missing"


def _contents() -> Iterator[Case]:
    def raw(text: str | bytes) -> Callable[[Path], Path]:
        def build(folder: Path) -> Path:
            (folder / INDEX).write_bytes(text.encode() if isinstance(text, str) else text)
            return folder / INDEX

        return build

    pairs = f'"a.weight":"{FIRST}","b.weight":"{SECOND}"'
    unread, unmapped = "index cannot be read", "index has no weight_map"
    yield "empty", raw(""), unread
    yield "not-json", raw("{"), unread
    yield "not-utf-8", raw(b'{"weight_map": {"\xff": ""}}'), unread
    yield "bom", raw(b"\xef\xbb\xbf{}"), unread
    yield "deep", raw("[" * 100_000 + "]" * 100_000), unread
    yield "nan", raw(f'{{"metadata":{{"total_size":NaN}},"weight_map":{{{pairs}}}}}'), unread
    yield "list", raw("[]"), unmapped
    yield "nothing", raw("{}"), unmapped
    yield "no-names", raw('{"weight_map": {}}'), unmapped
    yield "map-is-list", raw(f'{{"weight_map": ["{FIRST}"]}}'), unmapped
    yield "map-twice", raw(f'{{"weight_map":{{{pairs}}},"weight_map":{{{pairs}}}}}'), "'weight_map' appears twice"
    yield "key-twice", raw(f'{{"weight_map":{{{pairs},"b.weight":"{FIRST}"}}}}'), "'b.weight' appears twice"
    yield "key-twice-escape", raw(f'{{"weight_map":{{"\\u001b":"{FIRST}","\\u001b":"{FIRST}"}}}}'), "appears twice"
    yield "11-MB", raw(f'{{"weight_map":{{{pairs}}}}}' + " " * 11_000_000), "is over the limit of 10,000,000"
    sizes: dict[str, tuple[Any, str]] = {
        "larger": (SIZE + 1, "says total_size 33, the shards hold 32"),
        "smaller": (SIZE - 1, "says total_size 31"),
        "zero": (0, "says total_size 0"),
        "negative": (-SIZE, "says total_size -32"),
        "files": (SIZE + 500, "says total_size 532"),
        "fraction": (31.5, "no number of bytes"),
        "endless": ("1e999", "no number of bytes"),
        "text": ("32", "no number of bytes"),
        "bool": (True, "no number of bytes"),
        "list": ([32], "no number of bytes"),
    }
    for name, (size, pattern) in sizes.items():
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": {"a.weight": FIRST, "b.weight": SECOND}})
        yield f"size-{name}", raw(text.replace('"1e999"', "1e999")), pattern


def _disagreements() -> Iterator[Case]:
    def missing(folder: Path) -> Path:
        return write_index(folder, {"a.weight": FIRST})

    def unlisted(folder: Path) -> Path:
        save_file({"b.weight": torch.ones(2), "c\x1b": torch.ones(1)}, folder / SECOND)
        return write_index(folder, {"a.weight": FIRST, "b.weight": SECOND}, None)

    def extra(folder: Path) -> Path:
        save_file({"b.weight": torch.ones(2), "c.weight": torch.ones(1)}, folder / SECOND)
        return write_index(folder, {"a.weight": FIRST, "b.weight": SECOND}, None)

    def twice(folder: Path) -> Path:
        save_file({"a.weight": torch.zeros(2, 2), "b.weight": torch.ones(2)}, folder / SECOND)
        return write_index(folder, {"a.weight": FIRST, "b.weight": SECOND}, None)

    def broken(folder: Path) -> Path:
        (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-1])
        return folder / INDEX

    def more(folder: Path) -> Path:
        return write_index(folder, {"a.weight": FIRST, "b.weight": SECOND, "c.weight": SECOND})

    def swapped(folder: Path) -> Path:
        return write_index(folder, {"a.weight": SECOND, "b.weight": FIRST})

    yield "shard-unlisted", missing, "says total_size 32, the shards hold 16"
    yield "key-missing", extra, "1 tensors are in the shards but not in the index, first 'c.weight'"
    yield "key-extra", more, "'c.weight' is listed in .* but is in no shard"
    yield "keys-swapped", swapped, "'a.weight' is listed in .* but lies in"
    yield "key-in-two-shards", twice, "'a.weight' is in two shards"
    yield "shard-broken", broken, "truncated"
    yield "shard-name-escape", unlisted, "cannot be printed"


def all_attacks() -> list[Case]:
    """Every case, in a fixed order."""
    return [*_shard_names(), *_links(), *_contents(), *_disagreements()]
