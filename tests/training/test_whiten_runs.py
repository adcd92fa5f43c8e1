"""A run with whitening: killed and resumed it is the same run, and its report draws what was tracked."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from training_runs import assert_same_runs, die_at, lines_of, ortho, write
from typer.testing import CliRunner

from ortho_cli.analysis.run_folder import open_run
from ortho_cli.cli.app import app
from ortho_cli.recipe.train import load_train
from ortho_cli.training.run import train

SECTIONS = {
    "model": "{name: resnet20}",
    "data": "{name: digits, batch: 32}",
    "methods": "[{name: whiten, groups: 2}, {name: track_conditioning, every: 3}]",
    "optimizer": "{name: sgd, lr: 0.01, momentum: 0.9}",
    "schedule": "{name: constant}",
    "train": "{steps: 9, threads: 1}",
    "run": "{dir: FOLDER, save_every_steps: 4, keep: all, log_every: 2}",
}
CONDITION = "method/track_conditioning/norm1/condition"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(load_train(write(folder, "whole", **SECTIONS)))
    return folder / "whole"


def test_a_singular_covariance_can_be_saved(tmp_path: Path) -> None:
    """Digits have one channel, so nine numbers a patch: without a ridge the condition is infinite, null in the log."""
    sections = {
        **SECTIONS,
        "methods": "[{name: track_conditioning, every: 2}]",
        "train": "{steps: 4, threads: 1}",
        "run": "{dir: FOLDER, save_every_steps: 2, log_every: 2}",
    }
    path = write(tmp_path, "run", **sections)
    die_at(path, 4)
    train(load_train(path), resume=True)
    assert lines_of(tmp_path / "run", CONDITION) == [None, None]
    assert lines_of(tmp_path / "run", CONDITION.replace("norm1/condition", "norm1/rank")) == [9, 9]


def test_killed_and_resumed(whole: Path, tmp_path: Path) -> None:
    broken = write(tmp_path, "broken", **SECTIONS)
    die_at(broken, 7)
    train(load_train(broken), resume=True)
    assert_same_runs(whole, tmp_path / "broken")
    conditions = lines_of(whole, CONDITION)
    assert len(conditions) == 5 and len(set(conditions)) == 4  # measured at 1, 3, 6 and 9
    assert lines_of(whole, CONDITION.replace("norm1/condition", "measured_at")) == [1, 3, 6, 6, 9]


def test_a_saved_run_is_evaluated_as_it_was(whole: Path) -> None:
    done = CliRunner().invoke(app, ["evaluate", str(whole), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert str(open_run(whole).metrics["eval/loss"].final)[:8] in json.dumps(found)


def test_the_report_draws_a_curve_for_each_quantity(whole: Path) -> None:
    pictures = {path.stem for path in (whole / "figures").iterdir()}
    assert {"conditioning-condition", "conditioning-lambda_max", "conditioning-effective_rank"} <= pictures
    assert not any("track_conditioning" in name for name in pictures)
    page = (whole / "report.html").read_text("utf-8")
    assert "Conditioning" in page and "norm1" in page


def test_runs_are_compared(whole: Path, tmp_path: Path) -> None:
    sections = {**SECTIONS, "methods": "[{name: whiten, groups: 4}, {name: track_conditioning, every: 3}]"}
    train(load_train(write(tmp_path, "other", **sections)))
    out = tmp_path / "report"
    words = ["analyze", "conditioning", str(whole), str(tmp_path / "other"), "-o", str(out)]
    done = CliRunner().invoke(app, [*words, "--format", "html,png,csv,json"])
    assert done.exit_code == 0, done.output
    assert "condition" in done.stdout and "groups=4" in done.stdout
    rows = list(csv.DictReader((out / "conditioning.csv").read_text("utf-8").splitlines()))
    logged = open_run(whole).metrics[CONDITION].values
    mine = [row for row in rows if row["run"] == "whole"]
    assert [int(row["step"]) for row in mine] == [1, 3, 6, 9]  # each once, where it was measured
    assert [float(row["condition"]) for row in mine] == [logged[0], logged[1], logged[2], logged[4]]
    assert {path.name for path in out.iterdir()} >= {"conditioning.html", "conditioning.json", "figures"}
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 6 and "--force" in again.output


def test_a_run_that_tracked_nothing(tmp_path: Path) -> None:
    train(load_train(write(tmp_path, "plain", **{**SECTIONS, "methods": "[]", "train": "{steps: 1, threads: 1}"})))
    done = CliRunner().invoke(app, ["analyze", "conditioning", str(tmp_path / "plain"), "--json"])
    assert done.exit_code == 4
    error = json.loads(done.stdout)["error"]
    assert "plain has no measurements of conditioning" in error["message"] and "track_conditioning" in error["hint"]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """A model whose only statistics of the batch are whitened ones."""
    sections = {**SECTIONS, "model": "{name: resnet20, norm: group}", "train": "{steps: 3, threads: 1}"}
    for name, processes in (("one", 1), ("two", 2)):
        done = ortho("train", str(write(tmp_path, name, **sections)), "-q", processes=processes)
        assert done.returncode == 0, done.stderr
    for key in ("train/loss", "eval/loss", CONDITION):
        assert lines_of(tmp_path / "two", key) == pytest.approx(lines_of(tmp_path / "one", key), rel=1e-4), key
