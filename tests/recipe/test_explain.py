"""`validate` on a schema as later recipes will have: sections, tagged unions, constraints; every error in one."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.load import validate
from ortho_cli.recipe.parse import MAX_SHOWN, parse_yaml


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class HRA(Section):
    name: Literal["hra"]
    rank: int = Field(default=8, ge=2)
    penalty: float = 0.0

    @field_validator("rank")
    @classmethod
    def even(cls, rank: int) -> int:
        if rank % 2:
            raise ValueError(f"an even number is needed, found {rank}")
        return rank


class GOR(Section):
    name: Literal["gor"]
    groups: int = 32
    mode: Literal["inter", "intra"] = "inter"


class Optimizer(Section):
    name: str
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    betas: tuple[float, float] = (0.9, 0.999)


class Recipe(Section):
    methods: list[Annotated[HRA | GOR, Field(discriminator="name")]] = []
    optimizer: Optimizer | None = None
    at: int | list[int | str] = 0
    weights: dict[str, float] = {}
    compile: bool = False
    as_: str | None = Field(default=None, alias="as")


def check(text: str) -> Recipe:
    data, positions = parse_yaml(text, "r.yaml")
    return validate(Recipe, data, positions, "r.yaml", hint="try again")


def errors(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        pytest.fail(f"accepted as {check(text)!r}")
    lines = caught.value.message.splitlines()
    assert all(line.startswith("r.yaml:") for line in lines)
    assert caught.value.where == ":".join(lines[0].split(":")[:2])
    assert caught.value.hint == "try again"
    return [line.removeprefix("r.yaml:") for line in lines]


def test_accepts() -> None:
    recipe = check(
        "methods:\n  - {name: hra, rank: 4, penalty: 1e-4}\n  - name: gor\n    mode: intra\n"
        "optimizer: {name: adam, lr: 1, betas: [0.9, 0.98]}\nat: [3, x]\nweights: {on: 1, '2': .5}\nas: true-ish\n"
    )
    assert recipe.methods == [HRA(name="hra", rank=4, penalty=1e-4), GOR(name="gor", mode="intra")]
    assert recipe.optimizer == Optimizer(name="adam", lr=1.0, betas=(0.9, 0.98))
    assert recipe.weights == {"on": 1.0, "2": 0.5}
    assert (recipe.at, recipe.as_) == ([3, "x"], "true-ish")


def test_everything_at_once_in_the_order_of_the_lines() -> None:
    text = """\
optimiser: {name: sgd, lr: 0.1}
methods:
  - name: hra
    rnk: 4
  - name: hra
    rank: "4"
  - {name: gorr}
  - groups: 3
  - name: gor
    groups: 3
    groups: 4
    mode: outer
at: true
compile: yes
weights:
  a: 1e-4
  b:
    x
