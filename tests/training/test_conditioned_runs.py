"""Runs whose layers are conditioned: all methods together, killed and resumed, planned, judged, on two processes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from training_runs import assert_same_runs, die_at, lines_of, ortho, write

from ortho_cli.errors import RecipeError, TargetError
from ortho_cli.recipe.train import load_train
from ortho_cli.training.dry_run import describe
from ortho_cli.training.evaluate import evaluate_run
from ortho_cli.training.run import train
from ortho_cli.training.state import last_checkpoint, load_tensors

MODEL = "{name: resnet20, norm: group}"
STEM = "targets: [^conv1]"  # blocks have a conv1 of their own
BOTH = "targets: [^conv1, fc]"
SOC = f"{{name: soc, {STEM}, terms: 3, eval_terms: 6}}"
NORM = "{name: spectral_norm, targets: [fc]}"
LOSS = "{name: orthogonal_loss, targets: ['layer1.0.*'], penalty: 1.0e-2}"
NOG = f"{{name: nog, {BOTH}}}"
AFTER = f"{{name: nog, {BOTH}, order: after}}"
OLR = f"{{name: olr, {BOTH}, floor: 0.01}}"
ALL = f"[{SOC}, {NORM}, {LOSS}, {NOG}, {OLR}]"
SGD = "{name: sgd, lr: 0.02, momentum: 0.9, weight_decay: 0.001}"
ADAMW = "{name: adamw, lr: 2.0e-3}"
SHORT = {
    "model": MODEL, "optimizer": SGD, "data": "{name: digits, batch: 32, augment: [crop]}",
    "train": "{steps: 9, threads: 1, ema: 0.9, clip: 1.0, accumulate: 2}",
    "run": "{dir: FOLDER, save_every_steps: 4, keep: all, log_every: 2}",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("methods", "optimizer"), [
    (ALL, SGD), pytest.param(f"[{SOC}, {OLR}, {AFTER}]", ADAMW, marks=pytest.mark.slow),
])  # fmt: skip
def test_killed_and_resumed(methods: str, optimizer: str, tmp_path: Path) -> None:
    sections = {**SHORT, "methods": methods, "optimizer": optimizer}
    outcome = train(load_train(write(tmp_path, "whole", **sections)))
    broken = write(tmp_path, "broken", **sections)
    die_at(broken, 7)
    train(load_train(broken), resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")
    judged = evaluate_run(tmp_path / "whole", checkpoint="last").metrics
    assert judged["accuracy"] == outcome.metrics["eval/accuracy"]


def test_what_a_run_logs(tmp_path: Path) -> None:
    outcome = train(load_train(write(tmp_path, "run", **{**SHORT, "methods": ALL})))
    run = tmp_path / "run"
    accepted = lines_of(run, "method/olr/accepted")
    assert len(accepted) == 5 and all(0 <= share <= 1 for share in accepted)
    assert all(0.01 <= rate <= 1 for rate in lines_of(run, "method/olr/rate_min"))
    assert all(penalty > 0 for penalty in lines_of(run, "method/orthogonal_loss/penalty"))
    assert lines_of(run, "method/nog/skipped") == [0.0] * 5
    assert all(math.isfinite(loss) for loss in lines_of(run, "train/loss"))
    plain = train(load_train(write(tmp_path, "plain", **{**SHORT, "methods": "[]"})))
    assert lines_of(run, "train/lr") == lines_of(tmp_path / "plain", "train/lr")  # OLR's rates are its layers' own
    assert plain.parameters != outcome.parameters
    assert any("nog: acts on 2 layers: conv1, fc" in note for note in outcome.notes)


def test_a_plan_counts_what_would_be(tmp_path: Path) -> None:
    found = describe(load_train(write(tmp_path, "run", **{**SHORT, "methods": ALL})))
    assert [(line["method"], line["pattern"], line["layers"]) for line in found["details"]] == [
        ("soc", "^conv1", 1), ("spectral_norm", "fc", 1), ("orthogonal_loss", "layer1.0.*", 2),
        ("nog", "^conv1", 1), ("nog", "fc", 1), ("olr", "^conv1", 1), ("olr", "fc", 1),
    ]  # fmt: skip
    assert found["details"][0]["added"] == 16 * 16 * 9 and found["totals"]["added"] == 16 * 16 * 9 - 16 * 1 * 9
    assert found["totals"]["memory_activations"] > 0


def test_the_order_of_methods_matters_and_is_told(tmp_path: Path) -> None:
    recipe = load_train(write(tmp_path, "run", **{**SHORT, "methods": f"[{{name: nog, {STEM}}}, {SOC}]"}))
    with pytest.raises(TargetError, match="none of the 1 layers that nog chose trains any more"):
        train(recipe)


def test_two_methods_with_settings_for_one_parameter_are_refused(tmp_path: Path) -> None:
    factored = "{name: factorized, rank: 4, targets: [layers.0]}, {name: frobenius_decay}"
    methods = f"[{factored}, {{name: olr, targets: [layers.0.U]}}]"
    with pytest.raises(RecipeError, match=r"two methods want settings of their own for .*layers\.0\.U") as caught:
        train(load_train(write(tmp_path, "run", methods=methods)))
    assert caught.value.hint == "exclude its layer from one of them"


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    sections = {**SHORT, "methods": ALL, "train": "{steps: 4, threads: 1}"}
    for name, processes in (("one", 1), ("two", 2)):
        done = ortho("train", str(write(tmp_path, name, **sections)), "--json", processes=processes)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["ok"] is True
    one, two = (last_checkpoint(tmp_path / name) for name in ("one", "two"))
    assert one is not None and two is not None
    theirs = load_tensors(two / "model.safetensors")
    for key, value in load_tensors(one / "model.safetensors").items():
        assert torch.allclose(value, theirs[key], atol=1e-4, rtol=1e-3), key
