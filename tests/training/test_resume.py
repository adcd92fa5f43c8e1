"""A run killed at any step and resumed equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from training_runs import assert_same_runs, die_at, write

from ortho_cli.errors import OutputError
from ortho_cli.recipe.train import load_train
from ortho_cli.training.cells import run_recipe
from ortho_cli.training.run import train
from ortho_cli.training.state import checkpoint_steps, last_checkpoint

PATIENT = "{dir: FOLDER, save_every_steps: 7, keep: all, log_every: 5, best: {metric: eval/accuracy, patience: 2}}"
HRA = "[{name: hra, rank: 4, targets: ['layers.**'], penalty: 1.0e-3}]"


OTHERS = {"sgd": 23, "nesterov": 22, "nag": 8, "adam": 30, "muon": 14}


@pytest.mark.parametrize(
    ("optimizer", "deaths"),
    [
        ("adamw", (5, 30, 3)),
        *(pytest.param(name, (step,), marks=pytest.mark.slow) for name, step in OTHERS.items()),
    ],
)
def test_killed_at_any_moment(optimizer: str, deaths: tuple[int, ...], tmp_path: Path) -> None:
    """With averages, a best state, gradients in parts and clipped; the first death is before anything was saved."""
    sections = {"optimizer": f"{{name: {optimizer}, lr: 1e-3}}"}
    train(load_train(write(tmp_path, "whole", **sections)))
    broken = write(tmp_path, "broken", **sections)
    for step in deaths:
        die_at(broken, step)
    train(load_train(broken), resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")


def test_killed_while_patience_counts(tmp_path: Path) -> None:
    sections = {"run": PATIENT, "train": "{epochs: 9, eval_every_steps: 3, threads: 1}", "methods": "[]",
                "optimizer": "{name: sgd, lr: 0.3}", "schedule": "{name: constant}"}  # fmt: skip
    whole = train(load_train(write(tmp_path, "whole", **sections)))
    assert whole.best_step is not None
    assert whole.step == whole.best_step + 2 * 3 < 9 * 22
    broken = write(tmp_path, "broken", **sections)
    die_at(broken, whole.step - 1)
    outcome = train(load_train(broken), resume=True)
    assert (outcome.step, outcome.best) == (whole.step, whole.best)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")
    before = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    again = train(load_train(tmp_path / "whole.yaml"), resume=True)  # patience stays over
    assert again.step == whole.step
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == before


def test_an_adapter_killed_and_resumed(tmp_path: Path) -> None:
    base = write(tmp_path, "base", train="{epochs: 1}", methods="[]")
    train(load_train(base))
    model = f"{{name: mlp, hidden: [32], base: {tmp_path / 'base'}}}"
    train(load_train(write(tmp_path, "whole", methods=HRA, model=model)))
    broken = write(tmp_path, "broken", methods=HRA, model=model)
    die_at(broken, 17)
    train(load_train(broken), resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        exports = [tmp_path / run / "export" / "hra" / name for run in ("whole", "broken")]
        assert exports[0].read_bytes() == exports[1].read_bytes()


def test_a_killed_matrix_goes_on_with_the_cell_it_was_in(tmp_path: Path) -> None:
    matrix = "{epochs: 1}\nmatrix: {train.seed: [0, 1]}"
    whole, broken = (write(tmp_path, name, train=matrix) for name in ("whole", "broken"))
    run_recipe(str(whole))
    die_at(broken, 22 + 9)
    finished = (tmp_path / "broken" / "seed=0" / "outcome.json").stat().st_mtime_ns
    run_recipe(str(broken))
    assert (tmp_path / "broken" / "seed=0" / "outcome.json").stat().st_mtime_ns == finished
    for cell in ("seed=0", "seed=1"):
        assert_same_runs(tmp_path / "whole" / cell, tmp_path / "broken" / cell)
    assert (tmp_path / "whole" / "table.csv").read_text() == (tmp_path / "broken" / "table.csv").read_text()


def test_longer_training_may_be_resumed(tmp_path: Path) -> None:
    path = write(tmp_path, "run")
    train(load_train(path, ["train.epochs=1"]))
    outcome = train(load_train(path, ["train.epochs=2"]), resume=True)
    assert outcome.step == 44
    assert checkpoint_steps(tmp_path / "run")[-2:] == [42, 44]


def test_another_recipe_may_not(tmp_path: Path) -> None:
    path = write(tmp_path, "run")
    train(load_train(path, ["train.epochs=1"]))
    with pytest.raises(OutputError, match=r"optimizer\.lr: was 0\.001, now 1\.0; train\.clip: was 1\.0, now null"):
        train(load_train(path, ["train.epochs=1", "optimizer.lr=1.0", "train.clip=null"]), resume=True)
    with pytest.raises(OutputError, match=r"train\.epochs: was 1, now"):
        train(load_train(path, ["train.epochs=null", "train.steps=3"]), resume=True)


def test_nothing_to_resume(tmp_path: Path) -> None:
    path = write(tmp_path, "run")
    with pytest.raises(OutputError, match="holds no run"):
        train(load_train(path), resume=True)
    train(load_train(path, ["train.epochs=1"]))
    whole = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    outcome = train(load_train(path, ["train.epochs=1"]), resume=True)  # as if killed before the first save
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == whole
    assert any("began at step 0" in note for note in outcome.notes)
    assert last_checkpoint(tmp_path / "run") is not None
