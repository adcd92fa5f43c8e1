"""YAML text to data: YAML 1.2's types, and everything that recipes refuse."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.load import MAX_BYTES, load_yaml
from ortho_cli.recipe.parse import MAX_DEPTH, MAX_DIGITS, MAX_SHOWN, Place, parse_yaml


def refused(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        data, positions = parse_yaml(text, "r.yaml")
        pytest.fail(f"read as {data}, {positions.problems}")
    return caught.value


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4), ("1E-4", 1e-4), ("5e5", 5e5), (".5", 0.5), ("-.5", -0.5), ("1.", 1.0), ("+1.5e+3", 1500.0),
        ("8", 8), ("-3", -3), ("+3", 3), ("010", 10), ("0", 0), ("-0", 0), ("9" * MAX_DIGITS, 10**MAX_DIGITS - 1),
        ("true", True), ("false", False), ("null", None), ("~", None), ("", None),
        (".inf", math.inf), ("-.inf", -math.inf),
        *((text, text) for text in ("on", "off", "yes", "no", "y", "True", "FALSE", "Null", "NaN", "inf", "Infinity")),
        *((text, text) for text in ("12:30", "1:2:3", "2024-05-01", "2024-05-01 10:00:00", "1_000", "0x1F", "0b1")),
        *((text, text) for text in ("1e", "e5", ".", "-x", "1.2.3", "1e5x", "=", "<<", "+.5.", "٣")),
        ("'8'", "8"), ('"1e-4"', "1e-4"), ("'true'", "true"), ("''", ""), ('"~"', "~"),
        ("'**.attn2.**=16'", "**.attn2.**=16"),
        ("[1, on, 1e2]", [1, "on", 100.0]), ("{a: 1, on: no}", {"a": 1, "on": "no"}),
        ("|\n  8\n", "8\n"), (">\n  a\n  b\n", "a b\n"),
        ('"\\U0001F600"', "\U0001f600"), ("a # comment", "a"), ("a#b", "a#b"),
    ],
)  # fmt: skip
def test_types(written: str, value: object) -> None:
    data, positions = parse_yaml(f"key: {written}\n", "r.yaml")
    assert positions.problems == []
    assert data == {"key": value}
    assert type(data["key"]) is type(value)


def test_nan() -> None:
    number = parse_yaml("key: .nan", "r.yaml")[0]["key"]
    assert isinstance(number, float)
    assert math.isnan(number)


def test_keys_are_text() -> None:
    assert parse_yaml("on: 1\n1: 2\ntrue: 3\n12:30: 4\n'a b': 5\n<<: 6\n", "r.yaml")[0] == {
        "on": 1, "1": 2, "true": 3, "12:30": 4, "a b": 5, "<<": 6,
    }  # fmt: skip


def test_every_key_and_value_has_its_line() -> None:
    text = "# comment\n\na: 1\nb:\n  - x\n  -\n    c: 2\n    d: [3,\n        4]\ne:\n  5\n"
    assert parse_yaml(text, "r.yaml")[1].places == {
        (): Place(3, 3),
        ("a",): Place(3, 3),
        ("b",): Place(4, 4),
        ("b", 0): Place(5, 5),
        ("b", 1): Place(7, 7),
        ("b", 1, "c"): Place(7, 7),
        ("b", 1, "d"): Place(8, 8),
        ("b", 1, "d", 0): Place(8, 8),
        ("b", 1, "d", 1): Place(9, 9),
        ("e",): Place(10, 11),
    }


def test_the_nearest_place_stands_in_for_what_is_not_there() -> None:
    positions = parse_yaml("a:\n  b: 1\n", "r.yaml")[1]
    assert positions.place(("a", "missing", 3)) == Place(1, 1)
    assert positions.place(("a", "b")) == Place(2, 2)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: &x 1\nb: 2\n", 1, "anchors"),
        ("a: 1\nb: *a\n", 2, "anchors"),
        ("a: 1\ntargets: [**.attn2]\n", 2, "put a pattern that starts with * in quotes"),
        ("targets:\n  - *.attn2\n", 2, "put a pattern that starts with * in quotes"),
        ("targets:\n  - '**'\n  - *attn2\n", 3, "put a pattern that starts with * in quotes"),
        ("a: 1\nb: !!python/object/apply:os.system ['true']\n", 2, "tag"),
        ("!!python/object:os.system {}\n", 1, "tag"),
        ("a: 1\n!!python/name:os.system '': 1\n", 2, "tag"),
        ("a: !!str 8\n", 1, "tag"),
        ("a: !custom 8\n", 1, "tag"),
        ("a: ! 8\n", 1, "tag"),
        ("a: 1\n---\nb: 2\n", 2, "a second document"),
        ("a: 1\n...\n---\n{}\n", 3, "a second document"),
        ("a: 1\n b: 2\n", 2, "mapping values are not allowed"),
        ("a: b: c\n", 1, "in quotes"),
        ("a:\n\t- b\n", 2, "tabs"),
        ("a: [1, 2\nb: 3\n", 2, "expected ',' or ']'"),
        ("a: 'x\n", 2, "end of stream"),
        ("a: 1\nb: \x07\n", 2, "'\\x07'"),
        ("%YAML 3.0\n---\na: 1\n", 1, "incompatible"),
        ("", 1, "this file holds nothing"),
        ("# only\n# comments\n", 1, "this file holds nothing"),
        ("\n~\n", 2, "this file holds nothing"),
        ("- a\n- b\n", 1, "no mapping"),
        ("\njust text\n", 2, "no mapping"),
        ("8\n", 1, "no mapping"),
        ("1e999\n", 1, "no mapping"),
    ],
)
def test_refused(text: str, line: int, reason: str) -> None:
    error = refused(text)
    assert error.where == f"r.yaml:{line}"
    assert error.message.startswith(f"r.yaml:{line}: ")
    assert reason in error.message
    assert error.exit_code == 3


def test_billion_laughs_stop_at_the_first_anchor() -> None:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    start = time.perf_counter()
    assert "anchors" in refused("\n".join(lines)).message
    assert time.perf_counter() - start < 5  # expanded, it has 9^12 items


def test_merge_keys_are_no_way_around() -> None:
    assert "anchors" in refused("base: &b {a: 1}\nc:\n  <<: *b\n").message


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_nesting_is_bounded(opening: str) -> None:
    assert f"nested more than {MAX_DEPTH} deep" in refused("a:\n " + opening * 20_000).message


def test_deep_enough() -> None:
    depth = MAX_DEPTH - 2  # the root and the innermost value count too
    data, _ = parse_yaml("a: " + "[" * depth + "1" + "]" * depth, "r.yaml")
    assert str(data) == "{'a': " + "[" * depth + "1" + "]" * depth + "}"


def test_repeated_keys_are_all_named() -> None:
    text = "rank: 8\nseed: 1\nrank: 16\nnested:\n  - {a: 1, b: 2, 'a': 3}\nseed: 2\n"
    data, positions = parse_yaml(text, "r.yaml")
    assert [(p.line, p.key, p.reason) for p in positions.problems] == [
        (3, "rank", "repeated; it is already on line 1"),
        (5, "nested.0.a", "repeated; it is already on line 5"),
        (6, "seed", "repeated; it is already on line 2"),
    ]
    assert data["rank"] == 8  # never the last one, silently


@pytest.mark.parametrize("text", ["1: a\n'1': b\n", 'true: a\n"true": b\n', "a: 1\n? a\n: 2\n"])
def test_keys_that_only_look_different_are_repeated(text: str) -> None:
    assert ["repeated" in p.reason for p in parse_yaml(text, "r.yaml")[1].problems] == [True]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a: 1" + "0" * MAX_DIGITS, f"a whole number of {MAX_DIGITS + 1} digits"),
        ("a: " + "9" * 100_000, "a whole number of 100000 digits"),
        ("a: 1e999", "too large"),
        ("a: -1e999", "too large"),
        ("a: " + "9" * 5000 + ".0", "too large"),
        ('a: "\\0"', "NUL"),
        ('a: "\\ud800"', "surrogate"),
        ('"\\0": 1', "a key must be a word"),
        ("? [a, b]\n: 1", "a key must be a word"),
        ("? {a: b}\n: 1", "a key must be a word"),
        ("'': 1", "a key must be a word"),
    ],
)
def test_impossible_values_are_left_as_problems(line: str, reason: str) -> None:
    problems = parse_yaml(f"first: 1\n{line}\n", "r.yaml")[1].problems
    assert len(problems) == 1
    assert problems[0].line == 2
    assert reason in problems[0].reason


def test_what_a_terminal_might_obey_is_escaped() -> None:
    positions = parse_yaml('"\\e[31mred": 1\n"\\e[31mred": 2\n"\\u202e": 1e999\n', "r.yaml")[1]
    assert [p.key for p in positions.problems] == ["'\\x1b[31mred'", "'\\u202e'"]


class TestFile:
    def test_reads(self, tmp_path: Path) -> None:
        path = tmp_path / "r.yaml"
        path.write_bytes("\ufeffa: é\r\nb: 1e-4\r\n".encode())
        data, positions = load_yaml(path)
        assert data == {"a": "é", "b": 1e-4}
        assert positions.place(("b",)).key == 2

    def test_repeated_keys(self, tmp_path: Path) -> None:
        path = tmp_path / "r.yaml"
        path.write_text("a: 1\nb: 1\nb: 2\na: 2\n", encoding="utf-8")
        with pytest.raises(RecipeError) as caught:
            load_yaml(path)
        assert caught.value.where == f"{path}:3"
        assert caught.value.message.splitlines() == [
            f"{path}:3: b: repeated; it is already on line 2",
            f"{path}:4: a: repeated; it is already on line 1",
        ]

    def test_many_errors_are_cut_short(self, tmp_path: Path) -> None:
        path = tmp_path / "r.yaml"
        path.write_text("a: 1\n" * (MAX_SHOWN + 8), encoding="utf-8")
        with pytest.raises(RecipeError) as caught:
            load_yaml(path)
        lines = caught.value.message.splitlines()
        assert len(lines) == MAX_SHOWN + 1
        assert lines[-1] == "... and 7 more"

    def test_size_is_bounded(self, tmp_path: Path) -> None:
        path = tmp_path / "r.yaml"
        path.write_bytes(b"a: 1\n#" + b"x" * (MAX_BYTES - 6))
        assert load_yaml(path)[0] == {"a": 1}
        path.write_bytes(b"a: 1\n#" + b"x" * (MAX_BYTES - 5))
        with pytest.raises(RecipeError, match="larger than 256 KiB"):
            load_yaml(path)

    def test_an_endless_device_is_bounded(self) -> None:
        with pytest.raises(RecipeError, match="larger than"):
            load_yaml("/dev/zero")

    @pytest.mark.parametrize("raw", [b"a: 1\nb: \xff\n", "a: 1\n".encode("utf-16")])
    def test_other_encodings(self, tmp_path: Path, raw: bytes) -> None:
        path = tmp_path / "r.yaml"
        path.write_bytes(raw)
        with pytest.raises(RecipeError, match="not UTF-8"):
            load_yaml(path)

    def test_missing_or_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="No such file"):
            load_yaml(tmp_path / "none.yaml")
        with pytest.raises(RecipeError, match="Is a directory"):
            load_yaml(tmp_path)
