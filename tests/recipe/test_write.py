"""What is written as YAML reads back as the same data, whatever the text looks like; files are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ortho_cli.errors import OutputError
from ortho_cli.recipe.parse import parse_yaml
from ortho_cli.recipe.write import to_yaml, write_recipe

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
LOOKALIKES = st.sampled_from([
    "1e-4", "5e5", ".5", "8", "010", "true", "True", "on", "no", "null", "~", "", ".inf", "12:30", "2024-05-01", "<<",
    "=", "*a", "**.attn2.**=16", "&a", "!x", "{a,b}", "[a]", "a: b", "a #b", "- a", "? a", "%x", "@x", "`x", "|", ">",
    "---", "...", " a", "a ", "\t", "a\nb", "\n", "a\n", "\r", "\x85", "\u2028", "\ufeff", "\x1b[31m", "'", '"', "\\",
    "9" * 30, "1e999",
])  # fmt: skip
NUMBERS = st.integers(-(10**18), 10**18) | st.floats(allow_nan=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT | LOOKALIKES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries((TEXT | LOOKALIKES).filter(bool), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries((TEXT | LOOKALIKES).filter(bool), VALUES, max_size=4))
@example({"a": "1e-4", "b": 1e-4, "c": 1e16, "d": -1e-9, "e": [[], {}], "f": [["x"], [{"y": []}]]})
def test_reads_back(data: dict[str, object]) -> None:
    read, positions = parse_yaml(to_yaml(data) if data else "{}", "r.yaml")
    assert positions.problems == []
    assert read == data
    assert repr(read) == repr(data)  # 1 == 1.0 == True


def test_is_tidy() -> None:
    shared = ["a"]
    text = to_yaml({"verb": "merge", "list": shared, "again": shared, "long": "x y " * 60, "é": "ü"})
    assert text == f"verb: merge\nlist:\n  - a\nagain:\n  - a\nlong: '{'x y ' * 60}'\né: ü\n"


def test_writes_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    assert write_recipe(path, b"a: 1\r\n") == path
    assert path.read_bytes() == b"a: 1\r\n"
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_refuses_what_exists(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "r.yaml"
    if kind == "file":
        path.write_bytes(b"mine")
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="exists already") as caught:
        write_recipe(path, b"a: 1")
    assert caught.value.exit_code == 6
    assert caught.value.where == str(path)
    if kind == "file":
        assert path.read_bytes() == b"mine"
    write_recipe(path, b"a: 1", force=True)
    assert path.read_bytes() == b"a: 1"


def test_refuses_folders_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        write_recipe(tmp_path, b"a: 1", force=True)
    with pytest.raises(OutputError, match="No such file or directory"):
        write_recipe(tmp_path / "none" / "r.yaml", b"a: 1")


def test_a_failed_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"old")

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_recipe(path, b"new", force=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"r.yaml": b"old"}
