"""A recipe's matrix: its cells in order, their names and folders, and what may not vary."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_recipes import errors, written

from ortho_cli.recipe.matrix import Cell, cells, short_keys
from ortho_cli.recipe.train import cell_recipes, load_train, recipe_data


def made(path: Path) -> list[Cell]:
    return cells(recipe_data(load_train(path), given_only=True))


def test_row_major_order_names_and_folders(tmp_path: Path) -> None:
    path = written(
        tmp_path, "methods: [{name: hra}]\nmatrix:\n  train.seed: [0, 1, 2]\n  methods.hra.rank: [4, 8]\n",
        run="{dir: runs/x/}",
    )  # fmt: skip
    found = cell_recipes(load_train(path))
    assert [cell.name for cell, _ in found] == [
        "seed=0,rank=4", "seed=0,rank=8", "seed=1,rank=4", "seed=1,rank=8", "seed=2,rank=4", "seed=2,rank=8",
    ]  # fmt: skip
    assert [cell.index for cell, _ in found] == list(range(6))
    assert [cell.choice for cell, _ in found][-1] == (2, 1)
    for cell, recipe in found:
        assert recipe.run.dir == f"runs/x/{cell.name}"
        assert cell.overrides == {"train.seed": recipe.train.seed, "methods.hra.rank": recipe.methods[0].rank}
        assert recipe.matrix is None
        assert "matrix" not in cell.data


def test_without_a_matrix_one_cell(tmp_path: Path) -> None:
    recipe = load_train(written(tmp_path))
    ((cell, again),) = cell_recipes(recipe)
    assert (cell.name, cell.overrides, again) == ("", {}, recipe)


def test_keys_that_vary_together(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "methods: [{name: hra}]\nmatrix:\n"
        "  methods.hra.penalty, methods.hra.gram_schmidt: [[0.0, false], [1e-5, false], [0.0, true]]\n",
    )
    assert [cell.name for cell in made(path)] == [
        "penalty=0.0,gram_schmidt=false", "penalty=1e-5,gram_schmidt=false", "penalty=0.0,gram_schmidt=true",
    ]  # fmt: skip
    assert [recipe.methods[0].gram_schmidt for _, recipe in cell_recipes(load_train(path))] == [False, False, True]


def test_sections_and_lists_as_values(tmp_path: Path) -> None:
    """A whole section may vary: nothing of the recipe's own remains below it, as its defaults would."""
    path = written(
        tmp_path,
        "schedule: {name: cosine, floor: 0.1}\nmatrix:\n"
        "  schedule: [{name: constant}, {name: multistep, at: [1]}]\n  model.hidden: [[], [8, 8]]\n",
    )
    assert [cell.name for cell in made(path)] == [
        "schedule=name-constant,hidden=", "schedule=name-constant,hidden=8-8",
        "schedule=name-multistep-at-1,hidden=", "schedule=name-multistep-at-1,hidden=8-8",
    ]  # fmt: skip
    assert [recipe.schedule.name for _, recipe in cell_recipes(load_train(path))][::2] == ["constant", "multistep"]


def test_names_are_folders_and_differ(tmp_path: Path) -> None:
    bases = ["a/b", "a b", "../x", "y" * 300, "y" * 301]
    path = written(tmp_path, f"matrix: {{model.base: {bases}}}\n")
    names = [cell.name for cell in made(path)]
    assert names[:3] == ["base=a-b", "base=a-b,cell=1", "base=..-x"]
    assert len(set(names)) == len(names)
    assert all(len(name.encode()) < 200 and "/" not in name for name in names)


def test_short_keys_tell_apart() -> None:
    paths = ["optimizer.lr", "methods.hra.lr", "methods.lora.lr", "train.seed", "methods"]
    assert short_keys(paths) == {
        "optimizer.lr": "optimizer.lr", "methods.hra.lr": "hra.lr", "methods.lora.lr": "lora.lr", "train.seed": "seed",
        "methods": "methods",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ("{}", ["9: matrix: expected 1 or more of them, found a mapping"]),
        ("[1]", ["9: matrix: expected a mapping, found a list"]),
        ("{train.seed: 3}", ["9: matrix.train.seed: expected a list, found 3"]),
        ("{train.seed: []}", ["9: matrix.train.seed: expected 1 or more of them, found an empty list"]),
        ("{train.seed: [1, 2, 1]}", ["9: matrix.train.seed: 1 is given 2 times"]),
        ("{train.sed: [1]}", ["9: train.sed: no such key; did you mean 'seed'?"]),
        ("\n  train.seed: [0,\n    1.5]", ["11: train.seed: expected a whole number, found 1.5"]),
        ("{methods.lora.rank: [1]}", ["9: matrix.methods.lora.rank: nothing in methods is named 'lora'; it has hra"]),
        ("{methods.hra.rank: [4, 5, 6, 7]}", [
            "9: methods.0.rank: must be even to start as the identity, found 5; take 4 or 6",
            "9: methods.0.rank: must be even to start as the identity, found 7; take 6 or 8",
        ]),
        ("{run.dir: [a], version: [1], run: [{dir: a}], matrix: [1]}", [
            "9: matrix.run.dir: run.dir may not vary", "9: matrix.version: version may not vary",
            "9: matrix.run: run may not vary", "9: matrix.matrix: matrix may not vary",
        ]),
        ("{methods: [[]], methods.hra.rank: [4]}", ["9: matrix.methods.hra.rank: methods.hra.rank is varied twice, also"
         " by methods"]),
        ("{'train.seed, data.batch': [[1, 2], 3, [4]]}", [
            "9: matrix.train.seed, data.batch.1: expected a list of 2 values, one for each of train.seed, data.batch",
            "9: matrix.train.seed, data.batch.2: expected a list of 2 values, one for each of train.seed, data.batch",
        ]),
        (f"{{train.seed: {list(range(200))}, data.batch: [1, 2, 3, 4, 5, 6]}}", ["9: matrix: makes 1200 cells;"
         " at most 1000"]),
        ("{train.accumulate: [2, 3], data.batch: [8, 9]}", [
            "9: train.accumulate: a batch of 9 cannot be split into 2 equal parts",
            "9: train.accumulate: a batch of 8 cannot be split into 3 equal parts",
        ]),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, matrix: str, expected: list[str]) -> None:
    path = written(tmp_path, f"methods: [{{name: hra}}]\nmatrix: {matrix}\n")
    assert sorted(errors(path)) == sorted(expected)


def test_a_thousand_cells_of_which_all_are_wrong_do_not_take_minutes(tmp_path: Path) -> None:
    path = written(tmp_path, f"matrix: {{train.epochs: [-1, -2], train.seed: {list(range(500))}}}\n")
    assert errors(path) == ["8: train.epochs: should be greater than or equal to 1, found -1"]
