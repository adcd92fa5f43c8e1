"""Matrix roots: golden numbers, the exact gradient where eigenvalues are equal, and all ways against float64."""

from __future__ import annotations

from math import log10

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError, UsageError
from ortho_cli.linalg.rootm import METHODS, inverse_sqrtm, sqrtm

EXACT = ("eigh", "newton-schulz")


def golden() -> Tensor:
    """The matrix that the published numbers are of."""
    i, j = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(9, dtype=torch.float64)
    wave = torch.sin(0.1 + 0.7 * i + 1.3 * j + 0.37 * i * j)
    return wave @ wave.T / 9 + 0.01 * torch.eye(4, dtype=torch.float64)


def spd(n: int, condition: float, *, batch: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    """Random directions, eigenvalues even in decades, the largest 3."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(*batch, n, n, generator=generator, dtype=torch.float64)).Q
    values = 3 * torch.logspace(0, -log10(condition), n, dtype=torch.float64)
    return (q * values) @ q.mT


def of_eigenvalues(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * values[..., None, :] ** power) @ vectors.mT


def gap(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


def test_golden_numbers_of_the_pade_approximant() -> None:
    matrix = golden().requires_grad_()
    root = sqrtm(matrix, method="mpa")
    row = torch.tensor([0.68174641127, -0.15092182033, 0.00784287074, -0.07389167922], dtype=torch.float64)
    assert torch.allclose(root[0], row, rtol=0, atol=1e-10)
    assert root.trace().item() == pytest.approx(2.807796155908, abs=1e-10)
    assert sqrtm(matrix).trace().item() == pytest.approx(2.807776827489, abs=1e-10)
    assert inverse_sqrtm(matrix, method="mpa").trace().item() == pytest.approx(6.012836072197, abs=1e-10)
    root.backward(torch.ones(4, 4, dtype=torch.float64))
    wanted = torch.tensor([1.06904415091, 1.08890493731, 1.01711011512, 0.98055101728], dtype=torch.float64)
    assert matrix.grad is not None and torch.allclose(matrix.grad[0], wanted, rtol=0, atol=1e-10)
    assert torch.allclose(sqrtm(golden().float(), method="mpa")[0].double(), row, atol=1e-6)


def test_the_pade_approximant_never_falls_below_its_floor() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1e-12], dtype=torch.float64))
    root = sqrtm(matrix, method="mpa")
    assert float(root[1, 1]) == pytest.approx(1 / 11, rel=1e-5)
    assert float(inverse_sqrtm(matrix, method="mpa")[1, 1]) == pytest.approx(11, rel=1e-5)
    s = torch.tensor(0.3, dtype=torch.float64)  # the closed form of what it makes of an eigenvalue
    wanted = s * ((1 + s) ** 11 + (1 - s) ** 11) / ((1 + s) ** 11 - (1 - s) ** 11)
    matrix = torch.diag(torch.tensor([(1 - 0.3**4) ** 0.5, 0.3**2], dtype=torch.float64))  # Frobenius norm 1
    assert float(sqrtm(matrix, method="mpa")[1, 1]) == pytest.approx(float(wanted), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 9), batch=st.sampled_from([(), (3,), (2, 2)]), decades=st.floats(0, 4), seed=st.integers(0, 9))
@pytest.mark.parametrize("method", EXACT)
def test_roots_are_roots(method: str, n: int, batch: tuple[int, ...], decades: float, seed: int) -> None:
    matrix = spd(n, 10**decades, batch=batch, seed=seed)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-3)):
        given_ = matrix.to(dtype)
        root, inverse = sqrtm(given_, method=method), inverse_sqrtm(given_, method=method)
        assert root.dtype == inverse.dtype == dtype and root.shape == matrix.shape
        assert gap(root, of_eigenvalues(matrix, 0.5)) < tolerance
        assert gap(inverse, of_eigenvalues(matrix, -0.5)) < 10 * tolerance
        assert gap(root, root.mT.double()) < tolerance


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_matrices(method: str) -> None:
    matrices = spd(5, 30, batch=(3,)).requires_grad_()
    alone = matrices.detach().clone().requires_grad_()
    weight = torch.randn(3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for root in (sqrtm, inverse_sqrtm):
        together = root(matrices, method=method)
        each = torch.stack([root(matrix, method=method) for matrix in alone])
        assert gap(together, each.detach()) < 1e-12
        (together * weight).sum().backward()
        (each * weight).sum().backward()
    assert matrices.grad is not None and alone.grad is not None and gap(matrices.grad, alone.grad) < 1e-12


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("root", [sqrtm, inverse_sqrtm])
def test_gradients_are_those_of_finite_differences(method: str, root: object) -> None:
    factor = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def rooted(factor: Tensor) -> Tensor:
        return root(factor @ factor.mT, ridge=0.1, method=method)  # type: ignore[no-any-return, operator]

    assert torch.autograd.gradcheck(rooted, (factor,))


@pytest.mark.parametrize("root", [sqrtm, inverse_sqrtm])
def test_equal_eigenvalues_have_an_exact_gradient(root: object) -> None:
    """Where differentiating eigh gives nan: d sqrt(M) = dM / 2 sqrt(l), d M^-1/2 = -dM / 2 l^1.5, at M = l I."""
    matrix = (4 * torch.eye(5, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (root(matrix) * weight).sum().backward()  # type: ignore[operator]
    assert matrix.grad is not None
    assert torch.allclose(matrix.grad, weight / 4 if root is sqrtm else -weight / 16, atol=1e-14)
    naive = (4 * torch.eye(5, dtype=torch.float64)).requires_grad_()
    values, vectors = torch.linalg.eigh(naive)
    (((vectors * values.sqrt()) @ vectors.mT) * weight).sum().backward()
    assert naive.grad is not None and not bool(naive.grad.isfinite().all())


def test_the_lyapunov_gradient_converges_to_the_exact_one() -> None:
    """The published gradient is that of the approximate root: near for a mild condition, and not beyond."""
    weight = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def gradient(method: str, condition: float) -> Tensor:
        matrix = spd(8, condition).requires_grad_()
        (sqrtm(matrix, method=method) * (weight + weight.mT)).sum().backward()
        assert matrix.grad is not None
        return matrix.grad

    assert gap(gradient("mpa", 2), gradient("eigh", 2)) < 1e-5
    assert gap(gradient("mpa", 1e4), gradient("eigh", 1e4)) > 0.1
    assert gap(gradient("newton-schulz", 1e4), gradient("eigh", 1e4)) < 1e-9


def test_a_ridge_bounds_eigenvalues_that_rounding_made_negative() -> None:
    """In float32 the null directions of a covariance come out at -1e-7 of its largest eigenvalue."""
    rank_one = torch.full((6, 6), 1e4) - 1e-3 * torch.eye(6)
    assert bool((torch.linalg.eigvalsh(rank_one) < 0).any())
    found = inverse_sqrtm(rank_one, ridge=1e-5)
    assert float(torch.linalg.eigvalsh(found)[-1]) == pytest.approx(1e-5**-0.5, rel=1e-4)
    with pytest.raises(NumericsError, match="singular matrix has no inverse root"):
        inverse_sqrtm(rank_one)
    zero = torch.zeros(3, 3, requires_grad=True)
    sqrtm(zero).sum().backward()
    assert zero.grad is not None and bool(zero.grad.isfinite().all())


def test_what_is_refused() -> None:
    with pytest.raises(TargetError, match=r"square matrices, found shape \(2, 3\)"):
        sqrtm(torch.ones(2, 3))
    with pytest.raises(UsageError, match="method"):
        sqrtm(torch.eye(2), method="cholesky")
    assert sqrtm(torch.eye(2, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_has_no_finite_root(method: str) -> None:
    bad = torch.full((8, 8), float("nan"))
    try:
        assert not bool(sqrtm(bad, method=method).isfinite().any())
    except NumericsError as error:
        assert "is it finite?" in error.message and method == "eigh"
