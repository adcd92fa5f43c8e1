"""`ortho evaluate` as a user meets it: the numbers of training again, by class, on other classes; what is skipped."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ortho_cli import registry
from ortho_cli.analysis.classification import JUDGE, Predictions, class_data, class_parts, confusion
from ortho_cli.cli.app import app

runner = CliRunner()
SETS = (
    "model={name: vit-mini, patch: 4, depth: 1, heads: 2, dim: 16}", "methods=[{name: hra, rank: 4}]",
    "train.epochs=3", "data.batch=128", "train.threads=1", "train.ema=0.9", "optimizer={name: adamw, lr: 1e-2}",
    "run.save_every=1", "run.keep=all",
)  # fmt: skip


def ortho(*words: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer with reflections, three epochs, averaged weights."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    sets = [word for text in (*SETS, f"run.dir={folder}") for word in ("--set", text)]
    code, _, err = ortho("train", "quickstart", "--quiet", *sets)
    assert code == 0, err
    return folder


def evaluated(run: Path, output: Path, *words: object) -> dict[str, Any]:
    code, out, err = ortho("evaluate", run, "-o", output, "--json", *words)
    assert code == 0, err + out
    found: dict[str, Any] = json.loads(out)
    written = json.loads((output / "evaluation.json").read_text("utf-8"))
    assert {key: found[key] for key in written} == written
    return found


def measured(run: Path, step: int) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        name[5:]: value for line in lines if line["step"] == step for name, value in line.items() if name[:5] == "eval/"
    }


def test_every_checkpoint_gives_what_training_measured(run: Path, tmp_path: Path) -> None:
    outcome = json.loads((run / "outcome.json").read_text())
    last, best = outcome["step"], outcome["best_step"]
    for word, step in (("last", last), ("best", best), (None, best), (str(last // 3), last // 3)):
        found = evaluated(run, tmp_path / f"out-{word}", *(["--checkpoint", word] if word else []))
        assert found["step"] == step and found["samples"] == 359
        for name, value in measured(run, step).items():
            assert found["metrics"][name] == value, (word, name)  # the same weights, averaged, the same arithmetic


def test_classes_one_by_one(run: Path, tmp_path: Path) -> None:
    found = evaluated(run, tmp_path / "out")
    counts = np.array(found["confusion"])
    assert counts.shape == (10, 10) and counts.sum() == found["samples"]
    assert found["metrics"]["accuracy"] == pytest.approx(np.trace(counts) / counts.sum())
    for place, line in enumerate(found["classes"]):
        assert line["samples"] == counts[place].sum()
        assert line["accuracy"] == pytest.approx(counts[place, place] / counts[place].sum())
    recalls = np.diag(counts) / counts.sum(1)
    assert found["metrics"]["balanced_accuracy"] == pytest.approx(recalls.mean())
    assert {path.name for path in (tmp_path / "out" / "figures").iterdir()} == {
        "accuracy-by-class.png",
        "confusion.png",
    }
    assert (tmp_path / "out" / "evaluation.html").is_file()


def test_other_classes_and_the_other_split(run: Path, tmp_path: Path) -> None:
    whole = evaluated(run, tmp_path / "whole")
    half = evaluated(run, tmp_path / "half", "--set", "data.classes=[5, 6, 7, 8, 9]")
    right = sum(whole["confusion"][label][label] for label in range(5, 10))
    count = sum(sum(whole["confusion"][label]) for label in range(5, 10))
    assert half["metrics"]["accuracy"] == pytest.approx(right / count)
    assert half["changed"] == ["data.classes=[5, 6, 7, 8, 9]"] and not half["classes"][0]["kept"]
    train = evaluated(run, tmp_path / "train", "--split", "train", "--set", "data.batch=100")
    assert train["samples"] == 1438 and sum(line["samples"] for line in train["classes"]) == 1438


def test_a_published_run_needs_no_optimizer(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for path in copy.rglob("optimizer.safetensors"):
        path.unlink()
    expected = evaluated(run, tmp_path / "one")
    assert evaluated(copy, tmp_path / "two")["metrics"] == expected["metrics"]


def test_chosen_metrics_and_a_missing_library(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = evaluated(run, tmp_path / "a", "--metrics", "f1_macro,accuracy,accuracy_other_classes")
    assert set(found["metrics"]) == {"f1_macro", "accuracy"}
    assert [item["metric"] for item in found["skipped"]] == ["accuracy_other_classes"]
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    code, out, _ = ortho("evaluate", run, "-o", tmp_path / "b")
    assert code == 0 and "calibration_error is skipped: torchmetrics is not installed; pip install" in out
    written = json.loads((tmp_path / "b" / "evaluation.json").read_text())
    assert written["skipped"][0]["command"] == "pip install 'ortho-cli[eval]'"
    assert "calibration_error" not in written["metrics"] and "f1_macro" in written["metrics"]


def test_calibration_is_that_of_its_definition() -> None:
    pytest.importorskip("torchmetrics")
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 4, generator=generator)
    labels = torch.randint(0, 4, (500,), generator=generator)
    confidence, predicted = logits.softmax(-1).max(-1)
    right = (predicted == labels).double()
    bins = (confidence * 15).ceil().clamp(1, 15)
    gaps = [
        (confidence[bins == each].double().mean() - right[bins == each].mean()).abs() * (bins == each).double().mean()
        for each in bins.unique()
    ]
    computed = JUDGE.metrics["calibration_error"].compute(Predictions(logits, labels, tuple("abcd")))
    assert computed == pytest.approx(float(sum(gaps)), abs=1e-5)


def test_many_classes_are_not_drawn_one_by_one() -> None:
    count = 100
    labels = torch.arange(2 * count) % count
    predictions = Predictions(torch.eye(count)[labels.flip(0)], labels, tuple(map(str, range(count))))
    names = [getattr(part, "name", "") for part in class_parts(predictions)]
    assert names == ["accuracy-by-class", "classes", "confusions"] and "confusion" not in class_data(predictions)
    assert confusion(predictions).sum() == 2 * count


def test_the_judge_knows_the_metrics_of_its_task(run: Path, tmp_path: Path) -> None:
    found = evaluated(run, tmp_path / "out", "--set", "data.classes=[0, 1]")
    assert set(found["metrics"]) == {*JUDGE.own, *JUDGE.metrics} - {item["metric"] for item in found["skipped"]}
    assert set(registry.names("judges")) <= set(registry.names("tasks"))


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--checkpoint", "7"], 4, "has no checkpoint 7"),
        (["--checkpoint", "newest"], 2, "neither best, nor last, nor a step"),
        (["--metrics", "acuracy"], 2, "did you mean 'accuracy'"),
        (["--split", "test"], 2, "--split 'test' is none of val, train"),
        (["--set", "model.depth=2"], 2, "would make another model"),
        (["--set", "data.clases=[1]"], 3, "data.clases"),
    ],
)
def test_refusals(run: Path, tmp_path: Path, words: list[str], code: int, told: str) -> None:
    found, _, err = ortho("evaluate", run, "-o", tmp_path / "out", *words)
    assert found == code and told in err
    assert not (tmp_path / "out").exists()


def test_outputs_are_kept(run: Path, tmp_path: Path) -> None:
    code, out, _ = ortho("evaluate", run, "-o", tmp_path / "out", "--dry-run")
    assert code == 0 and "evaluation.json" in out and not (tmp_path / "out").exists()
    assert ortho("evaluate", run, "-o", tmp_path / "out")[0] == 0
    assert ortho("evaluate", run, "-o", tmp_path / "out")[0] == 6
    assert ortho("evaluate", run, "-o", tmp_path / "out", "--force")[0] == 0
    assert ortho("evaluate", tmp_path)[0] == 4
