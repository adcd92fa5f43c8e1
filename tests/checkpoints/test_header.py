"""The header parser refuses what is wrong, and reads what is right as the safetensors library does."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_refused, assert_refused_by_verbs
from safetensors import SafetensorError, deserialize
from safetensors.torch import save
from safetensors_attacks import GOOD, Case, all_attacks, entry, packed

from ortho_cli.checkpoints import header
from ortho_cli.checkpoints.header import parse_header, printable, read_header
from ortho_cli.checkpoints.tensors import DTYPE_BITS, TORCH_DTYPES
from ortho_cli.errors import CheckpointError

ATTACKS = all_attacks()


def test_corpus_is_whole() -> None:
    assert len(ATTACKS) == len({name for name, _, _ in ATTACKS}) == 112


@pytest.mark.parametrize("case", ATTACKS, ids=lambda case: case[0])
def test_attack_is_one_error(case: Case, tmp_path: Path) -> None:
    _, build, pattern = case
    path = tmp_path / "attack" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(build())
    assert_refused(path, pattern)
    assert_refused(path.parent, pattern)
    (tmp_path / "work").mkdir()
    assert_refused_by_verbs(path, tmp_path / "work", pattern)


def read(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Tensors as our parser places them: name -> dtype, shape, bytes."""
    length = int.from_bytes(data[:8], "little")
    found = parse_header(data[8 : 8 + length], Path("x"), 8 + length, len(data)).tensors
    return {
        name: (info.dtype, info.shape, data[info.offset : info.offset + info.nbytes]) for name, info in found.items()
    }


def reference(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (item["dtype"], tuple(item["shape"]), bytes(item["data"])) for name, item in deserialize(data)}


