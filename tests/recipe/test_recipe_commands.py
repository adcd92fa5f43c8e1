"""`ortho recipe`: stdout is data, errors are raised for the command line to print, help stays light."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ortho_cli.cli.recipe import app
from ortho_cli.errors import OrthoError, OutputError, RecipeError, UsageError
from ortho_cli.recipe.catalog import load_any
from ortho_cli.recipe.parse import parse_yaml
from ortho_cli.recipe.shipped import shipped
from ortho_cli.recipe.verbs import VERBS
from ortho_cli.recipe.write import plain_data
from ortho_cli.registry import names


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def output(*arguments: str) -> str:
    result = call(*arguments)
    assert result.exception is None, result.exception
    return result.stdout


def failure(*arguments: str) -> tuple[OrthoError, str]:
    result = call(*arguments)
    assert isinstance(result.exception, OrthoError), result.output
    return result.exception, result.stdout


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_list() -> None:
    lines = output("list").splitlines()
    assert len(lines) == 2 * len(shipped())
    at = 2 * list(shipped()).index("sd15-add-hra")
    assert lines[at].split(maxsplit=1) == ["sd15-add-hra", "Put Householder adapters (HRA) into Stable Diffusion 1.5."]
    assert lines[at + 1].strip() == "ortho add-hra --recipe sd15-add-hra"
    assert lines[2 * list(shipped()).index("quickstart") + 1].strip() == "ortho train quickstart"


def test_list_json() -> None:
    answer = json.loads(output("list", "--json"))
    assert (answer["schema"], answer["ok"], answer["command"]) == (1, True, "recipe list")
    assert [row["name"] for row in answer["recipes"]] == list(shipped())
    assert all(set(row) == {"name", "purpose", "command", "path"} and all(row.values()) for row in answer["recipes"])


@pytest.mark.parametrize("name", shipped())
def test_show_fills_in_every_default_and_is_a_recipe(name: str, here: Path) -> None:
    text = output("show", name)
    recipe = load_any(name)
    assert parse_yaml(text, "shown")[0] == plain_data(recipe.model_dump(by_alias=True))
    (here / "shown.yaml").write_text(text, encoding="utf-8")
    assert load_any("shown.yaml") == recipe


def test_show_prints_brackets_as_they_are(here: Path) -> None:
    body = "version: 1\nverb: add-hra\ncheckpoint: '[/unet/attn1]'\ntargets: ['[bold]x[/bold]']\n"
    (here / "r.yaml").write_text(body, encoding="utf-8")
    text = output("show", "r.yaml")
    assert "checkpoint: '[/unet/attn1]'\n" in text
    assert "  - '[bold]x[/bold]'\n" in text


def test_check_good(here: Path) -> None:
    assert output("check", *shipped()) == "".join(f"ok: {name}\n" for name in shipped())


def test_check_reports_all_errors_of_all_files(here: Path) -> None:
    (here / "a.yaml").write_text("version: 1\nverb: merge\nbas: x\nexact: 1\n", encoding="utf-8")
    (here / "b.yaml").write_text("- x\n", encoding="utf-8")
    error, stdout = failure("check", "a.yaml", "sd15-merge", "none.yaml", "b.yaml")
    assert stdout == "ok: sd15-merge\n"
    assert isinstance(error, RecipeError)
    assert error.exit_code == 3
    assert error.where == "a.yaml:3"
    assert error.message.splitlines() == [
        "a.yaml:3: bas: no such key; did you mean 'base'?",
        "a.yaml:4: exact: expected true or false, found 1",
        "no file and no shipped recipe is called 'none.yaml'",
        "b.yaml:1: a recipe is a mapping `key: value`, this file holds no mapping",
    ]
    assert error.hint == "all keys: ortho recipe schema --verb merge\nlist them with: ortho recipe list"


def test_check_covers_training_recipes(here: Path) -> None:
    (here / "a.yaml").write_text("version: 1\ntask: {name: clasify}\n", encoding="utf-8")
    error, stdout = failure("check", "quickstart", "a.yaml")
    assert stdout == "ok: quickstart\n"
    found = re.search("a.yaml:2: task.name: 'clasify' is none of (.+); did you mean 'classify'[?]", error.message)
    assert found is not None
    assert found[1].split(", ") == sorted(names("tasks"))
    assert error.hint == "all keys: ortho recipe schema --verb train"


def test_check_data_says_what_is_needed_and_looks_for_it(here: Path) -> None:
    lines = output("check", "--data", "quickstart", "sd15-merge").splitlines()
    assert lines[0].startswith("digits: ")
    assert lines[-3].startswith("found: 1438 samples to train on, 359 to judge by; 10 classes")
    assert lines[-2:] == ["ok: quickstart", "ok: sd15-merge"]
    assert output("check", "--data", "digits-vit-pretrain").splitlines()[-2].endswith("10 classes, 5 of them kept")


def test_check_data_that_is_missing(here: Path) -> None:
    text = shipped()["cifar10-resnet110-gor"].read_text(encoding="utf-8")
    (here / "r.yaml").write_text(text.replace("name: cifar10,", "name: cifar10, path: nowhere,"), encoding="utf-8")
    error, stdout = failure("check", "--data", "r.yaml", "quickstart")
    assert "FOLDER/cifar-10-batches-py" in stdout  # the expected tree, although it is not there
    assert "ok: r.yaml" not in stdout
    assert stdout.endswith("ok: quickstart\n")
    assert "nowhere" in error.message
    assert error.exit_code == 3


def test_schema() -> None:
    assert json.loads(output("schema", "--verb", "merge"))["properties"]["verb"] == {
        "const": "merge",
        "title": "Verb",
        "type": "string",
    }
    assert "methods" in json.loads(output("schema", "--verb", "train"))["properties"]
    assert set(json.loads(output("schema"))["then"]["discriminator"]["mapping"]) == set(VERBS)
    error, stdout = failure("schema", "--verb", "mrge")
    assert isinstance(error, UsageError)
    assert stdout == ""


def test_copy(here: Path) -> None:
    original = shipped()["sd15-merge"].read_bytes()
    assert output("copy", "sd15-merge") == "sd15-merge.yaml\n"
    assert (here / "sd15-merge.yaml").read_bytes() == original
    (here / "folder").mkdir()
    assert output("copy", "sd15-merge", "-o", "folder") == f"{Path('folder', 'sd15-merge.yaml')}\n"
    assert output("copy", "sd15-merge", "-o", "mine.yaml") == "mine.yaml\n"
    assert (here / "folder" / "sd15-merge.yaml").read_bytes() == (here / "mine.yaml").read_bytes() == original


def test_copy_never_overwrites_unasked(here: Path) -> None:
    (here / "sd15-merge.yaml").write_text("mine", encoding="utf-8")
    for arguments in (["sd15-add-hra", "-o", "sd15-merge.yaml"], ["recipes/sd15-merge.yaml"]):
        error, _ = failure("copy", *arguments)
        assert isinstance(error, OutputError)
        assert "exists already" in error.message
        assert (here / "sd15-merge.yaml").read_text(encoding="utf-8") == "mine"
    output("copy", "sd15-add-hra", "-o", "sd15-merge.yaml", "--force")
    assert (here / "sd15-merge.yaml").read_bytes() == shipped()["sd15-add-hra"].read_bytes()


def test_copy_onto_itself_is_refused(here: Path) -> None:
    output("copy", "sd15-merge", "-o", "mine.yaml")
    (here / "link.yaml").symlink_to("mine.yaml")
    for target in ("mine.yaml", "link.yaml"):
        error, _ = failure("copy", "mine.yaml", "-o", target, "--force")
        assert isinstance(error, OutputError)
        assert "is the recipe itself" in error.message
    assert (here / "link.yaml").is_symlink()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, typer\n"
        "from ortho_cli.cli.recipe import app\n"
        "group = typer.main.get_command(app)\n"
        "for command in (group, *group.commands.values()):\n"
        "    command.main(['--help'], prog_name='ortho', standalone_mode=False)\n"
        "heavy = {'pydantic', 'pydantic_core', 'yaml', 'torch', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Usage: ") == 6
