"""Matrices: cells in folders of their own, finished ones skipped, a table of whatever is finished; short debug runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from training_runs import write

from ortho_cli.errors import OutputError, UsageError
from ortho_cli.training import run
from ortho_cli.training.cells import run_recipe

MATRIX = "{steps: 3, limit_batches: 2}\nmatrix: {optimizer.lr: [1e-3, 1e-2], train.seed: [0, 1, 2]}"


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    return write(tmp_path, "grid", train=MATRIX, methods="[]")


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_all_cells(matrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = run_recipe(str(matrix))
    assert len(outcomes) == 6
    table = rows(tmp_path / "grid")
    assert [row["cell"] for row in table] == [str(number) for number in range(6)]
    assert [(row["optimizer.lr"], row["train.seed"]) for row in table[:3]] == [
        ("0.001", "0"),
        ("0.001", "1"),
        ("0.001", "2"),
    ]
    assert [float(row["eval/loss"]) for row in table] == [outcome.metrics["eval/loss"] for outcome in outcomes]
    text = (tmp_path / "grid" / "table.md").read_text()
    losses = [outcome.metrics["eval/loss"] for outcome in outcomes[:3]]
    assert "| lr | runs | eval/accuracy |" in text
    mean = sum(value for value in losses if value is not None) / 3
    assert "| 0.001 | 3 | " in text and f"{mean:.4f} ± " in text
    assert "6 of 6 cells are finished" in text
    monkeypatch.setattr(run, "train", None)  # nothing is trained again
    assert run_recipe(str(matrix)) == outcomes


def test_single_cells_in_any_order(matrix: Path, tmp_path: Path) -> None:
    """As the jobs of an array do it: each adds its own line, and overwrites nobody's."""
    (one,) = run_recipe(str(matrix), cell=4)
    assert (one.name, one.folder) == ("lr=0.01,seed=1", str(tmp_path / "grid" / "lr=0.01,seed=1"))
    assert [row["cell"] for row in rows(tmp_path / "grid")] == ["4"]
    run_recipe(str(matrix), cell=0)
    assert [row["cell"] for row in rows(tmp_path / "grid")] == ["0", "4"]
    text = (tmp_path / "grid" / "table.md").read_text()
    assert "| 0.001 | 1 | " in text and "| 0.01 | 1 | " in text
    assert "2 of 6 cells are finished" in text
    assert "±" not in text.splitlines()[2]  # one run has no deviation


def test_a_finished_cell_of_another_recipe_is_not_taken_for_this_one(matrix: Path) -> None:
    run_recipe(str(matrix), cell=0)
    with pytest.raises(OutputError, match=r"data\.batch: was 64, now 32"):
        run_recipe(str(matrix), ["data.batch=32"], cell=0)
    (again,) = run_recipe(str(matrix), ["data.batch=32"], cell=0, force=True)
    assert again.step == 3


def test_a_finished_cell_goes_on_where_the_recipe_is_longer(matrix: Path) -> None:
    run_recipe(str(matrix), cell=0)
    (longer,) = run_recipe(str(matrix), ["train.steps=5"], cell=0)
    assert longer.step == 5


def test_cells_that_do_not_exist(matrix: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--cell 6: the matrix has cells 0 to 5"):
        run_recipe(str(matrix), cell=6)
    with pytest.raises(UsageError, match="matrix"):
        run_recipe(str(write(tmp_path, "plain")), cell=0)


def test_debug_run_step(matrix: Path, tmp_path: Path) -> None:
    """One step of everything, also of the first cell of a matrix, beside the folder that the run will have."""
    for path, folder in ((write(tmp_path, "run"), "run"), (matrix, "grid/lr=0.001,seed=0")):
        (outcome,) = run_recipe(str(path), debug_run="step")
        assert outcome.folder == f"{tmp_path / folder}-debug-step"
        assert outcome.step == 1
        assert outcome.metrics.keys() >= {"train/loss", "eval/accuracy"}
        assert (Path(outcome.folder) / "checkpoints" / "step-000001" / "state.json").is_file()
        assert not (tmp_path / folder).exists()
    run_recipe(str(tmp_path / "run.yaml"), debug_run="step")  # as often as one likes


def test_debug_run_overfit(tmp_path: Path) -> None:
    sections = {"methods": "[]", "optimizer": "{name: adam, lr: 1e-2}", "schedule": "{name: one-cycle}"}
    (learnt,) = run_recipe(str(write(tmp_path, "run", **sections)), debug_run="overfit")
    assert learnt.step == 100
    assert "3 batches can be learnt by heart" in learnt.notes[-1]
    frozen = ["optimizer={name: sgd, lr: 1e-9}", f"run.dir={tmp_path / 'slow'}"]
    (failed,) = run_recipe(str(tmp_path / "run.yaml"), frozen, debug_run="overfit")
    assert "are not learnt" in failed.notes[-1]


def test_debug_run_profile(tmp_path: Path) -> None:
    (outcome,) = run_recipe(str(write(tmp_path, "run")), debug_run="profile")
    trace = json.loads((Path(outcome.folder) / "trace.json").read_text())
    assert any(event.get("name") == "aten::addmm" for event in trace["traceEvents"])
    assert "aten::addmm" in (Path(outcome.folder) / "profile.txt").read_text()


def test_debug_runs_have_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--debug-run 'stp'") as caught:
        run_recipe(str(write(tmp_path, "run")), debug_run="stp")
    assert "step" in str(caught.value.hint)
