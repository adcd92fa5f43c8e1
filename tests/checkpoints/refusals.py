"""What every bad checkpoint must lead to, from Python and from the command line: one typed error, nothing written."""

from __future__ import annotations

import json
import re
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.cli.app import app
from ortho_cli.errors import CheckpointError

COMMAND = typer.main.get_command(app)  # built once; typer's own runner builds all verbs for every call


def ortho(*words: str) -> tuple[int, str, str]:
    """Run a command line in this process: exit code, stdout, stderr."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err, pytest.raises(SystemExit) as ended:
        COMMAND.main(list(words), prog_name="ortho")
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


def assert_refused(path: Path, pattern: str) -> None:
    """`open_checkpoint` raises one printable CheckpointError that says which file and why."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    error = caught.value
    assert type(error) is CheckpointError
    assert error.exit_code == 4
    assert re.search(pattern, error.message), error.message
    assert error.message.isprintable()
    assert len(error.message) < 600
    assert error.where is not None and path.parent.name in error.where


def assert_refused_by_verbs(path: Path, folder: Path, pattern: str) -> None:
    """Every verb that reads a checkpoint exits 4, as base and as adapter, and leaves `folder` as it was."""
    base, out = folder / "base.safetensors", folder / "out.safetensors"
    if not base.exists():
        save_file({"block.to_q.weight": torch.ones(4, 4)}, base)
    before = sorted(folder.rglob("*"))
    commands = (
        ["inspect", str(path)],
        ["inspect", str(base), "--diff", str(path)],
        ["merge", str(path), "-o", str(out)],
        ["merge", str(base), str(path), "-o", str(out)],
        ["add-hra", str(path), "--targets", "all-linear", "-o", str(out)],
        ["convert", str(path), "--to", "safetensors", "-o", str(out)],
        ["convert", str(path), "--to", "peft-hra", "-o", str(folder / "adapter")],
    )
    for command in commands:
        code, out, err = ortho(*command)
        assert code == 4, (command, out, err)
        assert out == "", command
        assert err.startswith("error: "), command
        assert err.count("error: ") == 1, command
        assert err.replace("\n", "").isprintable(), command
        assert re.search(pattern, err), (command, err)
    code, out, err = ortho("inspect", str(path), "--json")
    told = json.loads(out)
    assert (code, err, told["ok"]) == (4, "", False)
    assert told["error"].items() >= {"type": "CheckpointError", "exit_code": 4}.items()
    assert sorted(folder.rglob("*")) == before
