"""Polar factors on every route against float64 decompositions, and the measures of how a basis moved."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ortho_cli as ortho
from ortho_cli.errors import NumericsError, TargetError, UsageError
from ortho_cli.linalg.polar import METHODS, Polar, polar_factor, right_spectrum
from ortho_cli.linalg.subspace import (
    Basis,
    basis,
    factor_stability,
    flatten,
    mixing_similarity,
    noise_floor,
    principal_angles,
    r_distance,
    stability,
    subspace_overlap,
    truncated_stability,
)

quick = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**20)
ROUTES = METHODS[1:]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wave(shape: tuple[int, ...], phase: float) -> Tensor:
    place = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7 * place + phase + 0.01 * place**2).view(shape)


def with_condition(rows: int, cols: int, condition: float, seed: int = 0) -> Tensor:
    left = torch.linalg.qr(gaussian(rows, cols, seed=seed)).Q
    right = torch.linalg.qr(gaussian(cols, cols, seed=seed + 1)).Q
    return left * torch.logspace(0, -math.log10(condition), cols, dtype=torch.float64) @ right.mT


def naive_factor(weight: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(flatten(weight).double(), full_matrices=False)
    return left @ right


def naive_stability(previous: Tensor, current: Tensor) -> float:
    """The paper's form: cosines of the columns, the whole similarity matrix formed."""
    first, second = (naive_factor(weight) for weight in (previous, current))
    if first.shape[0] < first.shape[1]:
        first, second = first.mT, second.mT
    similarity = first.mT @ second / (first.norm(dim=0).max() * second.norm(dim=0).max())
    return float(similarity.diagonal().mean())


# shape, stability, ||R1 - R2|| with LAPACK's signs, the same with a positive diagonal, its similarity
FIXTURES = [
    ((6, 4), 0.87571679, 1.909499, 1.309754, 0.813137),
    ((4, 6), 0.97674130, 4.166887, 1.395530, 0.802516),
    ((5, 5), 0.96353697, 0.984255, 0.984255, 0.859875),
    ((8, 3, 3, 3), 0.94587345, 2.481995, 2.481995, 0.882808),
    ((16, 2, 3, 3), 0.93170467, 4.769795, 3.740078, 0.845156),
]


@pytest.mark.parametrize(("shape", "expected", "raw", "distance", "similarity"), FIXTURES, ids=str)
def test_the_fixtures_of_the_facts(
    shape: tuple[int, ...], expected: float, raw: float, distance: float, similarity: float
) -> None:
    previous = wave(shape, 0.0)
    current = previous + 0.3 * wave(shape, 1.0).flip(0)
    assert ortho.stability(previous, current) == pytest.approx(expected, abs=1e-6)
    assert naive_stability(previous, current) == pytest.approx(expected, abs=1e-6)
    found = r_distance(basis(previous), basis(current))
    assert found.distance == pytest.approx(distance, abs=1e-6)
    assert found.similarity == pytest.approx(similarity, abs=1e-6)
    first, second = (flatten(weight) for weight in (previous, current))
    if first.shape[0] < first.shape[1]:
        first, second = first.mT, second.mT
    signs_of_lapack = torch.linalg.qr(first).R - torch.linalg.qr(second).R
    assert float(signs_of_lapack.norm()) == pytest.approx(raw, abs=1e-6)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (32, 32), (7, 1), (1, 7), (1, 1)], ids=str)
def test_each_route_finds_the_nearest_isometry(route: str, shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    found = polar_factor(weight, method=route)
    assert found.method == route and found.factor.shape == shape and found.rank == min(shape)
    assert float((found.factor - naive_factor(weight)).abs().max()) < 1e-9
    values = torch.linalg.svdvals(weight)
    assert found.sigma_max == pytest.approx(float(values[0]), rel=0.05)
    assert found.sigma_min == pytest.approx(float(values[-1]), rel=0.05)
    assert found.error < 1e-12


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e3, 1e4, 1e5])
def test_float32_weights_up_to_a_condition_of_1e5(condition: float) -> None:
    first = with_condition(96, 40, condition).float()
    second = (first + 0.05 * with_condition(96, 40, condition, seed=5)).float()
    exact = naive_stability(first, second)
    assert stability(first, second) == pytest.approx(exact, abs=1e-6)
    assert basis(first).is_resolved
    if condition <= 1e3:  # where "auto" lets the iteration stand
        iterated = [polar_factor(weight, method="polar-express").factor for weight in (first, second)]
        assert factor_stability(*iterated) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("condition", [3.0, 15.0, 25.0, 1e3, 2e3])
