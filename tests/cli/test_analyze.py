"""`ortho analyze runs` as a user meets it: a matrix of real runs, a table, a folder, refusals."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ortho_cli.cli.app import app

runner = CliRunner()
QUICK = ("model={name: mlp, hidden: [16]}", "train.epochs=1", "data.batch=256", "train.threads=1")


def ortho(*words: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds plain, and two with another learning rate, as matrices."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("slow", "1e-3"), ("fast", "1e-1")):
        sets = (*QUICK, "methods=[]", f"optimizer.lr={rate}", "matrix={train.seed: [0, 1]}", f"run.dir={folder / name}")
        code, _, err = ortho("train", "quickstart", "--quiet", *(word for text in sets for word in ("--set", text)))
        assert code == 0, err
    return folder


def test_a_table_without_a_folder(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = ortho("analyze", "runs", runs)
    assert code == 0 and err == "" and list(tmp_path.iterdir()) == []
    header, *rows = out.splitlines()
    assert header.split()[:2] == ["group", "n"] and "accuracy (%)" in header
    assert [row.split()[:2] for row in rows[:2]] == [["lr=0.1", "2"], ["lr=0.001", "2"]]


def test_the_folder_holds_page_pictures_and_numbers(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    command = ("analyze", "runs", runs / "slow", runs / "fast", "-o", folder)
    assert ortho(*command, "--dry-run")[0] == 0 and not folder.exists()
    code, out, _ = ortho(*command)
    assert code == 0 and "table.md" in out
    expected = {"runs.html", "table.md", "table.csv", "curves.csv", "runs.csv", "differences.csv", "figures"}
    assert {path.name for path in folder.iterdir()} == expected
    assert {path.name for path in (folder / "figures").iterdir()} >= {"eval-accuracy.png", "final-eval-accuracy.png"}
    rows = list(csv.DictReader((folder / "runs.csv").read_text("utf-8").splitlines()))
    assert [row["run"] for row in rows] == ["slow/seed=0", "slow/seed=1", "fast/seed=0", "fast/seed=1"]
    table = list(csv.DictReader((folder / "table.csv").read_text("utf-8").splitlines()))
    accuracies = [100 * float(row["eval/accuracy"]) for row in rows if row["group"] == "lr=0.1"]
    assert float(table[1]["accuracy (%) mean"]) == pytest.approx(statistics.mean(accuracies))
    assert float(table[1]["accuracy (%) sd"]) == pytest.approx(statistics.stdev(accuracies))
    for path in folder.rglob("*"):
        assert not path.is_file() or str(runs).encode() not in path.read_bytes(), path
    assert "ortho analyze runs slow fast -o comparison" in (folder / "table.md").read_text("utf-8")


def test_an_existing_folder_is_kept_unless_forced(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert ortho("analyze", "runs", runs, "-o", folder, "--format", "csv")[0] == 0
    code, _, err = ortho("analyze", "runs", runs, "-o", folder)
    assert code == 6 and "--force" in err
    assert ortho("analyze", "runs", runs, "-o", folder, "--force", "--format", "svg")[0] == 0
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".svg", ".md"}
    code, _, err = ortho("analyze", "runs", runs, "-o", runs, "--force")
    assert code == 6 and (runs / "slow").is_dir()


def test_json_has_every_number(runs: Path, tmp_path: Path) -> None:
    code, out, err = ortho(
        "analyze", "runs", runs, "--metric", "eval/*", "-o", tmp_path / "x", "--format", "json", "--json"
    )
    found = json.loads(out)
    assert code == 0 and err == "" and found["command"] == "analyze runs" and found["totals"]["runs"] == 4
    fast = next(group for group in found["details"] if group["name"] == "lr=0.1")
    final = fast["metrics"]["eval/accuracy"]["final"]
    assert final["mean"] == pytest.approx(statistics.mean(final["values"])) and fast["seeds"] == [0, 1]
    written = json.loads((tmp_path / "x" / "runs.json").read_text("utf-8"))
    assert written["details"] == found["details"]
    assert {Path(item["path"]).name for item in found["outputs"]} == {"runs.json", "table.md"}


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--metric", "eval/acuracy"], 2, "no run has it"),
        (["--group-by", "optimizer.rate"], 2, "no run's recipe has this key"),
        (["--format", "jpeg"], 2, "'jpeg' is none of"),
    ],
)
def test_refusals(runs: Path, words: list[str], code: int, told: str) -> None:
    found, out, err = ortho("analyze", "runs", runs, *words)
    assert (found, out) == (code, "") and told in err and "hint: " in err


def test_a_folder_without_runs(tmp_path: Path) -> None:
    code, _, err = ortho("analyze", "runs", tmp_path)
    assert code == 4 and "there are no runs in" in err
