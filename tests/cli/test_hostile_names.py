"""What a stranger calls tensors, files and metadata is shown as text: no markup, no escapes, no fake lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ortho_cli.cli.app import app

Save = Callable[..., Path]
PAINT = "\x1b[31mred\x1b]0;title\x07\u202e"
MARKUP = "[link=https://example.org]click[/link]"


def ortho(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], color=True)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def harmless(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


def test_names_and_metadata_are_shown_as_they_are(tmp_path: Path, save: Save) -> None:
    metadata = {"ortho.command": PAINT, f"ortho.{PAINT}": MARKUP}
    tensors = {f"{MARKUP}.weight": torch.ones(4, 4), "[bold].weight": torch.ones(2, 2), "/": torch.ones(1)}
    path = save(tmp_path / "x.safetensors", tensors, **metadata)
    code, out, err = ortho("inspect", path, "--layers")
    assert (code, err) == (0, "")
    assert harmless(out)
    assert f"{MARKUP} " in out
    assert "[bold] " in out
    assert "\\u001b[31mred\\u001b]0;title\\u0007\\u202e" in out
    code, out, _ = ortho("inspect", path, "--json")
    assert json.loads(out)["totals"]["made_by"] == metadata
    assert harmless(out)


@pytest.mark.parametrize("verb", ["add-hra", "convert"])
def test_reports_of_writing_verbs(verb: str, tmp_path: Path, save: Save) -> None:
    tensors = {f"{MARKUP}.{n}.weight": torch.ones(4, 4) for n in range(12)}
    path = save(tmp_path / f"in{PAINT}.safetensors", tensors, note=PAINT)
    more = ["--targets", "all-linear", "--rank", 2] if verb == "add-hra" else ["--to", "safetensors"]
    code, out, err = ortho(verb, path, *more, "-o", tmp_path / f"out{PAINT}.safetensors")
    assert (code, err) == (0, "")
    assert harmless(out)
    assert "out\\u001b[31mred" in out


def test_names_inside_pickles(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {f"{PAINT}.{n}.weight": torch.ones(4, 4) for n in range(12)}, PAINT: 1}, path)
    for words in (
        ["inspect", path, "--layers"],
        ["add-hra", path, "--targets", "all-linear", "-n", "-o", tmp_path / "a"],
    ):
        _, out, err = ortho(*words)
        assert harmless(out + err), words
        assert "red" in out + err
    code, out, err = ortho("convert", path, "--to", "safetensors", "-o", tmp_path / "out.safetensors")
    assert (code, out) == (4, "")
    assert harmless(err)
    assert [item.name for item in tmp_path.iterdir()] == ["x.ckpt"]


@pytest.mark.parametrize(
    "words", [["inspect", "{0}"], ["merge", "{0}", "-o", "x"], ["add-hra", "{0}", "-o", "x.safetensors"]]
)
@pytest.mark.parametrize("place", ["none", "file.safetensors", "folder"])
def test_errors_name_places_harmlessly(words: list[str], place: str, tmp_path: Path) -> None:
    path = tmp_path / f"{PAINT}\n{place}"
    if place == "folder":
        (path / f"a{PAINT}.safetensors").parent.mkdir()
        for name in ("a", "b"):
            (path / f"{name}{PAINT}.safetensors").touch()
    elif place != "none":
        path.touch()
    code, out, err = ortho(*(word.format(path) for word in words))
    assert (code, out) == (4, "")
    assert harmless(err)
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 2
