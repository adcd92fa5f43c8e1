"""The shipped recipes for files: carried out as dry runs on a Stable Diffusion 1.5 of true size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from true_scale import TARGETS, sparse
from typer.testing import CliRunner

from ortho_cli.cli.app import app


def ran(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_sd15_recipes_plan_what_their_headers_promise(tmp_path: Path) -> None:
    base = sparse(tmp_path / "v1-5.safetensors")
    adapter = tmp_path / "adapter"
    words = ("add-hra", base, "--recipe", "sd15-add-hra", "-o", adapter)
    planned = ran(*words, "--dry-run")
    assert (planned["layers"], planned["parameters"]) == (144, 895_488)
    assert not adapter.exists()
    ran(*words)  # reads the few values that the fingerprint needs
    merge = ran("merge", base, adapter, "--recipe", "sd15-merge", "-o", tmp_path / "merged.safetensors", "--dry-run")
    assert merge["layers"] == len(TARGETS) == 144
    assert not (tmp_path / "merged.safetensors").exists()
