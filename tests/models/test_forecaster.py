"""The forecaster: what it may not depend on, its decomposition, and that methods find its layers."""

from __future__ import annotations

import pytest
import torch

from ortho_cli.errors import RecipeError
from ortho_cli.methods.oialr_select import basis_candidates
from ortho_cli.models.forecaster import Forecaster, build, moving_average
from ortho_cli.recipe.models import Forecaster as Section


def small(input: int = 12, horizon: int = 10, **changes: object) -> Forecaster:
    torch.manual_seed(0)
    settings = {"patch": 4, "depth": 2, "heads": 2, "dim": 8, "window": 5, **changes}
    return Forecaster(input, horizon, **settings)  # type: ignore[arg-type]


def test_the_size_of_the_ettm2_recipe() -> None:
    with torch.device("meta"):
        model = build(Section.model_validate({"name": "forecaster"}), 96, 192)
    blocks = 2 * (2 * 2 * 512 + 512 * 3 * 512 + 3 * 512 + 512 * 512 + 512 + 2 * 512 * 2048 + 2048 + 512)
    ends = 8 * 512 + 512 + 512 * 8 + 8 + 2 * 512
    tokens = (96 // 8 + 192 // 8 + 1) * 512
    assert sum(parameter.numel() for parameter in model.parameters()) == blocks + ends + tokens + 96 * 192 + 192


@pytest.mark.parametrize(("input", "horizon"), [(12, 10), (12, 12), (4, 1), (8, 9)])
def test_shapes(input: int, horizon: int) -> None:
    assert small(input, horizon)(torch.randn(3, input, 5)).shape == (3, horizon, 5)


def test_each_channel_is_forecast_from_its_own_past() -> None:
    model, series = small(), torch.randn(2, 12, 3)
    whole = model(series)
    for place in range(3):
        torch.testing.assert_close(model(series[..., place : place + 1]), whole[..., place : place + 1])


def test_a_level_is_carried_through() -> None:
    model, series = small(), torch.randn(2, 12, 3)
    level = torch.tensor([1.0, -2.0, 30.0])
    torch.testing.assert_close(model(series + level), model(series) + level, atol=1e-5, rtol=1e-5)


def test_every_step_that_is_seen_counts_and_every_parameter_takes_part() -> None:
    model, series = small(), torch.randn(2, 12, 3, requires_grad=True)
    model(series).square().sum().backward()
    assert series.grad is not None and bool((series.grad != 0).all())
    silent = [key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert silent == []


def test_the_meta_form_has_the_same_parameters() -> None:
    with torch.device("meta"):
        model = small()
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in small().state_dict().items()
    }


@pytest.mark.parametrize("window", [2, 3, 8, 25])
def test_a_moving_average_is_numpys_with_the_ends_repeated(window: int) -> None:
    series = torch.randn(2, 3, 20, dtype=torch.float64)
    before, behind = (window - 1) // 2, window // 2
    padded = torch.cat(
        [series[..., :1].expand(-1, -1, before), series, series[..., -1:].expand(-1, -1, behind)], dim=-1
    )
    expected = torch.stack([padded[..., step : step + window].mean(-1) for step in range(20)], dim=-1)
    torch.testing.assert_close(moving_average(series, window), expected)
    torch.testing.assert_close(moving_average(torch.full((1, 1, 20), 7.0), window), torch.full((1, 1, 20), 7.0))


def test_the_layers_of_its_blocks_have_bases_to_freeze() -> None:
    model = small(dim=16)
    blocks = [f"blocks.{n}.{name}" for n in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert [layer.name for layer in basis_candidates(model)] == ["trend", "patch_embed", *blocks]


def test_a_patch_that_does_not_divide_the_input() -> None:
    with pytest.raises(RecipeError, match=r"model\.patch 8 does not divide the 12 steps of task\.input") as caught:
        build(Section.model_validate({"name": "forecaster"}), 12, 4)
    assert caught.value.hint == "take one of 1, 2, 3, 4, 6, 12"
