"""`ortho bench whiten` compares layers that do the same; how fast they are is its output, never a test."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from ortho_cli.cli.app import app
from ortho_cli.errors import UsageError
from ortho_cli.methods.whiten_benchmark import PUBLISHED, PublishedWhitening, measure_whiten
from ortho_cli.methods.whitening import Whitening

SMALL = ("--widths", "4", "--groups", "2", "--batch", "2", "--side", "4", "--rounds", "1", "--threads", "1")


def test_the_published_layer_is_ours_with_its_solver() -> None:
    """Forward, gradient and running statistics: two ways to write one layer."""
    inputs = torch.randn(8, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(inputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    published = PublishedWhitening(6, 2, 1e-2).double()
    ours = Whitening(6, 2, ridge=1e-2, solver="mpa", averages_whitening=True).double()
    found = []
    for layer in (published, ours):
        values = inputs.clone().requires_grad_()
        outputs = layer(values)
        outputs.backward(gradient)
        assert values.grad is not None
        found.append((outputs.detach(), values.grad, layer.weight.grad.flatten()))  # type: ignore[union-attr, operator]
    for theirs, mine in zip(*found, strict=True):
        assert torch.allclose(theirs, mine, atol=1e-10)
    assert ours.running_whitening is not None
    assert torch.allclose(published.running_subspace, ours.running_whitening)
    assert torch.allclose(published.running_mean.flatten(), ours.running_mean)


def test_every_form_is_timed_and_judged() -> None:
    threads = torch.get_num_threads()
    found = list(measure_whiten([16], [1, 2], batch=4, side=4, condition=1e4, ridge=1e-6, rounds=2, threads=1))
    assert torch.get_num_threads() == threads and len(found) == 8
    for each in found:
        base = next(x for x in found if x.name == PUBLISHED and x.groups == each.groups)
        assert len(each.seconds) == 2 and each.ratio == pytest.approx(each.median / base.median)
    errors = {each.name: each.error for each in found}
    assert errors["whitening: eigh"] is not None and errors["whitening: eigh"] < 1e-2
    published = errors[PUBLISHED]
    assert published is not None and published > 0.1 and errors["batch norm, for scale"] is None


def test_the_command_prints_a_table_or_json() -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["bench", "whiten", *SMALL, "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["command"] == "bench whiten" and report["details"][0]["ratio"] == 1.0
    done = runner.invoke(app, ["bench", "whiten", *SMALL])
    assert done.exit_code == 0 and "x published" in done.stdout and PUBLISHED in done.stdout
    assert runner.invoke(app, ["bench", "whiten", "--widths", "a"]).exit_code == 2
    with pytest.raises(UsageError, match="is not here"):
        list(measure_whiten([4], [1], device="nowhere"))
