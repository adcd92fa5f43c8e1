"""The benchmark of OIALR's step: both forms do the work they say, and the command prints them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from ortho_cli.cli.app import app
from ortho_cli.errors import UsageError
from ortho_cli.training.oialr_benchmark import DENSE, OURS, measure_oialr

SMALL = ["--dims", "64", "--depth", "1", "--tokens", "5", "--batch", "2", "--rounds", "2", "--rank-share", "0.25"]


def test_what_trains_and_what_is_held() -> None:
    dense, ours = measure_oialr((64,), rank_share=0.25, depth=1, tokens=300, batch=2, rounds=2)
    assert (dense.name, ours.name, ours.rank) == (DENSE, OURS, 16)
    assert dense.trained - ours.trained == 12 * 64**2 - 4 * 16**2
    # A gradient and two moments of float32, and each parameter's step counter.
    counters = 4 * 12
    assert dense.held_bytes == 12 * dense.trained + counters and ours.held_bytes == 12 * ours.trained + counters
    assert ours.activation_bytes < dense.activation_bytes
    assert dense.ratio == 1.0 and len(ours.seconds) == 2
    with pytest.raises(UsageError, match="not here"):
        list(measure_oialr((64,), device="cuda:99"))


def test_the_command() -> None:
    done = CliRunner().invoke(app, ["bench", "oialr", *SMALL, "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert [each["name"] for each in said["details"]] == [DENSE, OURS] and said["rank_share"] == 0.25
    table = CliRunner().invoke(app, ["bench", "oialr", *SMALL])
    assert table.exit_code == 0 and "x dense" in table.output
    wrong = CliRunner().invoke(app, ["bench", "oialr", "--dims", "100"])
    assert isinstance(wrong.exception, UsageError) or wrong.exit_code == 2
