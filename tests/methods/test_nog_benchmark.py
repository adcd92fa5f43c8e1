"""`ortho bench nog` measures what a step uses, with its error; how fast that is, is its output, never a test."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from ortho_cli.cli.app import app
from ortho_cli.methods.polar_benchmark import NOG, PLAIN, measure_polar

runner = CliRunner()


def test_both_forms_are_timed_and_exact() -> None:
    found = list(measure_polar([(8, 60), (40, 12)], forms=NOG, condition=10.0, rounds=2))
    assert [(each.shape, each.name) for each in found] == [
        (shape, name) for shape in ((8, 60), (40, 12)) for name in (PLAIN, "nearest_orthogonal")
    ]
    assert all(len(each.seconds) == 2 and each.error < 1e-5 for each in found)
    assert found[1].speedup == pytest.approx(found[0].median / found[1].median)


def test_the_command_prints_a_table_or_json() -> None:
    options = ["--shapes", "4x9,9x4", "--rounds", "1", "--condition", "3"]
    done = runner.invoke(app, ["bench", "nog", *options, "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["ok"] is True and report["command"] == "bench nog"
    assert [line["shape"] for line in report["details"]] == [[4, 9]] * 2 + [[9, 4]] * 2
    done = runner.invoke(app, ["bench", "nog", *options])
    assert done.exit_code == 0 and "nearest_orthogonal" in done.stdout and PLAIN in done.stdout
    assert runner.invoke(app, ["bench", "nog", "--shapes", "4by9"]).exit_code == 2