as: 3
"""
    assert errors(text) == [
        "1: optimiser: no such key; did you mean 'optimizer'?",
        "4: methods.0.rnk: no such key; did you mean 'rank'?",
        "6: methods.1.rank: expected a whole number, found '4' (remove the quotes)",
        "7: methods.2.name: 'gorr' is none of gor, hra; did you mean 'gor'?",
        "8: methods.3.name: missing; one of gor, hra",
        "11: methods.4.groups: repeated; it is already on line 10",
        "12: methods.4.mode: expected inter or intra, found 'outer'; did you mean 'inter'?",
        "13: at: expected a whole number or a list, found true",
        "14: compile: expected true or false, found 'yes' (write true without quotes)",
        "18: weights.b: expected a number, found 'x'",
        "19: as: expected text, found 3 (put it in quotes)",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("methods: {name: hra}", "1: methods: expected a list, found a mapping"),
        ("methods: hra", "1: methods: expected a list, found 'hra' (write a list: [item, ...])"),
        ("methods: [hra]", "1: methods.0: expected a mapping, found 'hra'"),
        ("methods:\n - ~", "2: methods.0: expected a mapping, found null"),
        ("methods:\n - {name: 3}", "2: methods.0.name: '3' is none of gor, hra"),
        ("methods: [{name: hra, rank: 3}]", "1: methods.0.rank: an even number is needed, found 3"),
        ("methods: [{name: hra, rank: 0}]", "1: methods.0.rank: should be greater than or equal to 2, found 0"),
        ("methods: [{name: hra, rank: true}]", "1: methods.0.rank: expected a whole number, found true"),
        ("methods: [{name: hra, rank: 8.0}]", "1: methods.0.rank: expected a whole number, found 8.0"),
        ("methods: [{name: hra, rank: ~}]", "1: methods.0.rank: expected a whole number, found null"),
        ("methods: [{name: gor, rank: 8}]", "1: methods.0.rank: no such key here; known: name, groups, mode"),
        ("methods: [{name: hra, hra: 5}]", "1: methods.0.hra: no such key here; known: name, rank, penalty"),
        (
            "methods:\n - {name: hra, penalty: '1e-4'}",
            "2: methods.0.penalty: expected a number, found '1e-4' (remove the quotes)",
        ),
        ("optimizer:\n  name: adam", "1: optimizer.lr: missing"),
        ("optimizer:\n  name: adam\n  lrr: 1", "3: optimizer.lrr: no such key; did you mean 'lr'?"),
        ("optimizer: {name: adam, lr: 0}", "1: optimizer.lr: should be greater than 0, found 0"),
        ("optimizer: {name: adam, lr: .inf}", "1: optimizer.lr: expected a finite number, found inf"),
        ("optimizer: {name: adam, lr: .nan}", "1: optimizer.lr: expected a finite number, found nan"),
        (
            "optimizer: {name: adam, lr: 1e999}",
            "1: optimizer.lr: too large for a number; write .inf, or put it in quotes if it is text",
        ),
        ("optimizer: {name: adam, lr: 1, betas: [1]}", "1: optimizer.betas.1: missing"),
        ("optimizer: adam", "1: optimizer: expected a mapping, found 'adam'"),
        ("at: [1, ~, x]", "1: at.1: expected a whole number or text, found null"),
        ("at: '8'", "1: at: expected a whole number or a list, found '8' (remove the quotes)"),
        ("weights: {a: true}", "1: weights.a: expected a number, found true"),
        ("compile: 1", "1: compile: expected true or false, found 1"),
        ("compile: True", "1: compile: expected true or false, found 'True' (write true without quotes)"),
        ("as_: x", "1: as_: no such key; did you mean 'as'?"),
        ('"\\e[31m": 1', "1: '\\x1b[31m': no such key here; known: methods, optimizer, at, weights, compile, as"),
        ('as: ["a\\e[31m"]', "1: as: expected text, found a list"),
        ("compile: " + "x" * 300, "1: compile: expected true or false, found '" + "x" * 57 + "...'"),
    ],
)
def test_one_error(text: str, expected: str) -> None:
    assert errors(text) == [expected]


def test_infinite_and_nan_are_numbers_where_the_schema_allows_them() -> None:
    weights = check("weights: {a: .inf, b: -.inf, c: .nan}").weights
    assert (weights["a"], weights["b"]) == (math.inf, -math.inf)
    assert math.isnan(weights["c"])


def test_a_number_is_never_bent_into_another_type() -> None:
    for written in ("true", "'8'", "8.0", "1e1", "~", "[8]", "{a: 8}"):
        assert errors(f"methods: [{{name: hra, rank: {written}}}]")


def test_many_errors_are_cut_short() -> None:
    with pytest.raises(RecipeError) as caught:
        check("methods: [" + "3, " * 5000 + "]")
    lines = caught.value.message.splitlines()
    assert len(lines) == MAX_SHOWN + 1
    assert lines[-1] == f"... and {5000 - MAX_SHOWN} more"


def test_data_is_not_changed() -> None:
    data: dict[str, Any] = {"at": [1, "x"]}
    _, positions = parse_yaml("at: [1, x]", "r.yaml")
    recipe = validate(Recipe, data, positions, "r.yaml")
    assert data == {"at": [1, "x"]}
    assert recipe.at == [1, "x"]
