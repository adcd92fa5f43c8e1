"""No file makes the pickle reader run code, crash, hang, or report a tensor outside the file."""

from __future__ import annotations

import io
import pickle
import random
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pickle_assembler import CANARY, checkpoint, legacy, mapping, tensor
from pickle_attacks import all_attacks, write_attacks

from ortho_cli.checkpoints import pickle_tree, pickles
from ortho_cli.checkpoints.pickles import PickleContents, read_pickle, scan_globals
from ortho_cli.checkpoints.tensors import DTYPE_BITS
from ortho_cli.errors import CheckpointError

CASES = all_attacks()
NAMES = [name for name, _, _ in CASES]
SPECIAL = ["missing", "folder", "pipe"]
PATTERNS = {name: pattern for name, _, pattern in CASES} | {
    "missing": "No such file", "folder": "not a file", "pipe": "not a file"
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return dict(write_attacks(tmp_path_factory.mktemp("attacks")))


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every payload would leave a file in the working directory."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / CANARY).exists(), "the pickle was run"


def test_corpus_is_whole(corpus: dict[str, Path]) -> None:
    assert len(NAMES) == len(set(NAMES)) == 331
    assert [*corpus] == NAMES + SPECIAL


@pytest.mark.parametrize("name", NAMES + SPECIAL)
def test_attack_is_one_error(name: str, corpus: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_pickle(corpus[name])
    error = caught.value
    assert type(error) is CheckpointError
    assert error.exit_code == 4
    assert error.where == str(corpus[name])
    assert re.search(PATTERNS[name], error.message)
    assert error.message.isprintable()
    assert len(error.message) < 500


@pytest.mark.parametrize("name", ["system-p0-inside", "system-p4-beside", "exec-p2-inside", "exec-p5-beside"])
def test_payloads_would_run(name: str, corpus: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(corpus[name]) as archive:
        pickle.loads(archive.read("archive/data.pkl"))
    (tmp_path / CANARY).unlink()  # fails unless the payload ran


@pytest.mark.parametrize("name", NAMES + SPECIAL)
def test_scan_never_fails_otherwise(name: str, corpus: dict[str, Path]) -> None:
    try:
        found = scan_globals(corpus[name])
    except CheckpointError as error:
        assert error.where == str(corpus[name])
    else:
        assert all(path.isprintable() for path in found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("system-p0-inside", ["posix.system"]),
        ("system-p5-beside", ["posix.system"]),
        ("exec-p2-beside", ["builtins.exec"]),
        ("names-from-memo", ["os.system"]),
        ("inst", ["os.system"]),
        ("obj", ["os.system"]),
        ("ext-84", ["copyreg.extension_1"]),
        ("commands-p2-beside", ["subprocess.getoutput"]),
        ("getattr-chain", ["builtins.getattr", "builtins.__import__"]),
        ("bare-payload", ["posix.system"]),
        ("bare-payload-p0", ["posix.system"]),
        ("legacy-object", ["os.system"]),
        ("import-of-escape", [r"'torch.\x1b[2J'"]),
    ],
)
def test_scan_lists_what_was_refused(name: str, expected: list[str], corpus: dict[str, Path]) -> None:
    weights = {"torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "collections.OrderedDict"}
    assert [path for path in scan_globals(corpus[name]) if path not in weights] == expected


def test_scan_names_imports_before_the_damage(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(b"cos\nsystem\n(S'ls'\ntR")
    with pytest.raises(CheckpointError, match="malformed") as caught:
        scan_globals(tmp_path / "x.pkl")
    assert caught.value.hint == "imports before that: os.system"


def test_limits_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.ckpt").write_bytes(checkpoint())
    assert list(read_pickle(tmp_path / "x.ckpt").tensors) == ["w"]
    with monkeypatch.context() as limited:
        limited.setattr(pickles, "MAX_PICKLE_BYTES", 64)
        with pytest.raises(CheckpointError, match="at most 64 are read"):
            read_pickle(tmp_path / "x.ckpt")
    monkeypatch.setattr(pickle_tree, "MAX_OPCODES", 20)
    with pytest.raises(CheckpointError, match="more than 20 opcodes"):
        read_pickle(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("beside", "shown"),
    [
        (b"]" * 200_000 + b"a" * 199_999, "beside (a list of 1)"),
        (b")" + b"2\x86" * 60, "beside (a tuple of 2)"),  # as long as 2**60 when printed or hashed
        (b"(" + b")" + b"2\x86" * 60 + b"Nd", "beside (a dict of 1)"),
        (b"}r\xff\xff\xff\xff", "beside (a dict of 0)"),  # a memo number that `pickle` would allocate 64 GB for
        (b"c__main__\nX\n)R}q\x01(X\x0a\0\0\0__reduce__Nub", "beside (an object of __main__.X)"),
        (b"c__main__\nX\n(NNtR(NNe(NNu", "beside (an object of __main__.X)"),
        (b"cbuiltins\nrange\n(I1000000000000\ntR", "beside (an object of builtins.range)"),
        (b"L" + b"9" * 4000 + b"L\n", "beside (an integer of 13288 bits)"),
    ],
)
def test_harmless_extremes_are_read(beside: bytes, shown: str, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(checkpoint(beside=beside))
    contents = read_pickle(tmp_path / "x.ckpt")
    assert list(contents.tensors) == ["w"]
    assert contents.notes[0] == f"not read, beside the weights: {shown}"


def _mutants(good: bytes, count: int, seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(data))
            change = rng.randrange(4)
            if change == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif change == 1:
                data[at] = rng.choice(b"\0\1\x7f\x80\xff.()]}Rbtuscq0")
            elif change == 2:
                del data[at : at + rng.randrange(1, 9)]
            else:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
        yield bytes(data)


def _saved(zipped: bool) -> bytes:
    file = io.BytesIO()
    value = {"state_dict": {"a": torch.ones(3, 2), "b": torch.nn.Parameter(torch.ones(2).half())}, "epoch": 3}
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@pytest.mark.parametrize(
    ("good", "enough"),
    [
        (_saved(zipped=True), 10),
        (_saved(zipped=False), 10),
        (checkpoint(beside=b"}"), 10),
        (legacy(mapping(("w", tensor()))), 5),
    ],
    ids=["zip", "legacy", "small-zip", "small-legacy"],
)
def test_mutations_end_in_an_error_or_a_sound_result(good: bytes, enough: int, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    outcomes = {True: 0, False: 0}
    for data in _mutants(good, 300, seed=len(good)):
        path.write_bytes(data)
        try:
            contents = read_pickle(path)
        except CheckpointError:
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        assert isinstance(contents, PickleContents)
        for info in contents.tensors.values():
            steps = zip(info.shape, info.strides or (), strict=False)
            span = (
                info.nbytes
                if info.strides is None
                else (1 + sum((n - 1) * step for n, step in steps)) * DTYPE_BITS[info.dtype] // 8
            )
            assert 0 <= info.offset <= info.offset + span <= len(data)
    assert outcomes[True] >= enough
    assert outcomes[False] >= enough
