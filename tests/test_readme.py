"""README's examples run as they stand, in order, after `ortho demo`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ortho_cli.cli.app import app

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    assert runner.invoke(app, ["demo"]).exit_code == 0
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("ortho ")]
    assert len(commands) >= 14
    for command in commands:
        result = runner.invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}"
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), {})  # README's own code, in a scratch folder


def test_every_verb_has_an_example() -> None:
    text = "\n".join(blocks("bash"))
    for command in app.registered_commands:
        if command.name != "doctor":
            assert f"ortho {command.name} " in text, command.name