NAMES = ["", "../../etc/passwd", "/a", "a b", "[link=x]", "[bold]", "権重", "é", "😀", "__metadata", "-o"]
VALID: dict[str, bytes] = {
    "good": GOOD,
    "no tensors": packed("{}"),
    "no tensors, spaces": packed("  {}   "),
    "line ends": packed(b"{\r\n\t}\n"),
    "empty metadata": packed({"__metadata__": {}}),
    "metadata": packed({"__metadata__": {"format": "pt", "": "", "x\n": "\x1b[31m\u202e"}, "a": entry()}, bytes(4)),
    "metadata last": packed({"a": entry(), "__metadata__": {"format": "pt"}}, bytes(4)),
    "any order": packed({"b": entry((2,), 4, 8, "F16"), "a": entry()}, bytes(range(8))),
    "scalar": packed({"a": entry((), 0, 4, "F32")}, bytes(range(4))),
    "16 dims": packed({"a": entry((1,) * 15 + (4,))}, bytes(4)),
    "empty": packed({"a": entry((0,), 0, 0)}),
    "empty, wide": packed({"a": entry((0, 2**62), 0, 0)}),
    "empty in front, between, behind": packed(
        {
            "a": entry((0, 3), 0, 0), "b": entry(), "c": entry((0,), 4, 4), "d": entry((2,), 4, 8, "F16"),
            "e": entry((5, 0), 8, 8),
        },
        bytes(range(8)),
    ),
    "odd offset": packed({"a": entry((1,), 0, 2, "F16"), "b": entry((3,), 2, 14, "F32")}, bytes(range(14))),
    "misaligned data": packed('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}} ', bytes(range(4))),
    "unknown fields": packed({"a": entry() | {"more": [1, {"x": None}]}}, bytes(4)),
    "names": packed({name: entry((1,), at, at + 1) for at, name in enumerate(NAMES)}, bytes(range(len(NAMES)))),
    "escaped name": packed('{"\\u00e9\\ud83d\\ude00":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALID)
def test_valid_files_are_read_as_the_library_reads_them(name: str) -> None:
    assert read(VALID[name]) == reference(VALID[name])


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_the_format(dtype: str) -> None:
    data = packed({"a": entry((8,), 0, DTYPE_BITS[dtype], dtype)}, bytes(range(DTYPE_BITS[dtype])))
    assert read(data) == reference(data)


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)], ids=str)
def test_every_dtype_that_torch_writes(dtype: str, shape: tuple[int, ...]) -> None:
    kind = getattr(torch, TORCH_DTYPES[dtype])
    raw = torch.randint(0, 2, (max(1, torch.Size(shape).numel()) * DTYPE_BITS[dtype] // 8,), dtype=torch.uint8)
    tensor = raw.view(kind)[: torch.Size(shape).numel()].reshape(shape)
    data = save({"x": tensor, "another.ü": torch.ones(3, dtype=torch.float16)}, {"format": "pt"})
    assert read(data) == reference(data)
    assert read(data)["x"][:2] == (dtype, shape)


def test_metadata_and_order_of_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(VALID["any order"])
    assert list(read_header(path).tensors) == ["a", "b"]
    path.write_bytes(VALID["metadata last"])
    found = read_header(path)
    assert found.metadata == {"format": "pt"}
    assert found.tensors["a"].offset == found.data_start == path.stat().st_size - 4
    assert found.tensors["a"].path == path


def test_unreadable_files_are_checkpoint_errors(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(CheckpointError, match=reason):
            read_header(path)


@pytest.mark.parametrize("key", ["shape", "dtype", "data_offsets", "more"])
def test_nesting_at_the_limit_of_the_stack(key: str) -> None:
    for depth in range(700, 1050):
        raw = json.dumps({"a": entry() | {key: "DEEP"}}).replace('"DEEP"', "[" * depth + "]" * depth)
        found = outcome(packed(raw, bytes(4)), read, CheckpointError)
        assert found is None or key == "more"  # in no case a RecursionError


def test_large_headers_are_read_and_larger_ones_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 300_000
    fields = ",".join(
        f'"layer.{n}.weight":{{"dtype":"U8","shape":[1],"data_offsets":[{n},{n + 1}]}}' for n in range(count)
    )
    data = packed("{" + fields + "}", bytes(count))
    found = read(data)
    assert len(found) == count
    assert found["layer.299999.weight"] == ("U8", (1,), b"\0")
    monkeypatch.setattr(header, "MAX_TENSORS", 200_000)
    with pytest.raises(CheckpointError, match="more than the limit of 200,000 tensors"):
        read(data)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"__metadata__":{' + b'"k" :"",' * 100_001 + b'"l":""}}',
        b'{"a":{"dtype":"U8","shape":[' + b"1," * 240_001 + b'1],"data_offsets":[0,1]}}',
        b"{" + b'"k":0,' * 100_001 + b'"l":0}',
    ],
    ids=["metadata", "sizes", "keys"],
)
def test_headers_that_would_fill_the_memory_are_not_parsed(raw: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_TENSORS", 20_000)
    monkeypatch.setattr(header, "parse_strict", None)
    with pytest.raises(CheckpointError, match="more than the limit of 20,000 tensors"):
        parse_header(raw, Path("x"), 8 + len(raw), 9 + len(raw))


def test_printable_hides_what_paints() -> None:
    assert printable("a\x1b[31m\u202eb\n") == "a\\u001b[31m\\u202eb\\u000a"
    assert printable("权重 é 😀") == "权重 é 😀"


def outcome(data: bytes, reader: Callable[[bytes], Any], error: type[Exception]) -> Any:
    try:
        return reader(data)
    except error:
        return None


SEED = packed(
    '{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
    '"b":{"dtype":"F16","shape":[2],"data_offsets":[8,12]},"e":{"dtype":"U8","shape":[0],"data_offsets":[12,12]}}  ',
    bytes(range(12)),
)
WORDS = '{ } [ ] , : " \\ 0 1 2 4 8 12 -1 -0 1.0 1e0 true null NaN "a" "w" F64 BF16 F4 \\u0061 \\ud800'
TOKENS = [*WORDS.encode().split(), b"\0", b"\xff", b"\xc3\xa9", b"\n", b" ", b"\x1b", b"99999999999999999999"]


def mutant(rng: random.Random) -> bytes:
    data = bytearray(SEED)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(8, len(data) - 12)
        kind = rng.randrange(5)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            data[at : at + 1] = rng.choice(TOKENS)
        elif kind == 2:
            data[at:at] = rng.choice(TOKENS)
        elif kind == 3:
            del data[at : at + rng.randrange(1, 20)]
        else:
            end = at + rng.randrange(1, 60)
            data[at:at] = data[at:end]
    if rng.random() < 0.9:  # the length of the header as it is now
        data[:8] = (len(data) - 20).to_bytes(8, "little")
    return bytes(data)


def test_mutations_are_refused_or_read_as_the_library_reads_them() -> None:
    rng = random.Random(0)
    read_by_both = refused_by_us_only = 0
    for _ in range(20_000):
        data = mutant(rng)
        ours = outcome(data, read, CheckpointError) if int.from_bytes(data[:8], "little") <= len(data) - 8 else None
        theirs = outcome(data, reference, SafetensorError)
        assert ours is None or ours == theirs, data
        read_by_both += ours is not None
        refused_by_us_only += ours is None and theirs is not None
    assert read_by_both > 300
    assert 0 < refused_by_us_only < 2_000  # repeated keys, unprintable names


TEXTS = st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "U8", "F16", "a"]) | st.text(max_size=3)
NUMBERS = st.integers(-1, 9) | st.sampled_from([0.0, 2**63, 2**64, 10**30, True])
VALUES = st.recursive(
    NUMBERS | TEXTS | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F16", "F4", "BOOL"]) | TEXTS,
        "shape": st.lists(NUMBERS, max_size=3) | VALUES,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | VALUES,
    }
)


@settings(deadline=None, max_examples=400)
@given(st.dictionaries(TEXTS, ENTRIES | VALUES, max_size=3), st.binary(max_size=12))
def test_any_header_is_refused_or_read_as_the_library_reads_it(fields: dict[str, Any], data: bytes) -> None:
    raw = packed(fields, data)
    ours = outcome(raw, read, CheckpointError)
    assert ours is None or ours == outcome(raw, reference, SafetensorError)
