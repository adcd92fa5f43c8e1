"""README's examples run as they stand, in order, after `ortho demo`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ortho_cli.cli.app import app

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


def commands() -> list[list[str]]:
    return [
        shlex.split(line)[1:] for block in blocks("bash") for line in block.splitlines() if line.startswith("ortho ")
    ]


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    assert runner.invoke(app, ["demo"]).exit_code == 0
    for words in commands():
        result = runner.invoke(app, words)
        assert result.exit_code == 0, f"{words}\n{result.output}"
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), {})  # README's own code, in a scratch folder


def test_the_examples_are_commands_with_the_options_they_have() -> None:
    """What the long walk would trip over first, in no time."""
    assert len(commands()) >= 30
    for words in commands():
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands"):
            assert words[0] in command.commands, words
            command, words = command.commands[words[0]], words[1:]
        command.make_context("ortho", list(words))
    for block in blocks("python"):
        compile(block, str(README), "exec")


def test_a_container_gets_what_the_package_asks_for() -> None:
    """README's list is that of pyproject.toml, but for what the container brings."""
    text = (README.parent / "pyproject.toml").read_text("utf-8")
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert listed is not None
    asked = re.findall(r'^    "([^"]+)"', listed[1], re.MULTILINE)
    inside = next(block for block in blocks("bash") if "--no-deps" in block).replace("\\\n", " ").splitlines()
    assert inside[0] == "pip install --no-deps -e ." and len(inside) == 2
    assert shlex.split(inside[1]) == ["pip", "install", *(x for x in asked if not re.match("(torch|numpy)>", x))]
    assert len(asked) == len(shlex.split(inside[1]))  # two of ours are the container's


def test_every_verb_has_an_example() -> None:
    text = "\n".join(blocks("bash"))
    for command in app.registered_commands:
        if command.name != "doctor":
            assert f"ortho {command.name} " in text, command.name
