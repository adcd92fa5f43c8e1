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

from ortho_cli.errors import NumericsError, OutputError
from ortho_cli.methods.hra import HRAMethod
from ortho_cli.recipe.train import load_train
from ortho_cli.training.cells import run_recipe
from ortho_cli.training.ema import Average
from ortho_cli.training.evaluate import evaluate_run
from ortho_cli.training.run import train
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
    assert evaluate_run(tmp_path / "taught").samples == 359
    assert evaluate_run(tmp_path / "taught", sets=["train.limit_batches=1"]).samples <= 64


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
