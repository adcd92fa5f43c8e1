"""`--recipe` and `--save-recipe` of `ortho analyze`: the same report again, the command line first, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
import typer
from typer.testing import CliRunner

from ortho_cli.analysis import adapter, orthogonality, report
from ortho_cli.cli.app import app
from ortho_cli.cli.arguments import NOTHING, recipe_keys
from ortho_cli.recipe.analyses import ANALYSES, AnalyzeAdapter, AnalyzeOrthogonality, Format
from ortho_cli.recipe.verbs import load_verb
from ortho_cli.surgery.add_hra import add_hra

Save = Callable[..., Path]
WORDS = {
    "analyze-stability": [
        "step-1.safetensors", "step-2.safetensors", "step-3.safetensors", "--lag", "1", "--lag", "2",
        "--threshold", "0.5", "--exclude", "block.2", "--fail-below", "0.1", "--top-rank", "2",
    ],
    "analyze-orthogonality": [
        "step-1.safetensors", "--groups", "4", "--metric", "coherence", "--fail-above", "1", "--targets", "block.*",
    ],
    "analyze-adapter": ["step-1.safetensors", "hra", "--top", "3", "--threshold", "0.25", "--metric", "defect"],
    "analyze-spectrum": ["step-1.safetensors", "--targets", "block.*", "--exclude", "block.2"],
}  # fmt: skip


def ortho(verb: str, *words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*verb.replace("-", " ", 1).split(), *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(autouse=True)
def here(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)
    start = {f"block.{n}.weight": torch.randn(12, 8, generator=generator) for n in range(3)}
    for step in (1, 2, 3):
        moved = {name: weight + torch.randn(12, 8, generator=generator) / step for name, weight in start.items()}
        save(tmp_path / f"step-{step}.safetensors", moved)
    add_hra(tmp_path / "step-1.safetensors", tmp_path / "hra", rank=2, targets=["block.*"])
    return tmp_path


def files(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("verb", ANALYSES)
def test_a_saved_recipe_makes_the_same_report(verb: str) -> None:
    words = [*WORDS[verb], "--format", "csv,json", "-q"]
    assert ortho(verb, *words, "-o", "one", "--save-recipe", "r.yaml") == (0, "", "")
    assert ortho(verb, "--recipe", "r.yaml", "-o", "two", "-q") == (0, "", "")
    assert files("one") == files("two") != {}
    saved = load_verb("r.yaml", verb)
    assert saved["output"] == "one" and saved["format"] == ["csv", "json"]
    assert ortho(verb, "--recipe", "r.yaml", "-q")[0] == 6  # its own output is there by now


@pytest.mark.parametrize("verb", ANALYSES)
def test_what_is_typed_wins(verb: str) -> None:
    assert ortho(verb, *WORDS[verb], "-o", "one", "--format", "csv", "-q", "--save-recipe", "r.yaml")[0] == 0
    assert ortho(verb, "--recipe", "r.yaml", "-o", "two", "--format", "html", "-q")[0] == 0
    assert {Path(name).suffix for name in files("one")} == {".csv"}
    assert {Path(name).suffix for name in files("two")} == {".html"}


@pytest.mark.parametrize("verb", ANALYSES)
def test_the_recipe_is_written_with_the_report_alone(verb: str) -> None:
    assert ortho(verb, *WORDS[verb], "--save-recipe", "r.yaml", "--dry-run", "-q")[0] == 0
    assert not Path("r.yaml").exists()
    Path("r.yaml").write_text("mine")
    assert ortho(verb, *WORDS[verb], "--save-recipe", "r.yaml", "-o", "out", "--force")[0] == 6
    assert Path("r.yaml").read_text() == "mine" and not Path("out").exists()


@pytest.mark.parametrize("verb", ANALYSES)
def test_defaults_are_those_of_the_command_line(verb: str) -> None:
    group = typer.main.get_command(app).commands["analyze"]  # type: ignore[attr-defined]
    command = group.commands[verb.removeprefix("analyze-")]
    keys, fields = recipe_keys(command), ANALYSES[verb].model_fields
    for parameter in command.params:
        if parameter.name not in keys or fields[keys[parameter.name]].is_required():
            continue
        ours, typed = fields[keys[parameter.name]].default, parameter.default
        if keys[parameter.name] == "format":
            ours = ",".join(ours)
        nothing = ours in NOTHING and typed in NOTHING
        assert nothing or ours == (str(typed) if isinstance(typed, Path) else typed), parameter


def test_choices_are_those_of_the_verbs() -> None:
    assert get_args(Format) == report.FORMATS
    assert get_args(AnalyzeOrthogonality.model_fields["metric"].annotation) == orthogonality.METRICS
    assert get_args(AnalyzeAdapter.model_fields["metric"].annotation) == adapter.METRICS


def test_a_reference_and_a_lag_take_the_place_of_each_other() -> None:
    words = ["step-1.safetensors", "step-2.safetensors", "step-3.safetensors", "--format", "json", "-q"]
    assert ortho("analyze-stability", *words, "--lag", 2, "-o", "a", "--save-recipe", "lag.yaml")[0] == 0
    again = ["--recipe", "lag.yaml", "--reference", "first", "-o", "b", "-q", "--save-recipe", "first.yaml"]
    assert ortho("analyze-stability", *again) == (0, "", "")
    saved = load_verb("first.yaml", "analyze-stability")
    assert saved["reference"] == "first" and "lag" not in saved
    assert ortho("analyze-stability", "--recipe", "first.yaml", "--lag", 2, "-o", "c", "-q")[0] == 0
    assert files("a") == files("c") != files("b")


def test_a_report_beyond_its_limits_has_its_recipe() -> None:
    words = ["step-1.safetensors", "-o", "one", "--format", "csv", "-q", "--fail-above", 0]
    assert ortho("analyze-orthogonality", *words, "--save-recipe", "r.yaml")[0] == 5
    assert ortho("analyze-orthogonality", "--recipe", "r.yaml", "-o", "two", "-q")[0] == 5
    assert files("one") == files("two")


@pytest.mark.parametrize("verb", ANALYSES)
def test_refusals(verb: str) -> None:
    code, _, err = ortho(verb)
    assert code == 2 and "missing: " in err and f"usage: {verb.replace('analyze-', 'ortho analyze ')}" in err
    Path("r.yaml").write_text(f"version: 1\nverb: {verb}\nfromat: [csv]\n")
    code, _, err = ortho(verb, "--recipe", "r.yaml")
    assert code == 3 and "r.yaml:3: fromat: no such key; did you mean 'format'?" in err
    Path("m.yaml").write_text("version: 1\nverb: merge\nbase: x\n")
    code, _, err = ortho(verb, "--recipe", "m.yaml")
    assert code == 3 and "hint: ortho merge --recipe m.yaml" in err