def test_large_weights_take_the_precision_they_need(condition: float) -> None:
    """Float32 where the condition is mild, float64 beyond; one answer."""
    first = with_condition(300, 140, condition).float()
    second = (first + 0.01 * with_condition(300, 140, condition, seed=5)).float()
    assert right_spectrum(first).values.dtype == (torch.float32 if condition < 20 else torch.float64)
    assert stability(first, second) == pytest.approx(naive_stability(first, second), abs=1e-6)
    assert stability(first, first) == pytest.approx(1.0, abs=1e-7)
    values = torch.linalg.svdvals(first.double())
    assert torch.allclose(basis(first).values, values, rtol=1e-4)
    assert stability(1e-25 * first, 1e15 * second) == pytest.approx(stability(first, second), abs=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_what_a_weight_does_not_resolve_is_left_out(route: str) -> None:
    weight = (gaussian(24, 3) @ gaussian(3, 10, seed=1)).float()
    found = polar_factor(weight, method=route)
    if route == "polar-express":  # rounding grows with the iteration: it is not the route for such weights, and says so
        assert found.sigma_min < 1e-5 * found.sigma_max
        return
    assert found.rank == 3 and found.error < 1e-6
    left, _, right = torch.linalg.svd(weight.double())
    assert float((found.factor - left[:, :3] @ right[:3]).abs().max()) < 1e-5


def test_a_dead_channel_is_not_called_unstable() -> None:
    """The 6 x 4 matrix of rank 2 of the facts: a change of 1e-9 makes the full factors disagree."""
    weight = gaussian(6, 2) @ gaussian(2, 4, seed=1)
    moved = weight + 1e-9 * gaussian(6, 4, seed=2)
    assert naive_stability(weight, moved) < 0.9
    assert stability(weight, moved) == pytest.approx(1.0, abs=1e-7)
    assert not basis(weight).is_resolved and basis(weight).rank == 2
    dead = gaussian(8, 6).float()
    dead[:, 2] = 0
    assert stability(dead, 2 * dead) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["even", "uneven"])
@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_the_rounding_of_a_half_type_is_no_direction(dtype: torch.dtype, spread: float, scale: float) -> None:
    low = scale * gaussian(192, 12) @ gaussian(12, 64, seed=1) * torch.logspace(-spread, spread, 64)
    first, second = low.to(dtype), (low + 0.01 * low @ gaussian(64, 64, seed=2) / 8).to(dtype)
    for method in ("svd", "gram"):
        assert polar_factor(first, method=method).rank == 12
    assert basis(first).rank == basis(first.float(), stored=dtype).rank == 12 < basis(first.float()).rank
    assert stability(first, second) > 0.999


@pytest.mark.parametrize("scale", [1e-300, 1e-38, 1e-21, 1e21, 1e300])
def test_scale_alone_changes_nothing(scale: float) -> None:
    """Float32 squares of 1e-21 are subnormal: the factor of a well-conditioned weight was none."""
    weight = gaussian(300, 140) if not 1e-40 < scale < 1e40 else gaussian(300, 140).float()
    found, expected = basis(scale * weight), basis(weight)
    assert stability(scale * weight, weight) == pytest.approx(1.0, abs=1e-7)
    assert torch.allclose(found.values, scale * expected.values, rtol=1e-5)
    assert torch.allclose(found.triangle / scale, expected.triangle, atol=1e-4)
    assert polar_factor(scale * weight, method="svd").sigma_max == pytest.approx(scale * float(expected.values[0]))


def test_a_rank_cut_leaves_the_basis_where_it_is() -> None:
    weight = with_condition(30, 12, 10.0)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    cut = left[:, :5] * values[:5] @ right[:5]
    assert stability(weight, cut) == pytest.approx(1.0, abs=1e-9)
    assert truncated_stability(basis(weight), basis(cut), 12) == pytest.approx(1.0, abs=1e-9)


def test_a_weight_of_zeros_has_no_directions() -> None:
    zero, some = torch.zeros(4, 3), torch.eye(4)[:, :3]
    assert polar_factor(zero).rank == 0
    assert stability(zero, some) == 0.0 and stability(zero, zero) == 0.0
    first, second = basis(zero), basis(some)
    assert truncated_stability(first, second, 2) == 0.0 and subspace_overlap(first, second, 2) == 0.0
    assert mixing_similarity(first, second) == 0.0 and r_distance(first, first).similarity == 1.0


@quick
@given(seeds, st.integers(1, 12), st.integers(1, 12), st.floats(1e-3, 1e3))
def test_laws_of_stability(seed: int, rows: int, cols: int, scale: float) -> None:
    first, second = gaussian(rows, cols, seed=seed), gaussian(rows, cols, seed=seed + 1)
    value = stability(first, second)
    assert -1 - 1e-12 <= value <= 1 + 1e-12
    assert stability(second, first) == pytest.approx(value, abs=1e-9)
    assert stability(first.mT, second.mT) == pytest.approx(value, abs=1e-9)
    assert stability(scale * first, second) == pytest.approx(value, abs=1e-9)
    assert stability(first, first) == pytest.approx(1.0, abs=1e-9)
    turn = torch.linalg.qr(gaussian(rows, rows, seed=seed + 2)).Q
    assert stability(turn @ first, turn @ second) == pytest.approx(value, abs=1e-7)


