"""Runs of factored networks: killed, resumed, compiled, taught, normalised; shipped recipes have the paper's counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import assert_same_runs, die_at, lines_of, write

from ortho_cli.errors import CheckpointError
from ortho_cli.recipe.shipped import shipped
from ortho_cli.recipe.train import TrainRecipe, cell_recipes, load_train
from ortho_cli.training.dry_run import describe
from ortho_cli.training.run import train

FACTORED = (
    "[{name: factorized, rank_scale: 0.5, targets: ['layers.*', head], spectral: false},"
    " {name: frobenius_decay, penalty: 0.01}, {name: normalize, mode: record}]"
)
SGD = "{name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 0.01, decay_norms: true}"
PLAIN = {"train": "{epochs: 2, seed: 0, threads: 1}", "schedule": "{name: constant}"}
NORM = "method/factorized/product_norm"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [SGD, pytest.param("{name: adamw, lr: 1e-3}", marks=pytest.mark.slow)])
def test_killed_and_resumed(optimizer: str, tmp_path: Path) -> None:
    sections = {"methods": FACTORED, "optimizer": optimizer}
    train(load_train(write(tmp_path, "whole", **sections)))
    broken = write(tmp_path, "broken", **sections)
    die_at(broken, 17)
    train(load_train(broken), resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")
    for name in ("normalize/norms", "factorized/dense/model", "factorized/factors/model"):
        first, second = (
            (tmp_path / run / "export" / f"{name}.safetensors").read_bytes() for run in ("whole", "broken")
        )
        assert first == second
    norms = load_file(tmp_path / "whole" / "export" / "normalize" / "norms.safetensors")
    assert {name: len(values) for name, values in norms.items()} == {"head": 66, "layers.0": 66}


def test_norms_of_one_run_are_replayed_in_another(tmp_path: Path) -> None:
    train(load_train(write(tmp_path, "whole", methods=FACTORED, optimizer=SGD, **PLAIN)))
    replay = FACTORED.replace("mode: record", f"mode: replay, source: {tmp_path / 'whole'}").replace("0.01", "0.0")
    train(load_train(write(tmp_path, "again", methods=replay, optimizer=SGD, **PLAIN)))
    train(load_train(write(tmp_path, "free", methods=FACTORED.replace("0.01", "0.0"), optimizer=SGD, **PLAIN)))
    recorded, replayed, free = (lines_of(tmp_path / run, NORM) for run in ("whole", "again", "free"))
    assert replayed == pytest.approx(recorded, rel=1e-5)
    assert free[-1] > 1.02 * recorded[-1]  # what decay took


def test_the_dense_network_left_behind_is_a_base(tmp_path: Path) -> None:
    """Evaluated as it is, it does exactly what the factored one did."""
    outcome = train(load_train(write(tmp_path, "whole", methods=FACTORED, optimizer=SGD, **PLAIN)))
    base = tmp_path / "whole" / "export" / "factorized" / "dense"
    still = write(
        tmp_path, "dense", methods="[]", model=f"{{name: mlp, hidden: [32], base: {base}}}",
        optimizer="{name: sgd, lr: 1e-12}", schedule="{name: constant}", train="{steps: 1, threads: 1}",
    )  # fmt: skip
    found = train(load_train(still))
    assert found.parameters < outcome.parameters * 2
    assert found.metrics["eval/accuracy"] == outcome.metrics["eval/accuracy"]
    assert found.metrics["eval/loss"] == pytest.approx(outcome.metrics["eval/loss"], rel=1e-5)


def test_a_run_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_(model, backend="eager", fullgraph=True))
    for name, extra in (("plain", ""), ("compiled", ", compile: true")):
        sections = {**PLAIN, "train": f"{{steps: 12, threads: 1{extra}}}", "model": "{name: resnet20}"}
        methods = FACTORED.replace("['layers.*', head]", "auto").replace("FOLDER", str(tmp_path))
        train(load_train(write(tmp_path, name, methods=methods, optimizer=SGD, **sections)))
    assert lines_of(tmp_path / "compiled", NORM) == pytest.approx(lines_of(tmp_path / "plain", NORM), rel=1e-4)


def test_a_student_learns_from_a_run_and_goes_on(tmp_path: Path) -> None:
    teacher = {"methods": "[]", "model": "{name: resnet20}", "train": "{steps: 20, threads: 1}"}
    train(load_train(write(tmp_path, "teacher", optimizer=SGD, **teacher)))
    methods = (
        f"[{{name: factorized, rank: 2}}, {{name: distill, teacher: {tmp_path / 'teacher'}, alpha: 0.5,"
        " attention: [layer1, layer3]}]"
    )
    sections = {"methods": methods, "model": "{name: resnet20}", "train": "{steps: 16, threads: 1}", "optimizer": SGD}
    outcome = train(load_train(write(tmp_path, "whole", **sections)))
    assert any("distill: the teacher is a CifarResNet of 269,434 parameters" in note for note in outcome.notes)
    terms = lines_of(tmp_path / "whole", "method/distill/penalty")
    assert terms
    broken = write(tmp_path, "broken", **sections)
    die_at(broken, 12)
    train(load_train(broken), resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")
    assert not any(
        "teacher" in name for name in load_file(tmp_path / "whole/checkpoints/step-000016/model.safetensors")
    )


def test_another_rank_is_not_resumed(tmp_path: Path) -> None:
    path = write(tmp_path, "run", methods=FACTORED, optimizer=SGD, **PLAIN)
    train(load_train(path))
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000044" / "state.json").read_text("utf-8"))
    state["methods"]["0"]["state"]["ranks"]["head"] = [3]
    (tmp_path / "run" / "checkpoints" / "step-000044" / "state.json").write_text(json.dumps(state), "utf-8")
    with pytest.raises(CheckpointError, match="head is of ranks"):
        train(load_train(path, ["train.epochs=3"]), resume=True)


FNL = [name for name in shipped() if name.endswith(("-factorized", "-overcomplete", "-norms", "-tensors", "-distill"))]
COUNTS = {
    "cifar10-resnet20-factorized": [63_850],
    "cifar10-resnets-factorized": [38_970, 107_370, 318_234, 69_946, 194_410, 578_074, 139_642, 390_250, 1_162_714],
    "cifar100-resnet32-overcomplete": [1_437_684, 2_843_124],
    "cifar10-vgg19-factorized": [397_642, 992_650, 1_996_618],
    "cifar10-resnet32x2-factorized": [150_090, 373_194, 743_370],
    "tiny-imagenet-vgg19-factorized": [410_440, 1_005_448, 2_011_144],
    "tiny-imagenet-resnet32x2-factorized": [142_664, 380_360, 754_760],
    "cifar10-wrn28-10-factorized": [610_282, 2_435_034],
    "cifar10-wrn28-10-tensors": [607_160, 2_434_702, 442_918, 1_767_376],
}


def cells(name: str) -> list[TrainRecipe]:
    return [recipe for _, recipe in cell_recipes(load_train(name))]


@pytest.mark.parametrize("name", COUNTS)
def test_shipped_recipes_have_the_papers_parameters(name: str) -> None:
    found = []
    for recipe in cells(name):
        totals = describe(recipe)["totals"]
        if totals["trainable"] not in found:
            found.append(totals["trainable"])
    assert found == COUNTS[name]


@pytest.mark.parametrize("name", [name for name in FNL if name.startswith("digits")])
def test_the_digits_twins_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "digits-resnet20-distill":
        train(_short(cells("digits-resnet20-dense")[0]))
    for recipe in cells(name)[:: 3 if "resnet20" in name else 1]:  # one seed
        outcome = train(_short(recipe))
        assert outcome.step == 2
        assert (Path(recipe.run.dir) / "export" / "factorized" / "dense" / "model.safetensors").is_file()


def _short(recipe: TrainRecipe) -> Any:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": None, "steps": 2})})
