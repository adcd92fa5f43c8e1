"""Strength and unmerge as they are typed: options, recipes, reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ortho_cli.cli.app import app
from ortho_cli.surgery.small_sd15 import small_sd15

runner = CliRunner()


def ortho(*words: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter with random values."""
    import torch
    from safetensors.torch import load_file, save_file

    place = tmp_path_factory.mktemp("strength")
    small_sd15(place / "base.safetensors")
    assert ortho("add-hra", place / "base.safetensors", "-o", place / "hra", "--rank", 4)[0] == 0
    weights = place / "hra" / "adapter_model.safetensors"
    torch.manual_seed(0)
    save_file({name: t + 0.1 * torch.randn(t.shape) for name, t in load_file(weights).items()}, weights)
    return place


def test_merge_and_back(folder: Path, tmp_path: Path) -> None:
    base, merged, undo, again = folder / "base.safetensors", *(tmp_path / f"{n}.safetensors" for n in "mub")
    arguments = ["merge", base, f"{folder / 'hra'}=0.5", "-o", merged, "--strength", 0.8, "--strength", "**.attn1.**=0"]
    code, out, _ = ortho(*arguments, "--keep-undo", undo, "--save-recipe", tmp_path / "r.yaml", "--json")
    report = json.loads(out)
    assert code == 0 and report["totals"]["strengths"] == ["hra: 0 to 0.4"]
    assert {detail["strength"] for detail in report["details"]} == {0.4}
    assert {item["path"] for item in report["outputs"]} == {str(merged), str(undo)}
    assert report["totals"]["undo_bytes"] == undo.stat().st_size < report["totals"]["changed_bytes"]

    recipe = (tmp_path / "r.yaml").read_text()
    assert "strength: 0.5" in recipe and "  - 0.8" in recipe and "**.attn1.**=0" in recipe and "keep_undo: " in recipe
    first = merged.read_bytes(), undo.read_bytes()
    assert ortho("merge", "--recipe", tmp_path / "r.yaml", "--force", "-q")[0] == 0
    assert (merged.read_bytes(), undo.read_bytes()) == first

    code, out, _ = ortho("unmerge", merged, "--undo", undo, "-o", again, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["dry_run"] is True and not again.exists()
    code, out, _ = ortho("unmerge", merged, "--undo", undo, "-o", again, "--save-recipe", tmp_path / "u.yaml")
    assert code == 0 and "exact" in out and again.read_bytes() == base.read_bytes()
    assert ortho("unmerge", merged, "--undo", undo, "-o", again)[0] == 6
    assert ortho("unmerge", "--recipe", tmp_path / "u.yaml", "-f", "-q")[0] == 0
    code, _, err = ortho("unmerge", base, "--undo", undo, "-o", tmp_path / "x.safetensors")
    assert code == 4 and "is not the checkpoint" in err and "hint: " in err


def test_unmerge_by_inverses(folder: Path, tmp_path: Path) -> None:
    base, merged = folder / "base.safetensors", tmp_path / "m.safetensors"
    adapters = [f"{folder / 'hra'}=0.5", folder / "hra"]
    assert ortho("merge", base, *adapters, "-o", merged, "-q")[0] == 0
    code, out, _ = ortho("unmerge", merged, *adapters, "-o", tmp_path / "b.safetensors", "--json",
                         "--save-recipe", tmp_path / "u.yaml")  # fmt: skip
    assert code == 0 and 0 < json.loads(out)["totals"]["expected_error"]["F32"] < 1e-6
    assert ortho("inspect", base, "--diff", tmp_path / "b.safetensors", "--fail-above", 1e-5)[0] == 0
    assert ortho("inspect", base, "--diff", merged, "--fail-above", 1e-3)[0] == 5
    first = (tmp_path / "b.safetensors").read_bytes()
    assert ortho("unmerge", "--recipe", tmp_path / "u.yaml", "-f", "-q")[0] == 0
    assert (tmp_path / "b.safetensors").read_bytes() == first


def test_convert_to_another_strength(folder: Path, tmp_path: Path) -> None:
    code, _, _ = ortho("convert", folder / "hra", "--strength", 0.5, "-o", tmp_path / "half", "--save-recipe",
                       tmp_path / "c.yaml")  # fmt: skip
    assert code == 0 and "strength: 0.5" in (tmp_path / "c.yaml").read_text()
    assert ortho("convert", "--recipe", tmp_path / "c.yaml", "-f", "-q")[0] == 0
    for name, adapters in (("a", [tmp_path / "half"]), ("b", [f"{folder / 'hra'}=0.5"])):
        assert ortho("merge", folder / "base.safetensors", *adapters, "-o", tmp_path / f"{name}.safetensors")[0] == 0
    compared = ["inspect", tmp_path / "a.safetensors", "--diff", tmp_path / "b.safetensors", "--fail-above", 1e-5]
    assert ortho(*compared)[0] == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["unmerge", "{base}", "-o", "{tmp}/b.safetensors"], 2, "neither an undo file nor an adapter"),
        (["unmerge", "-o", "{tmp}/b.safetensors"], 2, "missing: MERGED"),
        (["unmerge", "{base}", "--undo", "{base}", "-o", "{tmp}/b.safetensors"], 4, "no undo file"),
        (["unmerge", "{base}", "--undo", "{tmp}/none.safetensors", "-o", "{tmp}/b.safetensors"], 4, "no such file"),
        (["merge", "{base}", "{hra}=nan", "-o", "{tmp}/m.safetensors"], 2, "strength nan is not finite"),
        (["merge", "{base}", "{hra}=0,5", "-o", "{tmp}/m.safetensors"], 2, "is not a number"),
        (["merge", "{base}", "{hra}", "--strength", "**.atn1.**=0.5", "-o", "{tmp}/m.safetensors"], 4, "matched 0 of"),
        (["merge", "{base}", "{hra}", "--strength", "half", "-o", "{tmp}/m.safetensors"], 2, "not a number"),
        (["merge", "{base}", "{hra}", "-o", "{tmp}/m.safetensors", "--keep-undo", "{tmp}/u.bin"], 2, "--keep-undo"),
        (["convert", "{hra}", "-o", "{tmp}/half"], 2, "missing: TO"),
        (["convert", "{base}", "--to", "safetensors", "--strength", "0.5", "-o", "{tmp}/c.safetensors"], 2, "adapters"),
    ],
)  # fmt: skip
def test_refusals(folder: Path, tmp_path: Path, words: list[str], code: int, message: str) -> None:
    places = {"base": folder / "base.safetensors", "hra": folder / "hra", "tmp": tmp_path}
    found, _, err = ortho(*(word.format(**places) for word in words))
    assert found == code and message in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())
