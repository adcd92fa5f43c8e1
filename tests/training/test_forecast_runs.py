"""Runs that forecast series: OIALR on them, killed and resumed, on two processes, judged anew, and their card."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import LAUNCH, assert_same_runs, die_at, lines_of, write

from ortho_cli.analysis.run_report import write_run_report
from ortho_cli.recipe.train import load_train
from ortho_cli.training.evaluate import evaluate_run
from ortho_cli.training.run import train

SECTIONS = {
    "task": "{name: forecast, input: 16, horizon: 6}",
    "model": "{name: forecaster, patch: 4, depth: 1, heads: 2, dim: 16, moving_average: 5}",
    "data": "{name: eeg, batch: 32, eval_batch: 160, judge: val}",
    "methods": "[{name: oialr, when: step, delay: 9, every: 5, order: all, beta: 0.2}, {name: track_stability}]",
    "train": "{epochs: 2, seed: 0, ema: 0.9, accumulate: 2, clip: 1.0, threads: 1}",
    "run": "{dir: FOLDER, save_every_steps: 7, keep: all, log_every: 5, best: {metric: eval/mse, mode: min}}",
}


def test_killed_and_resumed(tmp_path: Path) -> None:
    outcome = train(load_train(write(tmp_path, "whole", **SECTIONS)))
    assert any("6 of 6 layers converted" in note for note in outcome.notes)
    assert outcome.trainable < outcome.parameters
    broken = write(tmp_path, "broken", **SECTIONS)
    die_at(broken, 17)
    train(load_train(broken), resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    sections = {**SECTIONS, "methods": "[]", "train": "{epochs: 1, threads: 1}"}
    alone = write(tmp_path, "alone", **sections)
    train(load_train(alone))
    pair = write(tmp_path, "pair", **sections)
    command = [sys.executable, *LAUNCH, "2", "-m", "ortho_cli", "train", str(pair), "--quiet"]
    done = subprocess.run(command, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for key in ("train/loss", "eval/mse", "eval/mae"):
        assert lines_of(tmp_path / "pair", key) == pytest.approx(lines_of(tmp_path / "alone", key), rel=1e-4)


def test_what_a_run_knows_of_itself(tmp_path: Path) -> None:
    outcome = train(load_train(write(tmp_path, "run", **SECTIONS)))
    run = tmp_path / "run"
    assert outcome.best == min(lines_of(run, "eval/mse"))
    again = evaluate_run(run)
    assert again.metrics["mse"] == pytest.approx(outcome.best, rel=1e-6)
    assert again.judged["samples"] == 160 - 6 + 1
    other = {split: evaluate_run(run, split=split).metrics["mse"] for split in ("val", "train")}
    test = evaluate_run(run, sets=["data.judge=test"])
    assert len({other["train"], other["val"], test.metrics["mse"]}) == 3
    assert set(test.metrics) == {"mse", "mae"}
    write_run_report(run)
    card = (run / "README.md").read_text("utf-8")
    assert "time-series-forecasting" in card
    assert "figures/mse.png" in card
    assert (run / "report.html").is_file()
