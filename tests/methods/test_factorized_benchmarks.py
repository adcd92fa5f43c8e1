"""`ortho bench frobenius` and `factorize` compare forms of one result; their speed is their output, never a test."""

from __future__ import annotations

import doctest
import json
from collections.abc import Sequence

import pytest
from typer.testing import CliRunner

from ortho_cli.cli.app import app
from ortho_cli.errors import NumericsError, UsageError
from ortho_cli.methods import factorize_benchmark, frobenius_benchmark
from ortho_cli.methods.factored_module import FactoredModule
from ortho_cli.methods.factorize_benchmark import SVD, measure_factorize
from ortho_cli.methods.frobenius_benchmark import AUTOGRAD, OURS, STEP, by_autograd, measure_frobenius

runner = CliRunner()


def test_the_step_and_both_forms_of_decay_are_timed() -> None:
    results = measure_frobenius(rounds=2, batch=2, width=0.125, threads=1)
    assert [result.name for result in results] == [STEP, OURS, AUTOGRAD]
    assert [len(result.seconds) for result in results] == [2, 2, 2]
    step, ours, autograd = results
    assert (step.share, autograd.speedup) == (1.0, 1.0)
    assert ours.share == pytest.approx(ours.median / step.median)
    assert ours.speedup == pytest.approx(autograd.median / ours.median)


def test_a_form_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(layers: Sequence[FactoredModule]) -> None:
        by_autograd(layers[:-1])
        by_autograd([*layers[-1:], *layers[-1:]])

    monkeypatch.setattr(frobenius_benchmark, "by_autograd", wrong)
    with pytest.raises(NumericsError, match="differ from autograd's"):
        measure_frobenius(rounds=1, batch=2, width=0.125, threads=1)
    with pytest.raises(UsageError, match="is not here"):
        measure_frobenius(rounds=1, device="nowhere")


def test_factorising_is_held_against_the_least_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factorize_benchmark, "BLOCKS", ((64, 1),))
    svd, scale, rank = measure_factorize(rounds=2, rank=8, every=1)
    assert (svd.name, svd.speedup, svd.excess) == (SVD, 1.0, 0.0)
    for result in (scale, rank):
        assert result.speedup == pytest.approx(svd.median / result.median)
        assert -1e-6 < result.excess < 0.01
    done = runner.invoke(app, ["bench", "factorize", "--rounds", "1", "--every", "1", "--rank", "4", "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["command"] == "bench factorize" and len(report["details"]) == 3
    done = runner.invoke(app, ["bench", "factorize", "--rounds", "1", "--every", "1", "--rank", "4"])
    assert done.exit_code == 0 and "x faster" in done.stdout


def test_the_command_prints_a_table_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frobenius_benchmark, "PIXELS", 8)
    words = ["bench", "frobenius", "--rounds", "1", "--batch", "1", "--threads", "1"]
    report = json.loads(runner.invoke(app, [*words, "--json"]).stdout)
    assert report["ok"] is True and report["details"][0]["name"] == STEP
    assert OURS.split(",")[0] in runner.invoke(app, words).stdout


def test_examples_in_the_documentation_run() -> None:
    assert doctest.testmod(factorize_benchmark).failed == 0
