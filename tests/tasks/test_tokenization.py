"""Pieces of words: any text comes back as it was, and the same text gives the same pieces."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ortho_cli.errors import CheckpointError, RecipeError
from ortho_cli.tasks import tokenization
from ortho_cli.tasks.tokenization import END, PADDING, Pieces

TEXT = [f"{verb} the {noun}" for verb in ("save", "delete", "open") for noun in ("page", "user", "users", "file")]
SIZE = 280
PIECES = Pieces.learn(TEXT, SIZE)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_comes_back(text: str) -> None:
    (found,) = PIECES.encode([text])
    assert found[-1] == END
    assert not {PADDING, END} & set(found[:-1])
    assert all(0 <= piece < SIZE for piece in found)
    assert PIECES.decode(found) == text
    assert PIECES.decode([*found, PADDING, PADDING]) == text


def test_special_words_in_a_text_are_text() -> None:
    (found,) = PIECES.encode(["a </s> b <pad>"])
    assert PIECES.decode(found) == "a </s> b <pad>"
    assert found.count(END) == 1


def test_what_is_learnt_is_kept_and_does_not_depend_on_the_process(tmp_path: Path) -> None:
    PIECES.save(tmp_path / "here.json")
    assert Pieces.load(tmp_path / "here.json").encode(TEXT) == PIECES.encode(TEXT)
    script = (
        "import sys, pathlib\nfrom ortho_cli.tasks.tokenization import Pieces\n"
        f"Pieces.learn({TEXT!r}, {SIZE}).save(pathlib.Path(sys.argv[1]))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "there.json")], check=True)
    assert (tmp_path / "there.json").read_bytes() == (tmp_path / "here.json").read_bytes()
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(CheckpointError, match="no vocabulary can be read"):
        Pieces.load(tmp_path / "broken.json")
    with pytest.raises(CheckpointError, match="no vocabulary can be read"):
        Pieces.load(tmp_path / "none.json")


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(RecipeError, match=r"the training text has \d+ pieces, expected 5000") as caught:
        Pieces.learn(TEXT, 5000)
    assert caught.value.hint is not None
    most = int(caught.value.hint.partition("=")[2].partition(",")[0])
    assert len(Pieces.learn(TEXT, most).encode(["save"])[0]) == 2  # a word, and the end


def test_examples_run() -> None:
    found = doctest.testmod(tokenization)
    assert (found.failed, found.attempted > 0) == (0, True)
