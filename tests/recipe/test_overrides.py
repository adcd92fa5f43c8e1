"""`--set KEY=VALUE`: which key it means, what it may hold, and that mistakes name it instead of a line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from training_recipes import errors, written

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.overrides import apply_sets, located, value_of
from ortho_cli.recipe.parse import Positions
from ortho_cli.recipe.train import load_train, recipe_data

DATA: dict[str, Any] = {
    "train": {"seed": 0, "epochs": 2},
    "model": {"name": "mlp", "hidden": [64, 64]},
    "methods": [{"name": "gor"}, {"name": "hra", "rank": 8}, {"name": "gor"}],
    "matrix": {"train.seed": [0, 1]},
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", 16), ("1e-4", 1e-4), ("-.5", -0.5), ("true", True), ("null", None), ("", None), ("on", "on"),
        ("12:30", "12:30"), ("runs/a b", "runs/a b"), ("a, b", "a, b"), ("a: b", "a: b"), ("x # y", "x # y"),
        ("**.to_q", "**.to_q"), ("'8'", "8"), ('"a\\tb"', "a\tb"), ("[]", []),
        ("[a, 1e-1, [true]]", ["a", 0.1, [True]]), ("{a: {b: ~}}", {"a": {"b": None}}), ("  7 ", 7),
    ],
)  # fmt: skip
def test_values(text: str, value: object) -> None:
    found = value_of(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["[1", "{a: 1", "'x", "{a: 1, a: 2}", "[*x]", "[!!int 1]", "[1]\nb: 2", "9" * 30, "1e999"]
)
def test_what_is_no_value(text: str) -> None:
    with pytest.raises(RecipeError):
        value_of(text)


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("train.seed", ("train", "seed")),
        ("train.clip", ("train", "clip")),
        ("schedule.name", ("schedule", "name")),
        ("methods", ("methods",)),
        ("methods.hra.rank", ("methods", 1, "rank")),
        ("methods.1.rank", ("methods", 1, "rank")),
        ("methods.hra", ("methods", 1)),
        ("model.hidden.0", ("model", "hidden", 0)),
        ("matrix.train.seed", ("matrix", "train.seed")),
        ("matrix", ("matrix",)),
    ],
)
def test_keys(path: str, location: tuple[str | int, ...]) -> None:
    assert located(DATA, path) == location


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("methods.hr.rank", "nothing in methods is named 'hr'; did you mean 'hra'?"),
        ("methods.oialr.rank", "nothing in methods is named 'oialr'; it has gor, hra, gor"),
        ("methods.gor.mode", "2 of methods are named 'gor'; write methods.0 or methods.2"),
        ("methods.3.mode", "there is no methods.3; the recipe has 3"),
        ("train.seed.x", "train.seed is 0 and has no keys below it"),
        ("train..seed", "a key is words with dots between them, e.g. train.seed"),
        ("", "a key is words with dots between them, e.g. train.seed"),
    ],
)
def test_keys_that_lead_nowhere(path: str, reason: str) -> None:
    with pytest.raises(RecipeError) as caught:
        located(DATA, path)
    assert caught.value.message == reason


def test_no_methods_yet() -> None:
    with pytest.raises(RecipeError, match="nothing in methods is named 'hra'; it is empty"):
        located({}, "methods.hra.rank")


def test_the_data_given_is_not_changed() -> None:
    before = copy.deepcopy(DATA)
    changed = apply_sets(DATA, Positions(), ["methods.hra.rank=16", "train.clip=1.0", "schedule.name=linear"])
    assert before == DATA
    assert changed["methods"] == [{"name": "gor"}, {"name": "hra", "rank": 16}, {"name": "gor"}]
    assert changed["train"] == {"seed": 0, "epochs": 2, "clip": 1.0}
    assert changed["schedule"] == {"name": "linear"}


def test_in_order_and_the_last_wins() -> None:
    sets = ["methods=[{name: hra}]", "methods.hra.rank=4", "methods.0.rank=6"]
    assert apply_sets(DATA, Positions(), sets)["methods"] == [{"name": "hra", "rank": 6}]


def test_a_recipe_with_sets(tmp_path: Path) -> None:
    path = written(tmp_path, "methods: [{name: hra, rank: 8}]\n")
    sets = ["methods.hra.rank=16", "train.epochs=null", "train.steps=7", "schedule={name: cosine, floor: 0.1}",
            "model.hidden=[32]", "data.classes=[0, 1]", "run.dir=runs/y=z", "run.best.mode=max"]  # fmt: skip
    data: Any = recipe_data(load_train(path, sets))
    assert data["methods"][0]["rank"] == 16
    assert (data["train"]["epochs"], data["train"]["steps"]) == (None, 7)
    assert (data["schedule"]["name"], data["schedule"]["floor"]) == ("cosine", 0.1)
    assert (data["model"]["hidden"], data["data"]["classes"], data["run"]["dir"]) == ([32], [0, 1], "runs/y=z")
    assert data["run"]["best"]["metric"] == "eval/accuracy"
    assert load_train(path) == load_train(path, [])


def test_what_the_schema_says_names_the_option(tmp_path: Path) -> None:
    path = written(tmp_path, "methods: [{name: hra}]\n")
    sets = ["methods.hra.rnk=16", "train.seed=x", "trian.seed=1", "schedule.floor=2", "data={name: mnist, btach: 8}"]
    assert errors(path, *sets) == [
        "--set data: data.btach: no such key; did you mean 'batch'?",
        "--set methods.hra.rnk: no such key; did you mean 'rank'?",
        "--set schedule.floor: schedule.name: missing; one of constant, cosine, inverse-sqrt, linear, multistep,"
        " one-cycle",
        "--set train.seed: expected a whole number, found 'x'",
        "--set trian.seed: no such key; did you mean 'train'?",
    ]  # fmt: skip


def test_both_kinds_of_place_in_one_error(tmp_path: Path) -> None:
    path = written(tmp_path, task="{name: x}")
    with pytest.raises(RecipeError) as caught:
        load_train(path, ["methods=[{name: hra, rank: 7}]"])
    rank, task = caught.value.message.splitlines()
    assert rank == "--set methods: methods.0.rank: must be even to start as the identity, found 7; take 6 or 8"
    assert task.startswith(f"{path}:2: task.name: 'x' is none of classify, ")
    assert caught.value.where == "--set methods"


def test_a_fixed_line_is_no_longer_to_blame(tmp_path: Path) -> None:
    assert load_train(written(tmp_path, train="{epochs: x}"), ["train.epochs=3"]).train.epochs == 3
    assert errors(written(tmp_path, train="{epochs: 1}"), "train={}") == [
        "--set train: says neither epochs nor steps; give one of them"
    ]


def test_every_bad_option_at_once(tmp_path: Path) -> None:
    assert errors(written(tmp_path), "train.seed", "methods.hra.rank=1", "optimizer.lr=[1", "train.seed=1") == [
        "--set train.seed: expected KEY=VALUE, found no '='",
        "--set methods.hra.rank: nothing in methods is named 'hra'; it is empty",
        "--set optimizer.lr: '[1' is not a value: while parsing a flow sequence expected ',' or ']', but got"
        " '<stream end>'",
    ]


def test_the_matrix_and_set_do_not_fight(tmp_path: Path) -> None:
    path = written(
        tmp_path, "methods: [{name: hra}]\nmatrix: {train.seed: [0, 1], methods.hra: [{name: hra, rank: 4}]}\n"
    )
    varied = "the recipe's matrix varies it; choose a cell, or change the matrix: --set 'matrix.KEY=[VALUE]'"
    assert errors(path, "train.seed=3", "methods.hra.rank=6", "data.batch=8") == [
        f"--set train.seed: {varied}",
        f"--set methods.hra.rank: {varied}",
    ]
    matrix = load_train(path, ["matrix.train.seed=[5]", "data.batch=8"]).matrix
    assert matrix is not None
    assert matrix["train.seed"] == (5,)
    assert load_train(path, ["train.seed=3", "matrix=null"]).train.seed == 3
    assert errors(path, "matrix.train.seed=[x]") == ["--set matrix.train.seed: expected a whole number, found 'x'"]