@quick
@given(seeds, st.integers(1, 10), st.integers(0, 6))
def test_a_decomposition_is_the_weight(seed: int, cols: int, more: int) -> None:
    weight = gaussian(cols + more, cols, seed=seed)
    found = basis(weight)
    stretch = found.vectors * found.values @ found.vectors.mT
    assert torch.allclose(found.factor @ stretch, weight, atol=1e-8)
    assert bool((found.triangle.diagonal() >= 0).all())
    assert torch.allclose(found.triangle.mT @ found.triangle, weight.mT @ weight, atol=1e-8)
    other = basis(gaussian(cols + more, cols, seed=seed + 1))
    both = [each.vectors * each.values @ each.vectors.mT for each in (found, other)]
    cosine = float((both[0] * both[1]).sum() / (both[0].norm() * both[1].norm()))
    assert mixing_similarity(found, other) == pytest.approx(cosine, abs=1e-9)


@quick
@given(seeds, st.integers(1, 8))
def test_leading_directions_against_the_naive_form(seed: int, rank: int) -> None:
    weights = [gaussian(14, 8, seed=seed), gaussian(14, 8, seed=seed) + 0.3 * gaussian(14, 8, seed=seed + 1)]
    first, second = (basis(weight) for weight in weights)
    lefts, rights, parts = [], [], []
    for weight in weights:
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        lefts.append(left[:, :rank])
        rights.append(right[:rank].mT)
        parts.append(left[:, :rank] @ right[:rank])
    expected = float((parts[0] * parts[1]).sum()) / rank
    assert truncated_stability(first, second, rank) == pytest.approx(expected, abs=1e-7)
    cosines = torch.linalg.svdvals(lefts[0].mT @ lefts[1])
    assert subspace_overlap(first, second, rank) == pytest.approx(float(cosines.square().mean()), abs=1e-7)
    for angles, sides in zip(principal_angles(first, second, rank), (lefts, rights), strict=True):
        cosines = torch.linalg.svdvals(sides[0].mT @ sides[1])
        assert torch.allclose(angles.cos(), cosines, atol=1e-7)
    small = principal_angles(basis(torch.eye(3)), basis(torch.diag(torch.tensor([3.0, 2.0, 1.0]))), 3)
    assert max(float(angle) for side in small for angle in side) < 1e-7


def test_half_types_and_single_vectors() -> None:
    weight = gaussian(40, 16)
    for dtype, bound in ((torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
        half = weight.to(dtype)
        assert polar_factor(half).factor.dtype == torch.float32
        assert stability(half, half.float()) == pytest.approx(1.0, abs=1e-6)
        assert stability(half, weight) == pytest.approx(1.0, abs=bound)
    row = gaussian(1, 9)
    other = gaussian(1, 9, seed=1)
    cosine = torch.nn.functional.cosine_similarity(row, other).item()
    assert stability(row, other) == pytest.approx(cosine, abs=1e-12)


def test_independent_weights_are_at_the_noise_floor() -> None:
    values = torch.tensor([stability(gaussian(30, 20, seed=i), gaussian(30, 20, seed=1000 + i)) for i in range(60)])
    assert float(values.std()) == pytest.approx(noise_floor(30, 20), rel=0.3)
    assert abs(float(values.mean())) < 4 * noise_floor(30, 20) / math.sqrt(60)


def test_raw_r_is_mostly_signs() -> None:
    """A small change flips rows of LAPACK's R; with a positive diagonal it moves as little as the weight."""
    weight = gaussian(96, 32)
    moved = weight + 0.05 * gaussian(96, 32, seed=1)
    fixed = r_distance(basis(weight), basis(moved)).distance
    assert fixed < 0.1 * float(weight.norm())


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.full((2, 2), math.nan), NumericsError, "not finite"),
        (torch.zeros(3), TargetError, "two dimensions"),
        (torch.zeros(2, 0), TargetError, "some entries"),
        (torch.zeros(2, 2, dtype=torch.int32), TargetError, "int32"),
    ],
    ids=["nan", "vector", "empty", "integer"],
)
def test_refusals(weight: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        stability(weight, weight)
    with pytest.raises(error, match=message):
        polar_factor(weight)


def test_refusals_of_pairs_and_routes() -> None:
    with pytest.raises(TargetError, match=r"\(4, 3\) and \(4, 2\)"):
        stability(torch.ones(4, 3), torch.ones(4, 2))
    with pytest.raises(UsageError, match="'svg' is none of"):
        polar_factor(torch.eye(2), method="svg")


def test_types_are_what_callers_import() -> None:
    assert isinstance(polar_factor(torch.eye(2)), Polar) and isinstance(basis(torch.eye(2)), Basis)
