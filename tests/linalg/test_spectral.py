"""Spectral factors on every route against float64 decompositions, from hopeless to perfect spectra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError, UsageError
from ortho_cli.linalg.ranks import energy_rank
from ortho_cli.linalg.spectral import relative_error, singular_values, spectral_factors
from ortho_cli.linalg.subspace_iteration import gram, leading_subspace, orthonormal

quick = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**20)
EXACT = ("svd", "gram")


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_spectrum(rows: int, values: Tensor, seed: int = 0) -> Tensor:
    """A matrix with these singular values and random directions, float32."""
    left = torch.linalg.qr(gaussian(rows, len(values), seed=seed)).Q
    right = torch.linalg.qr(gaussian(len(values), len(values), seed=seed + 1)).Q
    return (left * values @ right.mT).float()


def optimum(weight: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(weight.double())
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize("method", [*EXACT, "auto"])
def test_the_fixture_of_the_facts(method: str) -> None:
    weight = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    one = spectral_factors(weight, 1, method=method)
    assert one.u.flatten().tolist() == pytest.approx([1.7320508, 0, 0], abs=1e-6)
    assert one.vt.flatten().tolist() == pytest.approx([1.7320508, 0], abs=1e-6)
    two = spectral_factors(weight, 2, method=method)
    expected = torch.diag(torch.tensor([1.7320508, 1.4142135]))
    assert torch.allclose(two.u[:2], expected, atol=1e-6) and torch.allclose(two.vt, expected, atol=1e-6)
    assert float(one.error) == pytest.approx(2 / math.sqrt(13), rel=1e-6) and float(two.error) < 1e-7


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """One row, square, tall, wide, batched, zero, of deficient rank, badly scaled."""
    batch = draw(st.sampled_from([(), (3,), (2, 2)]))
    rows, cols = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    weight = gaussian(*batch, rows, cols, seed=draw(seeds))
    kind = draw(st.sampled_from(["full", "full", "deficient", "zero"]))
    if kind == "deficient":
        inner = draw(st.integers(1, 3))
        weight = weight[..., :1] @ weight[..., :1, :] if inner == 1 else weight * (torch.arange(cols) < inner)
    return weight * (0.0 if kind == "zero" else draw(st.sampled_from([1e-6, 1.0, 1e6])))


@quick
@given(matrices(), st.integers(1, 22), st.sampled_from(EXACT), st.sampled_from([torch.float32, torch.float64]))
def test_exact_routes_are_optimal_balanced_and_measured(
    weight: Tensor, rank: int, method: str, dtype: torch.dtype
) -> None:
    weight = weight.to(dtype)
    found = spectral_factors(weight, rank, method=method)
    assert found.method == method and found.u.dtype == found.vt.dtype == dtype
    most = min(rank, *weight.shape[-2:])
    assert found.u.shape == (*weight.shape[:-1], most) and found.vt.shape == (
        *weight.shape[:-2],
        most,
        weight.shape[-1],
    )
    wide = weight.double()
    values = torch.linalg.svdvals(wide)
    norm = values.norm(dim=-1).clamp_min(1e-300)
    best = values[..., most:].norm(dim=-1) / norm
    truth = (wide - found.u.double() @ found.vt.double()).flatten(-2).norm(dim=-1) / norm
    noise = 5e-6 if dtype == torch.float32 else 3e-8
    assert bool((truth <= best + noise).all())
    assert bool(((found.error - truth).abs() <= 2e-4 * truth + noise).all())
    largest = values[..., :1].clamp_min(1e-300)
    assert bool(((found.values.double() - values[..., :most]).abs() <= noise * largest * 10).all())
    balanced = torch.diag_embed(found.values.double())
    for gram_matrix in (found.u.mT @ found.u, found.vt @ found.vt.mT):
        # Components the precision cannot tell from zero have no direction of their own.
        assert bool(((gram_matrix.double() - balanced).abs() <= 2e-3 * largest[..., None]).all())


@pytest.mark.parametrize("method", EXACT)
def test_balance_is_exact_where_values_are_apart(method: str) -> None:
    weight = with_spectrum(60, torch.logspace(0, -3, 40))
    found = spectral_factors(weight, 12, method=method)
    for gram_matrix in (found.u.mT @ found.u, found.vt @ found.vt.mT):
        assert torch.allclose(gram_matrix, torch.diag(found.values), atol=2e-6)


def spectra(n: int) -> dict[str, Tensor]:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    noise = torch.linalg.svdvals(gaussian(n, n, seed=7))
    return {
        "gaussian": noise,
        "gaussian 8:1": torch.linalg.svdvals(gaussian(8 * n, n, seed=8)),
        "linear": 1 - (i - 1) / n,
        "exponential": torch.exp(-4 * i / n),
        "power 1/4": i**-0.25,
        "power 1/2": i**-0.5,
        "power 1": i**-1,
        "outliers": torch.cat([noise[:4] * 100, noise[4:]]),
        "noise over a slope": noise / 2 + 20 * i**-0.7,
        "flat": torch.ones(n, dtype=torch.float64),
        "a step": torch.where(i <= n // 4, 1.0, 0.5),
    }


@pytest.mark.parametrize("share", [0.05, 0.25, 0.4])
@pytest.mark.parametrize("name", list(spectra(8)))
@pytest.mark.parametrize("wide", [False, True])
def test_the_random_subspace_keeps_its_tolerance(name: str, share: float, wide: bool) -> None:
    n = 256
    weight = with_spectrum(320, spectra(n)[name])
    weight = weight.mT.contiguous() if wide else weight
    rank = int(share * n)
    found = spectral_factors(weight, rank)
    best = optimum(weight, rank)
    assert found.method == "randomized"
    assert float(found.error) ** 2 <= 1.01 * best**2
    truth = float((weight.double() - found.u.double() @ found.vt.double()).norm() / weight.double().norm())
    assert float(found.error) == pytest.approx(truth, rel=1e-4)
    for gram_matrix in (found.u.mT @ found.u, found.vt @ found.vt.mT):
        assert torch.allclose(gram_matrix, torch.diag(found.values), atol=1e-4 * float(found.values[0]))


def test_what_float32_products_cannot_see_is_found_exactly() -> None:
    steep = with_spectrum(300, torch.logspace(0, -9, 256, dtype=torch.float64))
    found = spectral_factors(steep, 100)
    assert found.method == "gram"
    assert float(found.error) <= 1.01 * optimum(steep, 100)
    exact = with_spectrum(300, torch.cat([torch.ones(20), torch.zeros(236)]).double())
    found = spectral_factors(exact, 64)
    assert found.method == "randomized" and float(found.error) < 1e-5


def test_a_diagonal_of_few_entries_is_found() -> None:
    """Coordinates, which a bad random block could miss."""
    weight = torch.zeros(256, 256)
    weight[torch.arange(0, 256, 8), torch.arange(0, 256, 8)] = torch.linspace(1, 2, 32)
    found = spectral_factors(weight, 32)
    assert float(found.error) < 1e-5


def test_the_route_follows_shape_rank_and_tolerance() -> None:
    big, small = gaussian(256, 256, dtype=torch.float32), gaussian(64, 64, dtype=torch.float32)
    assert spectral_factors(big, 64).method == "randomized"
    assert spectral_factors(big, 200).method == "gram"
    assert spectral_factors(big, 64, tolerance=0).method == "gram"
    assert spectral_factors(small, 8).method == "gram"
    assert spectral_factors(big, lambda values: energy_rank(values, 0.5)).method == "gram"


def test_a_rule_reads_the_spectrum() -> None:
    weight = with_spectrum(40, torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64))
    for method in EXACT:
        found = spectral_factors(weight, lambda values: energy_rank(values, 0.9), method=method)
        assert found.values.tolist() == pytest.approx([4.0, 2.0], rel=1e-5)
    with pytest.raises(ValueError, match="reads all singular values"):
        spectral_factors(weight, lambda values: 1, method="randomized")


def test_one_seed_gives_one_result_and_signs_are_fixed() -> None:
    weight = gaussian(256, 200, dtype=torch.float32)
    one, two = (spectral_factors(weight, 40, seed=3) for _ in range(2))
    assert torch.equal(one.u, two.u) and torch.equal(one.vt, two.vt)
    assert not torch.equal(one.u, spectral_factors(weight, 40, seed=4).u)
    for method in ("svd", "gram", "randomized"):
        vt = spectral_factors(weight, 40, method=method).vt
        assert bool((vt.gather(1, vt.abs().argmax(1, keepdim=True)) > 0).all())
    svd, by_gram = (spectral_factors(weight, 5, method=method) for method in EXACT)
    assert torch.allclose(svd.u, by_gram.u, atol=1e-4) and torch.allclose(svd.vt, by_gram.vt, atol=1e-4)
    assert all(part.is_contiguous() for part in (one.u, one.vt))


@pytest.mark.parametrize("method", ["svd", "gram", "randomized"])
def test_a_batch_is_its_members(method: str) -> None:
    weights = gaussian(3, 150, 140, dtype=torch.float32)
    together = spectral_factors(weights, 20, method=method)
    for index, weight in enumerate(weights):
        alone = spectral_factors(weight, 20, method=method)
        assert float(together.error[index]) == pytest.approx(float(alone.error), rel=1e-5)
        assert torch.allclose(together.u[index] @ together.vt[index], alone.u @ alone.vt, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    weight = gaussian(30, 20).to(dtype)
    found = spectral_factors(weight, 20)
    assert found.u.dtype == torch.float32 and float(found.error) < 1e-5
    assert singular_values(weight).dtype == torch.float64


def test_bad_input_is_refused() -> None:
    weight = torch.eye(3)
    with pytest.raises(NumericsError, match="not finite"):
        spectral_factors(torch.full((2, 2), torch.inf), 1)
    with pytest.raises(UsageError, match="method 'sdv'"):
        spectral_factors(weight, 1, method="sdv")
    with pytest.raises(TargetError, match="int64"):
        spectral_factors(torch.eye(2).long(), 1)
    with pytest.raises(ValueError, match="at least 1"):
        spectral_factors(weight, 0)


@quick
@given(matrices())
def test_singular_values_are_those_of_the_matrix(weight: Tensor) -> None:
    expected = torch.linalg.svdvals(weight)
    largest = expected[..., :1].clamp_min(1e-300)
    assert bool(((singular_values(weight) - expected).abs() <= 1e-7 * largest).all())


@quick
@given(matrices(), st.integers(1, 5), seeds)
def test_the_error_is_that_of_any_factors(weight: Tensor, rank: int, seed: int) -> None:
    u = gaussian(*weight.shape[:-1], rank, seed=seed)
    vt = gaussian(*weight.shape[:-2], rank, weight.shape[-1], seed=seed + 1)
    norm = weight.flatten(-2).norm(dim=-1)
    expected = (weight - u @ vt).flatten(-2).norm(dim=-1)
    expected = expected / torch.where(norm > 0, norm, 1.0)
    assert torch.allclose(relative_error(weight, u, vt), expected, rtol=1e-9)


def test_long_weights_are_measured_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from ortho_cli.linalg import spectral

    weight = gaussian(37, 11)
    found = spectral_factors(weight, 3)
    whole = relative_error(weight, found.u, found.vt)
    monkeypatch.setattr(spectral, "BLOCK_ENTRIES", 50)
    assert float(relative_error(weight, found.u, found.vt)) == pytest.approx(float(whole), rel=1e-12)


def test_the_gram_matrix_is_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from ortho_cli.linalg import subspace_iteration

    monkeypatch.setattr(subspace_iteration, "GRAM_ENTRIES", 40)
    for shape in ((30, 7), (2, 30, 9), (5, 1), (40, 16)):
        weight = gaussian(*shape, dtype=torch.float32)
        found = gram(weight, torch.float64)
        assert torch.allclose(found, weight.double().mT @ weight.double(), rtol=1e-12, atol=1e-12)
        assert torch.equal(found, found.mT)


def test_columns_unfit_for_cholesky_are_orthonormalised_all_the_same() -> None:
    dependent = gaussian(50, 3, dtype=torch.float32) @ gaussian(3, 8, dtype=torch.float32)
    graded = gaussian(50, 8, dtype=torch.float32) * torch.logspace(0, -8, 8)
    for block in (dependent, graded, torch.zeros(20, 4), gaussian(2, 50, 8, dtype=torch.float32)):
        basis = orthonormal(block)
        eye = torch.eye(block.shape[-1]).expand_as(basis.mT @ basis)
        assert torch.allclose(basis.mT @ basis, eye, atol=1e-4)


def test_a_subspace_may_be_everything() -> None:
    weight = gaussian(40, 12, dtype=torch.float32)
    basis, product = leading_subspace(weight, 12)
    assert torch.allclose(basis.mT @ basis, torch.eye(12), atol=1e-5)
    assert torch.allclose(product, weight @ basis, atol=1e-4)
