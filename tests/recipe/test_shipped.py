"""The recipes that come with the package: found by name, valid, and saying what the facts say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import ortho_cli
from ortho_cli.errors import RecipeError
from ortho_cli.recipe.catalog import command_of, load_any
from ortho_cli.recipe.load import load_yaml
from ortho_cli.recipe.shipped import find, purpose, shipped
from ortho_cli.recipe.verbs import load_verb

RECIPES = Path(ortho_cli.__file__).parents[1] / "recipes"
COUNT = 76  # a new recipe is counted here, so that none can get lost on the way into the tests


def test_all_are_found() -> None:
    files = sorted(RECIPES.rglob("*.y*ml"))
    assert len(files) == COUNT
    assert list(shipped().values()) == files
    assert list(shipped()) == [file.relative_to(RECIPES).with_suffix("").as_posix() for file in files]


@pytest.mark.parametrize("name", shipped())
def test_each_is_valid_and_opens_with_its_command(name: str) -> None:
    path = shipped()[name]
    recipe = load_any(str(path))
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# {purpose(path)}     {command_of(recipe, name)}"
    assert purpose(path).endswith(".")
    assert load_yaml(path)[0]["version"] == 1


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("form", ["{}", "{}.yaml", "recipes/{}", "recipes/{}.yaml"])
def test_names_resolve_anywhere(name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find(form.format(name)) == shipped()[name]


def test_a_file_wins_over_a_name_but_a_folder_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sd15-add-hra").mkdir()
    assert find("sd15-add-hra") == shipped()["sd15-add-hra"]
    Path("sd15-merge").write_text("a: 1\n", encoding="utf-8")
    assert find("sd15-merge") == Path("sd15-merge")


@pytest.mark.parametrize("name", ["sd15-mrege", "none.yaml", "", "\0", "x" * 5000, "../recipes", "/etc"])
def test_what_is_not_there(name: str) -> None:
    with pytest.raises(RecipeError, match="no file and no shipped recipe") as caught:
        find(name)
    assert caught.value.hint is not None
    assert "ortho recipe list" in caught.value.hint
    assert ("sd15-merge" in caught.value.hint) == (name == "sd15-mrege")


def test_names_resolve_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "ortho_cli"
    shutil.copytree(RECIPES, package / "_recipes")
    (package / "_recipes" / "papers").mkdir()
    shutil.copy(RECIPES / "sd15-merge.yaml", package / "_recipes" / "papers" / "merge.yaml")
    monkeypatch.setattr(ortho_cli, "__file__", str(package / "__init__.py"))
    assert "papers/merge" in shipped()
    assert len(shipped()) == COUNT + 1
    assert find("sd15-merge") == package / "_recipes" / "sd15-merge.yaml"
    assert find("papers/merge.yaml") == package / "_recipes" / "papers" / "merge.yaml"
    assert load_verb("papers/merge", "merge") == load_verb("sd15-merge", "merge")


def test_sd15_add_hra_says_what_the_paper_says() -> None:
    path = find("sd15-add-hra")
    recipe = load_any(str(path)).model_dump()
    assert (recipe["rank"], recipe["targets"]) == (8, ["sd15-control"])
    text = path.read_text(encoding="utf-8")
    listed = (Path(__file__).parents[1] / "data" / "sd15_hra_targets.txt").read_text(encoding="utf-8").splitlines()
    widths = [int(line.split("\t")[1].strip("()").split(",")[0]) for line in listed]
    assert f"Expect: {len(widths)} layers" in text
    assert f"{8 * sum(widths):,} parameters at rank 8" in text
    assert f"2 gives {2 * sum(widths):,}" in text
