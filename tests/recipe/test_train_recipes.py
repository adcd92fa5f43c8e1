"""What a run does with its recipe: write it resolved, read it again, compare it on `--resume`; and the shipped ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_recipes import written

from ortho_cli.recipe.catalog import load_any
from ortho_cli.recipe.shipped import find, shipped
from ortho_cli.recipe.train import (
    MAY_CHANGE,
    MAY_GROW,
    TrainRecipe,
    cell_recipes,
    difference,
    load_train,
    may_change,
    recipe_data,
    resolved_yaml,
)

TRAINING = [name for name in shipped() if isinstance(load_any(name), TrainRecipe)]


@pytest.mark.parametrize("name", TRAINING)
def test_resolved_loads_to_the_same(tmp_path: Path, name: str) -> None:
    recipe = load_train(name)
    for _, cell in cell_recipes(recipe):
        (tmp_path / "recipe.yaml").write_text(resolved_yaml(cell), encoding="utf-8")
        again = load_train(tmp_path / "recipe.yaml")
        assert again == cell
        assert difference(cell, again) == []
        assert resolved_yaml(again) == resolved_yaml(cell)


@pytest.mark.parametrize("name", TRAINING)
def test_each_says_what_to_expect(name: str) -> None:
    assert "\n# Expect: " in find(name).read_text(encoding="utf-8")


EVERYTHING = (
    "methods:\n  - {name: hra, adapter: runs/a, lr: 1e-5}\n  - {name: lora, alpha: 2, targets: ['**.to_q', '1e-4']}\n"
    "  - {name: gor, targets: all}\n  - {name: peft, config: {peft_type: BOFT, x: [1, null, {y: '8'}], z: .inf}}\n"
    "schedule: {name: multistep, at: [1], warmup: 3}\n"
    "matrix: {'train.seed, data.batch': [[1, 2], [3, 4]], model.hidden: [[], [8]]}\n"
)


def test_resolved_loads_to_the_same_whatever_it_holds(tmp_path: Path) -> None:
    recipe = load_train(written(tmp_path, EVERYTHING, run="{dir: 'a: b', best: {patience: 3}, keep: all}"))
    (tmp_path / "recipe.yaml").write_text(resolved_yaml(recipe), encoding="utf-8")
    again = load_train(tmp_path / "recipe.yaml")
    assert again == recipe
    filled = {"penalty", "penalty_form", "bias", "modules_to_save", "rates", "compat"}
    assert again.methods[0].model_fields_set == recipe.methods[0].model_fields_set | filled


def test_difference(tmp_path: Path) -> None:
    old = load_train(written(tmp_path, "methods: [{name: hra}, {name: gor}]\n"))
    sets = [
        "train.seed=3", "methods.hra.rank=4", "methods.1={name: lora}", "optimizer={name: adamw, lr: 0.1}",
        "data.classes=[1, 2]", "run.best={}",
    ]  # fmt: skip
    found = {key: (before, after) for key, before, after in difference(old, load_train(tmp_path / "r.yaml", sets))}
    assert list(found) == ["data.classes", "methods.0.rank", "methods.1", "optimizer", "train.seed", "run.best"]
    assert (found["methods.0.rank"], found["train.seed"]) == ((8, 4), (0, 3))
    assert found["data.classes"] == (None, [1, 2])
    values: Any = found["optimizer"]
    assert (values[0]["name"], values[1]["name"]) == ("sgd", "adamw")
    more = load_train(tmp_path / "r.yaml", ["methods=[{name: hra}]"])
    assert [(key, after) for key, _, after in difference(old, more)] == [("methods.1", None)]


def test_what_may_change_is_in_the_schema(tmp_path: Path) -> None:
    data: Any = recipe_data(load_train(written(tmp_path)))
    for key in MAY_CHANGE | MAY_GROW:
        section, _, name = key.partition(".")
        assert name in data[section], key


@pytest.mark.parametrize(
    ("key", "old", "new", "allowed"),
    [
        ("run.keep", 2, "all", True), ("run.trackers", [], ["wandb"], True), ("data.workers", 0, 4, True),
        ("data.path", None, "x", True), ("run.save_every_steps", None, 5, True), ("run.log_every", 10, 1, True),
        ("train.epochs", 2, 3, True), ("train.epochs", 3, 2, False), ("train.steps", None, 9, False),
        ("train.epochs", 3, None, False), ("train.seed", 0, 1, False), ("data.batch", 64, 128, False),
        ("methods.0.rank", 8, 4, False), ("optimizer", {}, {}, False),
    ],
)  # fmt: skip
def test_may_change(key: str, old: object, new: object, allowed: bool) -> None:
    assert may_change(key, old, new) is allowed


def test_the_papers_settings() -> None:
    """train_cifar10.py's, but for what the header lists as deviations."""
    data: Any = recipe_data(load_train("cifar10-resnet110-gor"))
    model, optimizer, schedule, gor = data["model"], data["optimizer"], data["schedule"], data["methods"][0]
    assert (model["norm"], model["shortcut"], model["compat"]) == ("group", "B", "paper-head")
    assert (data["data"]["batch"], data["data"]["augment"], data["train"]["epochs"]) == (128, ["crop", "flip"], 200)
    assert (optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == (0.1, 0.9, 1e-4)
    assert optimizer["decay_norms"]
    assert (schedule["at"], schedule["factor"], schedule["warmup"]) == ([100, 150], 0.1, 50_000 // 128)
    assert (gor["mode"], gor["groups"], gor["min_filters"], gor["penalty"]) == ("inter", 32, 4, 1e-2)
    text = find("cifar10-resnet110-gor").read_text(encoding="utf-8")
    assert "# Deviations:" in text
    assert "# repo: " in text


def test_counterparts_differ_in_the_method_alone() -> None:
    plain, gor = load_train("digits-resnet20-plain"), load_train("digits-resnet20-gor")
    assert [key for key, _, _ in difference(plain, gor)] == ["methods.0", "run.dir"]


def test_the_finetuning_recipes_fit_what_they_start_from() -> None:
    pretrained = load_train("digits-vit-pretrain")
    for name in ("digits-vit-hra-finetune", "digits-vit-hra-matrix"):
        recipe = load_train(name)
        assert recipe.model.base == pretrained.run.dir
        assert [key for key, _, _ in difference(pretrained, recipe) if key.startswith("model.")] == ["model.base"]
        assert set(recipe.data.classes or ()) == set(range(10)) - set(pretrained.data.classes or ())


def test_the_matrix_is_the_finetuning_recipe_at_four_strengths_and_three_seeds() -> None:
    found = cell_recipes(load_train("digits-vit-hra-matrix"))
    assert len(found) == 12
    assert {(r.methods[0].penalty, r.methods[0].gram_schmidt) for _, r in found} == {
        (0.0, False), (1e-5, False), (1e-3, False), (0.0, True),
    }  # fmt: skip
    assert [recipe.train.seed for _, recipe in found] == [0, 1, 2] * 4
    changed = {key for key, _, _ in difference(load_train("digits-vit-hra-finetune"), found[0][1])}
    assert changed == {"run.dir", "run.keep"}


def test_the_settings_of_oialrs_authors_for_resnetrs101() -> None:
    """Their experiment imagenet-resnetrs: 256 pictures on each of 16 GPUs, 312 steps an epoch."""
    data: Any = recipe_data(load_train("imagenet-resnetrs101-oialr"))
    oialr, steps = data["methods"][0], 1_281_167 // 4096
    assert (data["model"]["architecture"], data["model"]["drop_rate"]) == ("resnetrs101", 0.25)
    assert (data["data"]["batch"], data["data"]["size"]) == (16 * 256, 160)
    assert (oialr["when"], oialr["delay"], oialr["every"], oialr["beta"]) == ("step", 200, 100, 0.15)
    assert (oialr["keep_first"], oialr["keep_last"], oialr["order"], oialr["share"]) == (False, True, "back", 0.1)
    assert (data["optimizer"]["lr"], data["optimizer"]["weight_decay"]) == (1e-3, 1e-3)
    schedule = data["schedule"]
    assert (schedule["warmup"], schedule["floor"], schedule["k_decay"]) == (10 * steps, 1e-5 / 1e-3, 0.34)
    assert (data["train"]["epochs"], data["train"]["clip"], data["train"]["precision"]) == (300, 1.0, "bf16")
    assert (data["task"]["label_smoothing"], data["task"]["mixup"]) == (0.1, 0.1)


def test_the_released_defaults_of_autoformer() -> None:
    data: Any = recipe_data(load_train("ettm2-forecaster-oialr"))
    model = data["model"]
    assert (data["task"]["input"], data["task"]["horizon"], data["data"]["batch"]) == (96, 192, 32)
    assert (model["dim"], model["heads"], model["depth"], model["dim"] * model["mlp_ratio"]) == (512, 8, 2, 2048)
    assert (model["moving_average"], model["dropout"]) == (25, 0.05)
    assert data["optimizer"] == {**data["optimizer"], "name": "adam", "lr": 1e-4, "weight_decay": 0.0}
    assert (data["train"]["epochs"], data["run"]["best"]["patience"]) == (10, 3)
    assert (data["schedule"]["at"], data["schedule"]["factor"]) == (list(range(2, 10)), 0.5)
