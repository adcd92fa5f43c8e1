"""`ortho factorize` as a user meets it: one rule, reports, recipes, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from ortho_cli.cli.app import app

runner = CliRunner()
FILES = {"factorization.html", "factorization.json", "layers.csv", "spectra.csv"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    layers = {f"layer.{i}.{part}.weight": torch.randn(96, 80, generator=generator) for i in range(3) for part in "qk"}
    save_file(layers, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def ortho(*words: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_report_stands_beside_the_output(base: Path, tmp_path: Path) -> None:
    code, out, err = ortho("factorize", base, "-o", tmp_path / "small.safetensors", "--budget", 0.5, "--json")
    content = json.loads(out)
    assert code == 0 and err == "" and content["command"] == "factorize" and content["layers"] == 6
    folder = tmp_path / "small-report"
    assert {path.name for path in folder.iterdir()} == FILES | {"figures"}
    assert {Path(item["path"]) for item in content["outputs"]} >= {folder / name for name in FILES}
    assert {path.stem for path in (folder / "figures").iterdir()} == {"ranks", "errors", "spectra", "energy"}
    rows = (folder / "layers.csv").read_text().splitlines()
    assert len(rows) == 7 and rows[0].startswith("name,shape,matrix,dtype,rank")
    assert str(tmp_path) not in (folder / "factorization.html").read_text()


def test_an_earlier_report_is_refused_before_any_work(base: Path, tmp_path: Path) -> None:
    words = ["factorize", base, "-o", tmp_path / "small.safetensors", "--rank", 8, "--report", tmp_path / "kept"]
    assert ortho(*words, "-q")[0] == 0
    (tmp_path / "small.safetensors").unlink()
    code, _, err = ortho(*words)
    assert code == 6 and "kept" in err and not (tmp_path / "small.safetensors").exists()
    assert ortho(*words, "--force", "-q")[0] == 0


def test_no_report(base: Path, tmp_path: Path) -> None:
    assert ortho("factorize", base, "-o", tmp_path / "small.safetensors", "--rank", 8, "--no-report", "-q")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"base.safetensors", "small.safetensors"}


def test_a_dry_run_writes_nothing(base: Path, tmp_path: Path) -> None:
    code, out, _ = ortho(
        "factorize", base, "-o", tmp_path / "small.safetensors", "--energy", 0.5, "--dry-run", "--json"
    )
    content = json.loads(out)
    assert code == 0 and content["dry_run"] is True and content["totals"]["peak_bytes"] > 0
    assert all(detail["rank"] for detail in content["details"])
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


def test_the_last_pattern_wins(base: Path, tmp_path: Path) -> None:
    words = ["--rank", 8, "--rank", "*.q=4", "--rank", "layer.2.*=6"]
    code, out, _ = ortho("factorize", base, "-o", tmp_path / "small.safetensors", *words, "--json", "--no-report")
    ranks = {detail["name"]: detail["rank"] for detail in json.loads(out)["details"]}
    assert code == 0 and (ranks["layer.0.k"], ranks["layer.0.q"], ranks["layer.2.q"]) == (8, 4, 6)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "no rank rule; exactly one is needed"),
        (["--rank", "8", "--energy", "0.9"], 2, "2 rank rules: --rank, --energy"),
        (["--energy", "1.5"], 2, "--energy is 1.5; expected a number in (0, 1]"),
        (["--rank", "0"], 2, "rank 0: there is no such number of components"),
        (["--rank", "many"], 2, "'many' is not a whole number"),
        (["--rank", "8", "--budget-unit", "flops"], 2, "--budget-unit is about --budget"),
        (["--rank", "8", "--as", "dens"], 2, "--as 'dens' is none of"),
        (["--rank", "8", "--targets", "nothing"], 4, "pattern 'nothing' matched 0 of 6 layers"),
        (["--rank", "70"], 4, "rank 70 saves nothing: factors of 96x80 are smaller up to rank 43"),
        (["--rank", "8", "--calibrate", "x.txt"], 2, "runs the model of a transformers folder"),
        (["--energy", "0.9", "--method", "randomized"], 2, "promises a bound"),
        (["--budget", "0.0001"], 2, "below what rank 1 everywhere costs"),
    ],
)
def test_refusals(base: Path, tmp_path: Path, words: list[str], code: int, message: str) -> None:
    found, out, err = ortho("factorize", base, "-o", tmp_path / "small.safetensors", *words)
    assert found == code and out == "" and message in err and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


def test_a_recipe_repeats_the_command(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "again.yaml"
    words = ["--rank", 8, "--rank", "*.q=4", "--as", "dense", "--no-report", "-q"]
    assert ortho("factorize", base, "-o", tmp_path / "one.safetensors", *words, "--save-recipe", recipe)[0] == 0
    again = tmp_path / "two" / "one.safetensors"
    assert ortho("factorize", "--recipe", recipe, "-o", again, "--no-report", "-q")[0] == 0
    assert again.read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_a_typed_rule_takes_the_place_of_the_recipes(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"version: 1\nverb: factorize\ncheckpoint: {base}\nbudget: 0.5\nbudget_unit: params\n")
    words = ["-o", tmp_path / "small.safetensors", "--rank", 8, "--json", "--no-report"]
    code, out, _ = ortho("factorize", "--recipe", recipe, *words, "--save-recipe", tmp_path / "mixed.yaml")
    assert code == 0 and json.loads(out)["totals"]["rule"] == "rank 8"
    saved = (tmp_path / "mixed.yaml").read_text()
    assert "rank: 8" in saved and "budget" not in saved
