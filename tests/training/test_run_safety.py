"""What a run must not lose: its results when it is resumed once more, its base, its other cells, its earlier export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_runs import lines_of, write

from ortho_cli.errors import CheckpointError, NumericsError, OutputError, RecipeError
from ortho_cli.methods.hra import HRAMethod
from ortho_cli.recipe.train import load_train
from ortho_cli.training import cells
from ortho_cli.training.cells import run_recipe
from ortho_cli.training.dry_run import describe
from ortho_cli.training.ema import Average
from ortho_cli.training.evaluate import evaluate_run
from ortho_cli.training.run import Interrupted, Outcome, train
from ortho_cli.training.state import checkpoint_steps

SHORT = {"train": "{epochs: 1, threads: 1}", "methods": "[]", "run": "{dir: FOLDER, save_every_steps: 7}"}
HRA = "[{name: hra, rank: 2, targets: ['layers.*']}]"


def outcome(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "outcome.json").read_text("utf-8"))
    return found


def test_a_finished_run_that_is_resumed_keeps_its_results(tmp_path: Path) -> None:
    recipe = load_train(write(tmp_path, "run", **SHORT))
    train(recipe)
    before = outcome(tmp_path / "run")["metrics"]
    train(recipe, resume=True)
    assert before["eval/accuracy"] > 0
    assert outcome(tmp_path / "run")["metrics"] == before


def test_force_does_not_remove_what_the_run_starts_from(tmp_path: Path) -> None:
    path = write(tmp_path, "run", **SHORT)
    train(load_train(path))
    run = tmp_path / "run"
    for base in (run, run / "checkpoints" / "step-000022" / "model.safetensors"):
        with pytest.raises(OutputError, match="which the run starts from"):
            train(load_train(path, [f"model.base={base}"]), force=True)
    assert checkpoint_steps(run)
    train(load_train(path, [f"model.base={run}", f"run.dir={tmp_path / 'next'}"]), force=True)


def test_a_cell_that_diverges_does_not_hold_up_the_others(tmp_path: Path) -> None:
    path = write(tmp_path, "run", **SHORT, matrix="{optimizer.lr: [1.0e+30, 1.0e-3]}", optimizer="{name: sgd, lr: 0.1}")
    for _ in range(2):  # the second time there is only the first cell to try
        with pytest.raises(NumericsError, match=r"1 of 2 cells diverged: lr=1e\+30") as caught:
            run_recipe(str(path))
        assert caught.value.exit_code == 5
    assert lines_of(tmp_path / "run" / "lr=0.001", "eval/accuracy")
    assert "0.001" in (tmp_path / "run" / "table.csv").read_text("utf-8")


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_train(write(tmp_path, "run", **{**SHORT, "methods": HRA}))
    train(recipe)
    export = tmp_path / "run" / "export" / "hra"
    before = {file.name: file.read_bytes() for file in export.iterdir()}

    def fails(self: HRAMethod, model: nn.Module, path: Path) -> None:
        path.mkdir()
        raise OutputError("disk full")

    monkeypatch.setattr(HRAMethod, "export", fails)
    with pytest.raises(OutputError, match="disk full"):
        train(recipe, resume=True)
    assert {file.name: file.read_bytes() for file in export.iterdir()} == before
    assert [each.name for each in export.parent.iterdir()] == ["hra"]


def test_a_run_is_judged_without_what_it_was_taught_by(tmp_path: Path) -> None:
    """Neither its teacher nor its base is needed again; a limit that was for training's time does not hold."""
    train(load_train(write(tmp_path, "teacher", **SHORT)))
    taught = write(
        tmp_path, "taught", train="{steps: 6, limit_batches: 2, threads: 1}",
        model=f"{{name: mlp, hidden: [32], base: {tmp_path / 'teacher'}}}",
        methods=f"[{{name: distill, teacher: {tmp_path / 'teacher'}}}]", run="{dir: FOLDER, save_every_steps: 3}",
    )  # fmt: skip
    train(load_train(taught))
    shutil.rmtree(tmp_path / "teacher")
    assert evaluate_run(tmp_path / "taught").judged["samples"] == 359
    assert evaluate_run(tmp_path / "taught", sets=["train.limit_batches=1"]).judged["samples"] <= 64


