"""A saved state leaves to the base only what cannot have changed, and goes on from no other base."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch import nn

from ortho_cli.errors import CheckpointError
from ortho_cli.methods.add import insert_hra
from ortho_cli.training import base_weights
from ortho_cli.training.base_weights import BaseWeights
from ortho_cli.training.session import shrink_frozen
from ortho_cli.training.snapshot import capture, load_model


def loaded(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))


def adapted(seed: int = 0, precision: str = "fp32") -> tuple[nn.Module, BaseWeights]:
    model = loaded(seed)
    base = BaseWeights(model, "org/name")
    insert_hra(model, 2, ["0", "2"], seed=3)
    shrink_frozen(model, precision)
    return model, base


def saved(model: nn.Module, base: BaseWeights) -> Any:
    return capture(model, {}, [], base=base)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_what_trains_is_saved_and_comes_back(precision: str) -> None:
    model, base = adapted(precision=precision)
    with torch.no_grad():
        model.get_parameter("0.hra_u").add_(1.0)
    snapshot = saved(model, base)
    assert set(snapshot.model) == {"0.hra_u", "2.hra_u"}
    assert snapshot.state["base"]["tensors"] == 4
    again, own = adapted(precision=precision)
    load_model(again, snapshot.model, own, snapshot.state["base"])
    x = torch.randn(3, 6).to(again.get_parameter("0.fixed_linear.weight").dtype)
    assert torch.equal(again(x), model(x))
    resaved = saved(again, own)
    assert (set(resaved.model), resaved.state["base"]) == (set(snapshot.model), snapshot.state["base"])


def test_what_was_written_to_is_saved() -> None:
    model, base = adapted()
    with torch.no_grad():
        model.get_parameter("2.fixed_linear.bias").zero_()
    model[0].fixed_linear.weight = nn.Parameter(model[0].fixed_linear.weight.detach().clone(), requires_grad=False)
    assert base.untouched(model) == {"0.fixed_linear.bias", "2.fixed_linear.weight"}
    snapshot = saved(model, base)
    again, own = adapted()
    load_model(again, snapshot.model, own, snapshot.state["base"])
    assert not again.get_parameter("2.fixed_linear.bias").any()
    assert set(saved(again, own).model) >= {"2.fixed_linear.bias", "0.hra_u"}


def test_another_base_is_refused() -> None:
    model, base = adapted()
    snapshot = saved(model, base)
    other, own = adapted(seed=1)
    with pytest.raises(CheckpointError, match="is not what the run started from") as caught:
        load_model(other, snapshot.model, own, snapshot.state["base"])
    assert caught.value.exit_code == 4
    with pytest.raises(CheckpointError, match="4 tensors missing"):
        load_model(other, snapshot.model)


def test_a_write_that_left_no_trace_is_found_when_the_run_goes_on() -> None:
    model, base = adapted()
    model.get_parameter("0.fixed_linear.weight").data.mul_(2)  # no version is counted
    snapshot = saved(model, base)
    again, own = adapted()
    with pytest.raises(CheckpointError, match="its weights differ"):
        load_model(again, snapshot.model, own, snapshot.state["base"])


def test_the_example_runs() -> None:
    assert doctest.testmod(base_weights).failed == 0
