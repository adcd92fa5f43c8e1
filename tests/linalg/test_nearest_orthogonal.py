"""Nearest orthogonal gradients and the optimal rate: golden numbers, laws over types and layouts, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError, UsageError
from ortho_cli.linalg.nog import as_matrix, nearest_orthogonal
from ortho_cli.linalg.olr import accepted_rate, olr
from ortho_cli.linalg.orthogonal_loss import FORMS, soft_orthogonality
from ortho_cli.linalg.polar import METHODS

quick = settings(deadline=None, max_examples=40)
SHAPES = [(8, 3, 3, 3), (16, 4, 1, 1), (3, 16, 2, 2), (6, 200), (200, 6), (1, 9), (5, 5, 4)]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def waves(rows: int, cols: int, a: float = 0.1, b: float = 0.7, c: float = 1.3, e: float = 0.37) -> Tensor:
    """The matrix that published golden numbers are of."""
    i, j = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(cols, dtype=torch.float64)
    return torch.sin(a + b * i + c * j + e * i * j)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def laid_out(tensor: Tensor, channels_last: bool) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last and tensor.dim() == 4 else tensor


WEIGHT, GRADIENT = waves(4, 6), waves(4, 6, 0.4, 0.9, 0.5, 0.23)


@pytest.mark.parametrize("route", METHODS)
def test_golden_numbers(route: str) -> None:
    values = torch.linalg.svdvals(GRADIENT).tolist()
    assert values == pytest.approx([2.390184499617954, 2.0805430798843383, 1.2564966327339375, 0.7508009552171515])
    nearest = nearest_orthogonal(GRADIENT, method=route)
    first = [0.33298670716770934, 0.45963137893185557, 0.4675347645796837, 0.43941921076647084]
    assert nearest[0].tolist() == pytest.approx([*first, 0.40879725492794655, 0.3147469679488183], abs=1e-10)
    assert nearest.sum().item() == pytest.approx(2.784212525091537, abs=1e-10)
    assert nearest.square().sum().item() == pytest.approx(4, abs=1e-10)
    assert olr(WEIGHT, GRADIENT).item() == pytest.approx(0.015471113605484171, abs=1e-12)
    assert olr(WEIGHT, nearest).item() == pytest.approx(0.0068121757876866895, abs=1e-10)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("route", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_laws(shape: tuple[int, ...], route: str, dtype: torch.dtype, channels_last: bool) -> None:
    close = {"rtol": 0.0, "atol": 20 * TOLERANCE[dtype]}  # of "polar-express" the polish stops at eight roundings
    gradient = laid_out(gaussian(*shape, dtype=dtype), channels_last)
    nearest = nearest_orthogonal(gradient, method=route)
    left, _, right = torch.linalg.svd(as_matrix(gradient).double(), full_matrices=False)
    assert nearest.shape == gradient.shape and nearest.dtype == dtype
    assert torch.allclose(as_matrix(nearest).double(), left @ right, **close)  # the nearest there is
    assert torch.allclose(nearest_orthogonal(nearest, method=route), nearest, **close)  # idempotent
    for scale in (1e-9, 1e-21, 1e21):  # squares of the last two are beyond float32
        assert torch.allclose(nearest_orthogonal(scale * gradient, method=route), nearest, **close)
    turn = torch.linalg.qr(gaussian(shape[0], shape[0], seed=3)).Q.to(dtype)
    turned = torch.tensordot(turn, gradient, 1)
    assert torch.allclose(nearest_orthogonal(turned, method=route), torch.tensordot(turn, nearest, 1), **close)


def test_what_a_gradient_does_not_resolve_is_left_out() -> None:
    thin = gaussian(6, 2) @ gaussian(2, 9, seed=1)
    nearest = nearest_orthogonal(thin)
    assert torch.linalg.svdvals(nearest).tolist() == pytest.approx([1, 1, 0, 0, 0, 0], abs=1e-12)
    assert torch.equal(nearest_orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    gradient = gaussian(4, 30, dtype=dtype)
    nearest = nearest_orthogonal(gradient)
    assert nearest.dtype == torch.float32 and torch.equal(nearest, nearest_orthogonal(gradient.float()))


def test_bad_gradients_are_refused() -> None:
    for poison in (math.nan, math.inf):
        gradient = gaussian(4, 6)
        gradient[2, 3] = poison
        for route in METHODS:
            with pytest.raises(NumericsError, match="not finite"):
                nearest_orthogonal(gradient, method=route)
    with pytest.raises(TargetError, match=r"shape \(3,\) is no matrix"):
        nearest_orthogonal(torch.ones(3))
    with pytest.raises(UsageError, match="'gramm' is none of") as caught:
        nearest_orthogonal(torch.ones(3, 3), method="gramm")
    assert caught.value.hint == "did you mean 'gram'?"
    with pytest.raises(TargetError, match="expected a float type"):
        nearest_orthogonal(torch.ones(3, 3, dtype=torch.int64))


@quick
@given(st.integers(0, 2**20), st.sampled_from([(3, 5), (2, 3, 3, 3), (7,)]), st.floats(1e-3, 1e3))
def test_the_optimal_rate(seed: int, shape: tuple[int, ...], scale: float) -> None:
    weight, gradient = gaussian(*shape, seed=seed), gaussian(*shape, seed=seed + 1)
    rate = olr(weight, gradient).item()
    assert olr(weight, weight).item() == pytest.approx(1 / 3, rel=1e-12)
    assert olr(scale * weight, gradient).item() == pytest.approx(scale * rate, rel=1e-9)
    assert olr(weight, scale * gradient).item() == pytest.approx(rate / scale, rel=1e-9)
    assert abs(rate) <= (weight.norm() / gradient.norm()).item() / (2 * math.sqrt(2)) + 1e-12


def test_the_rate_is_the_first_order_minimum_of_the_papers_objective() -> None:
    weight, gradient = 100 * gaussian(6, 9), gaussian(6, 9, seed=1)  # w w well above 1
    w, g = weight.flatten(), gradient.flatten()
    rate = torch.zeros((), dtype=torch.float64, requires_grad=True)
    step = w - rate * g
    objective = (torch.outer(step, step) - torch.eye(54, dtype=torch.float64)).square().sum()
    (slope,) = torch.autograd.grad(objective, rate, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, rate)
    assert olr(weight, gradient).item() == pytest.approx(-(slope / curvature).item(), rel=1e-3)


def test_the_rate_over_types_and_layouts() -> None:
    weight, gradient = gaussian(4, 3, 5, 5), gaussian(4, 3, 5, 5, seed=1)
    rate = olr(weight, gradient).item()
    assert olr(weight, laid_out(gradient, True)).item() == pytest.approx(rate, rel=1e-12)
    assert olr(laid_out(weight.float(), True), gradient.float()).item() == pytest.approx(rate, rel=1e-4)
    assert olr(weight.bfloat16(), gradient.bfloat16()).item() == pytest.approx(rate, rel=0.3)
    assert olr(weight, 0 * gradient).isnan() and olr(0 * weight, gradient).isnan()
    with pytest.raises(TargetError, match=r"\(4, 3, 5, 5\) has no gradient of shape \(4, 3\)"):
        olr(weight, gradient[:, :, 0, 0])


def test_which_rates_are_taken() -> None:
    assert accepted_rate(0.1, 0.1) == (0.1, False)  # strictly below
    assert accepted_rate(0.0, 0.1) == (0.1, False) and accepted_rate(math.nan, 0.1) == (0.1, False)
    assert accepted_rate(0.05, 0.1, floor=0.2) == (0.05, True)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (4, 2, 3, 3)])
def test_soft_orthogonality(shape: tuple[int, ...]) -> None:
    weight = gaussian(*shape).requires_grad_()
    matrix = as_matrix(weight.detach())
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    gap = wide @ wide.mT - torch.eye(len(wide), dtype=torch.float64)
    expected = {"norm": gap.norm(), "squared": gap.norm() ** 2, "mean": gap.norm() ** 2 / gap.numel()}
    assert set(expected) == set(FORMS)
    for form, value in expected.items():
        assert soft_orthogonality(weight, form).item() == pytest.approx(value.item())
        assert torch.autograd.gradcheck(lambda w, form=form: soft_orthogonality(w, form), weight)
    full = matrix @ matrix.mT - torch.eye(len(matrix), dtype=torch.float64)  # what the paper writes, tall or not
    (gradient,) = torch.autograd.grad(soft_orthogonality(weight, "squared"), weight)
    assert torch.allclose(as_matrix(gradient), 4 * full @ matrix)
    exact = nearest_orthogonal(weight.detach()).requires_grad_()
    (gradient,) = torch.autograd.grad(soft_orthogonality(exact, "norm"), exact)
    assert gradient.isfinite().all()
    with pytest.raises(UsageError, match="'nrom' is none of"):
        soft_orthogonality(weight, "nrom")