@pytest.mark.parametrize(("methods", "keep", "kept"), [("[]", "null", 2), ("[]", "1", 1), ("[]", "all", 3)])
def test_how_many_checkpoints_stay(methods: str, keep: str, kept: int, tmp_path: Path) -> None:
    run = f"{{dir: FOLDER, save_every_steps: 8, keep: {keep}}}"
    train(load_train(write(tmp_path, "run", **{**SHORT, "methods": methods, "run": run})))
    assert len(checkpoint_steps(tmp_path / "run")) == kept


def test_all_checkpoints_stay_where_stability_is_tracked(tmp_path: Path) -> None:
    recipe = load_train(write(tmp_path, "run", **{**SHORT, "methods": "[{name: track_stability}]"}))
    assert (recipe.run.keep, recipe.kept) == (None, "all")


def test_averaged_weights_are_judged_with_averaged_statistics() -> None:
    """Batch norm's running statistics go with the weights they were found under, and come back afterwards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    norm, average = model[1], Average(0.5)
    assert isinstance(norm, nn.BatchNorm1d)
    means = []
    for _ in range(3):
        model(torch.randn(8, 4) + 5)
        means.append(norm.running_mean.clone())  # type: ignore[union-attr]
        average.update(model)
    expected = 0.25 * means[0] + 0.25 * means[1] + 0.5 * means[2]
    with average.swapped(model):
        assert torch.allclose(norm.running_mean, expected)  # type: ignore[arg-type]
    assert torch.equal(norm.running_mean, means[2])  # type: ignore[arg-type]


def test_a_run_with_batch_norm_and_an_average_learns(tmp_path: Path) -> None:
    """Averaged weights under the last step's statistics guess: 10 % where these reach many times that."""
    sections = {
        "model": "{name: resnet20}", "methods": "[]", "optimizer": "{name: sgd, lr: 0.05, momentum: 0.9}",
        "train": "{epochs: 2, ema: 0.95, threads: 1}", "run": "{dir: FOLDER, save_every: 1}",
    }  # fmt: skip
    recipe = load_train(write(tmp_path, "run", **sections))
    found = train(recipe).metrics["eval/accuracy"]
    assert found is not None and found > 0.6
    evaluation = evaluate_run(tmp_path / "run")  # the averages are in the file
    assert evaluation.metrics["accuracy"] == pytest.approx(found)


def test_what_would_fail_later_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric that is not evaluated, and a base that is not there, with what makes it; also in a dry run."""
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "run", **SHORT)
    mistyped = load_train(path, ["run.best.metric=eval/acuracy"])
    for attempt in (train, describe):
        with pytest.raises(RecipeError, match="eval/acuracy is not evaluated") as caught:
            attempt(mistyped)
        assert "did you mean 'eval/accuracy'?" in str(caught.value.hint)
    lacking = load_train(path, ["model.base=runs/digits-vit-pretrain"])
    with pytest.raises(CheckpointError, match="runs/digits-vit-pretrain does not exist") as missed:
        train(lacking)
    assert missed.value.hint == "train it first: ortho train digits-vit-pretrain"
    assert "model.base: runs/digits-vit-pretrain does not exist" in describe(lacking)["notes"]
    assert not (tmp_path / "run").exists()


def test_each_cell_of_a_matrix_says_its_name(tmp_path: Path) -> None:
    path = write(tmp_path, "run", **{**SHORT, "methods": HRA}, matrix="{train.seed: [0, 1]}")
    assert [each.name for each in run_recipe(str(path))] == ["seed=0", "seed=1"]


def test_an_interrupted_matrix_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same command: one cell's recipe would leave the others out."""
    path = write(tmp_path, "run", **SHORT, matrix="{train.seed: [0, 1, 2]}")

    def stopped(*_: Any, **__: Any) -> Outcome:
        raise Interrupted("stopped at step 3 of 9; the state is saved", hint="go on with one cell")

    monkeypatch.setattr(cells, "train", stopped)
    with pytest.raises(Interrupted, match="seed=0: stopped at step 3") as caught:
        run_recipe(str(path))
    assert caught.value.hint == "the same command goes on, with this cell first; 3 of 3 are to be done"
