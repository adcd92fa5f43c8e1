"""Path length, activeness and variation predictability, each against what a made-up generator must give."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from torch import Tensor

from ortho_cli.analysis import activeness as activeness_module
from ortho_cli.analysis import path_length as path_length_module
from ortho_cli.analysis.activeness import activeness
from ortho_cli.analysis.path_length import (
    STEP,
    feature_distance,
    path_length,
    path_points,
    released_path_points,
    slerp,
    trimmed_mean,
)
from ortho_cli.analysis.vp_score import variation_predictability


def squared(first: Tensor, second: Tensor) -> Tensor:
    return (first.double() - second.double()).square().flatten(1).sum(1)


def test_path_length_of_the_identity_is_the_squared_speed_of_its_paths() -> None:
    """On a great circle of angle w, with a length that goes evenly from one to the other's: w^2 |z|^2 + (l1 - l0)^2."""
    count, columns = 200, 6
    generator = torch.Generator().manual_seed(3)
    ends = torch.randn(2, count, columns, generator=generator, dtype=torch.float64).numpy()
    places = torch.rand(count, 1, generator=generator, dtype=torch.float64).numpy()[:, 0]
    lengths = np.linalg.norm(ends, axis=-1)
    angles = np.arccos((ends[0] * ends[1]).sum(-1) / lengths.prod(0))
    here = lengths[0] + places * (lengths[1] - lengths[0])
    speeds = (angles * here) ** 2 + (lengths[1] - lengths[0]) ** 2
    low, high = np.percentile(speeds, 1, method="lower"), np.percentile(speeds, 99, method="higher")
    expected = speeds[(speeds >= low) & (speeds <= high)].mean()
    first, second = path_points(count, columns, seed=3)
    assert path_length(lambda code: code, squared, first, second) == pytest.approx(expected, rel=2e-3)
    assert torch.allclose(first.double().norm(dim=1), torch.from_numpy(here), atol=1e-5)
    assert path_length(lambda code: 2 * code, squared, first, second) == pytest.approx(4 * expected, rel=2e-3)


def test_released_points_lie_on_a_sphere_a_block_and_share_the_rest() -> None:
    first, second = released_path_points(50, [2, 3], 9, seed=0)
    for points in (first, second):
        assert torch.allclose(points[:, :2].norm(dim=1), torch.ones(50))
        assert torch.allclose(points[:, 2:5].norm(dim=1), torch.ones(50))
    assert torch.equal(first[:, 5:], second[:, 5:])
    assert float(first[:, 5:].std()) == pytest.approx(0.7, rel=0.15)
    assert float(first[:, :5].min()) >= 0  # between codes that are evenly drawn from [0, 1)
    assert not torch.equal(first[:, :5], second[:, :5])


def test_slerp_turns_evenly_and_ends_where_it_should() -> None:
    a, b = torch.randn(2, 4, 5, dtype=torch.float64)
    for place, end in ((0.0, a), (1.0, b)):
        assert torch.allclose(slerp(a, b, torch.full((4, 1), place)), end / end.norm(dim=1, keepdim=True))
    whole = torch.nn.functional.cosine_similarity(a, b).acos()
    part = torch.nn.functional.cosine_similarity(slerp(a, b, torch.full((4, 1), 0.3)), a).acos()
    assert torch.allclose(part, 0.3 * whole)


def test_features_are_compared_by_direction() -> None:
    distance = feature_distance(lambda pictures: pictures.flatten(1))
    one = torch.rand(3, 3, 2, 2)
    assert distance(one, 5 * one).max() < 1e-10
    turned = distance(one, one + STEP * torch.rand(3, 3, 2, 2))
    assert bool((turned > 0).all())
    assert trimmed_mean(torch.arange(101.0)) == 50


def test_activeness_is_a_coordinates_effect() -> None:
    strengths = torch.tensor([0.0, 0.5, 2.0])

    def make(codes: Tensor) -> Tensor:
        return (codes[:, :3] * strengths)[:, :, None, None] + codes[:, 3:, None, None]

    found = activeness(make, torch.randn(40, 4), 3)
    assert torch.allclose(found, (4 * strengths**2 / 3).double())  # the variance of -2, 0, 2, on one of three channels


@pytest.mark.parametrize(("told", "low", "high"), [(True, 0.9, 1.0), (False, 0.1, 0.45)])
def test_what_can_be_told_is_told_and_chance_is_chance(told: bool, low: float, high: float) -> None:
    """Each of four coordinates lights a quarter of the picture, or all of them the same place."""
    asked: list[Tensor] = []
    changed = torch.arange(400) % 4
    strength = torch.empty(400).uniform_(-2, 2, generator=torch.Generator().manual_seed(0))

    def differences(numbers: Tensor) -> Tensor:
        asked.append(numbers)
        pictures = torch.zeros(len(numbers), 1, 8, 8)
        for row, number in enumerate(numbers.tolist()):
            which = int(changed[number]) if told else 0
            pictures[row, 0, 4 * (which // 2) :][:4, 4 * (which % 2) :][:, :4] = strength[number]
        return pictures

    torch.manual_seed(9)
    state = torch.get_rng_state()
    found = variation_predictability(differences, changed, 4, epochs=30, seed=1)
    assert low <= found.score <= high
    assert (found.trained, found.tested) == (40, 360)
    assert torch.equal(torch.cat(asked).sort().values, torch.arange(400))  # no pair is both learnt from and judged by
    assert torch.equal(torch.get_rng_state(), state)
    assert np.mean(found.by_coordinate) == pytest.approx(found.score, abs=0.05)
    again = variation_predictability(differences, changed, 4, epochs=30, seed=1)
    assert again == found


def test_one_pair_is_not_enough() -> None:
    with pytest.raises(ValueError, match="two at least, found 1"):
        variation_predictability(lambda numbers: torch.zeros(1, 1, 8, 8), torch.tensor([0]), 2)


@pytest.mark.parametrize("module", [path_length_module, activeness_module])
def test_examples_run(module: object) -> None:
    found = doctest.testmod(module)  # type: ignore[arg-type]
    assert found.attempted > 0
    assert found.failed == 0
