"""`ortho bench gor` compares forms that give the same numbers; how fast they are is its output, never a test."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from ortho_cli.cli.app import app
from ortho_cli.errors import NumericsError, UsageError
from ortho_cli.methods import gor_benchmark
from ortho_cli.methods.gor_benchmark import NAIVE, measure_gor, naive_penalty, resnet110_convolutions

runner = CliRunner()


def test_the_layers_are_those_of_resnet110() -> None:
    from ortho_cli.models.resnet_cifar import CifarResNet

    real = CifarResNet(110, 10, shortcut="B")
    expected = sorted(tuple(m.weight.shape) for m in real.modules() if isinstance(m, nn.Conv2d))
    assert sorted(tuple(p.shape) for p in resnet110_convolutions().parameters()) == expected


@pytest.mark.parametrize("mode", ["inter", "intra"])
def test_all_forms_are_equal_and_timed(mode: str) -> None:
    threads = torch.get_num_threads()
    results = measure_gor(rounds=2, mode=mode, threads=1)
    assert torch.get_num_threads() == threads
    assert results[0].name == NAIVE and len(results) == 3
    for result in results:
        assert len(result.seconds) == 2 and result.median > 0
        assert result.speedup == pytest.approx(results[0].median / result.median)


def test_a_form_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, groups: int, mode: str) -> Tensor:
        return 1.001 * naive_penalty(model, groups, mode)

    monkeypatch.setattr(gor_benchmark, "gor_penalty", wrong)
    with pytest.raises(NumericsError, match="gives"):
        measure_gor(rounds=1, threads=1)


def test_the_command_prints_a_table_or_json() -> None:
    done = runner.invoke(app, ["bench", "gor", "--rounds", "1", "--threads", "1", "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["ok"] is True and report["command"] == "bench gor"
    assert report["details"][0]["speedup"] == 1.0 and len(report["details"]) == 3
    done = runner.invoke(app, ["bench", "gor", "--rounds", "1", "--threads", "1", "--groups", "1"])
    assert done.exit_code == 0 and "x faster" in done.stdout and NAIVE in done.stdout


def test_a_mode_or_device_that_is_not_there_is_a_usage_error() -> None:
    assert runner.invoke(app, ["bench", "gor", "--mode", "outer"]).exit_code == 2
    for device in ("nowhere", "meta"):
        with pytest.raises(UsageError, match="is not here"):
            measure_gor(rounds=1, device=device)
