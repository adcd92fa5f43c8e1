"""The shipped recipes of the conditioning paper: twins in all but the methods, and the offline form trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import lines_of

from ortho_cli.recipe.train import TrainRecipe, cell_recipes, load_train
from ortho_cli.training.dry_run import describe
from ortho_cli.training.run import train

PAPER = {
    "cifar10-resnet18-whiten-nog-olr": "cifar10-resnet18-whiten",
    "cifar10-resnet18-whiten-nog-olr-soc": "cifar10-resnet18-whiten",
    "cifar100-resnet50-whiten-nog-olr-soc": "cifar100-resnet50-whiten",
}
ARMS = [recipe for _, recipe in cell_recipes(load_train("digits-resnet18-whiten"))][::3]  # of one seed


def names(recipe: TrainRecipe) -> list[str]:
    return [method.name for method in recipe.methods if method.name not in ("whiten", "track_conditioning")]


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_differs_from_its_twin_in_its_methods_alone(name: str) -> None:
    recipe, twin = load_train(name), load_train(PAPER[name])
    assert recipe.model_dump(exclude={"methods", "run"}) == twin.model_dump(exclude={"methods", "run"})
    assert names(twin) == [] and set(twin.methods) < set(recipe.methods)
    assert set(names(recipe)) == set(name.partition("-whiten-")[2].split("-"))


@pytest.mark.parametrize("name", [*PAPER, *PAPER.values()])
def test_methods_act_on_the_first_convolution_alone(name: str) -> None:
    lines = describe(load_train(name))["details"]
    assert {line["layers"] for line in lines} == {1}


def test_the_arms_of_the_figure() -> None:
    assert [names(arm) for arm in ARMS] == [[], ["nog"], ["olr"], ["nog", "olr"], ["soc"], ["soc", "nog", "olr"]]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: "+".join(names(arm)) or "plain")
def test_only_an_orthogonal_convolution_gives_full_rank(arm: TrainRecipe, tmp_path: Path) -> None:
    run = arm.run.model_copy(update={"dir": str(tmp_path / "run")})
    length = arm.train.model_copy(update={"epochs": None, "steps": 2})
    outcome = train(arm.model_copy(update={"run": run, "train": length}))
    assert outcome.step == 2
    (rank, *_) = lines_of(tmp_path / "run", "method/track_conditioning/bn1/rank")
    assert rank == 16 if "soc" in names(arm) else rank <= 9  # 16 channels, of patches of 9 pixels
