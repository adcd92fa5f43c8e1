"""Compact WY reflections against the dense product of one reflection after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import chain, relative
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg import normalize, orthonormalize, reflect_activations, reflect_weight, wy_factor

quick = settings(deadline=None, max_examples=40)
widths = st.integers(1, 24)
heights = st.integers(1, 24)
seeds = st.integers(0, 2**20)
working = st.sampled_from([(torch.float32, 1e-5), (torch.float64, 1e-12)])
starts = st.sampled_from(["random", "pairs", "equal", "opposite", "tiny", "nearly-equal"])


def draw_vectors(width: int, rank: int, start: str, seed: int) -> Tensor:
    """Columns of the kinds that training and initialisation produce, the degenerate ones among them."""
    torch.manual_seed(seed)
    u = torch.randn(width, rank, dtype=torch.float64)
    if start == "pairs":
        u[:, 1::2] = u[:, 0 : rank - rank % 2 : 2]
    elif start == "equal":
        u = u[:, :1].expand(width, rank).clone()
    elif start == "opposite":
        u = u[:, :1] * torch.tensor([1.0, -2.0] * rank)[:rank]
    elif start == "tiny":
        u *= 1e-30
    elif start == "nearly-equal":
        u = u[:, :1] + 1e-4 * u
    return u


@st.composite
def vectors_and_rank(draw: st.DrawFn) -> Tensor:
    width = draw(widths)
    rank = draw(st.integers(1, width))
    return draw_vectors(width, rank, draw(starts), draw(seeds))


@quick
@given(vectors_and_rank(), heights, seeds, working, st.booleans())
def test_weights_from_both_sides(
    u: Tensor, rows: int, seed: int, working: tuple[torch.dtype, float], transpose: bool
) -> None:
    dtype, tolerance = working
    torch.manual_seed(seed)
    u, weight = u.to(dtype), torch.randn(rows, u.shape[0], dtype=dtype)
    dense = chain(u).T if transpose else chain(u)
    right = reflect_weight(weight, u, transpose=transpose)
    assert right.dtype == dtype
    assert relative(right, weight.double() @ dense) < tolerance
    left = reflect_weight(weight.T, u, side="output", transpose=transpose)
    assert relative(left, dense.T @ weight.T.double()) < tolerance


@quick
@given(vectors_and_rank(), seeds, working)
def test_activations_give_the_output_of_the_reflected_weight(
    u: Tensor, seed: int, working: tuple[torch.dtype, float]
) -> None:
    dtype, tolerance = working
    torch.manual_seed(seed)
    u = u.to(dtype)
    x, weight = torch.randn(2, 3, u.shape[0], dtype=dtype), torch.randn(4, u.shape[0], dtype=dtype)
    turned = reflect_activations(x, u)
    assert turned.dtype == dtype
    assert relative(turned, x.double() @ chain(u).T) < tolerance
    assert relative(turned @ weight.T, x @ reflect_weight(weight, u).T) < 10 * tolerance
    assert relative(reflect_activations(turned, u, transpose=True), x) < tolerance


@quick
@given(vectors_and_rank())
def test_the_product_is_orthogonal_of_determinant_minus_one_to_the_rank(u: Tensor) -> None:
    product = reflect_weight(torch.eye(u.shape[0], dtype=torch.float64), u)
    assert relative(product.T @ product, torch.eye(u.shape[0])) < 1e-12
    assert float(torch.linalg.det(product)) == pytest.approx((-1) ** u.shape[1], abs=1e-9)


@quick
@given(vectors_and_rank(), seeds, st.booleans())
def test_transpose_undoes_and_lengths_do_not_matter(u: Tensor, seed: int, output: bool) -> None:
    torch.manual_seed(seed)
    side = "output" if output else "input"
    shape = (u.shape[0], 5) if output else (5, u.shape[0])
    weight = torch.randn(shape, dtype=torch.float64)
    there = reflect_weight(weight, u, side=side)
    assert relative(reflect_weight(there, u, side=side, transpose=True), weight) < 1e-12
    stretched = u * (torch.rand(u.shape[1]) * 9 + 0.1)
    assert relative(reflect_weight(weight, stretched, side=side), there) < 1e-12


@quick
@given(st.integers(2, 40), st.integers(1, 6), seeds)
def test_equal_neighbouring_columns_cancel(width: int, pairs: int, seed: int) -> None:
    torch.manual_seed(seed)
    half = torch.randn(width, min(pairs, width // 2))
    weight = torch.randn(3, width)
    assert relative(reflect_weight(weight, half.repeat_interleave(2, dim=1)), weight) < 1e-6


@quick
@given(vectors_and_rank(), st.sampled_from([1e-4, 0.1, 3.0]), seeds)
def test_the_closed_form_holds_for_columns_of_any_length(u: Tensor, eps: float, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(4, u.shape[0], dtype=torch.float64)
    soft = chain(u, eps)
    assert relative(reflect_weight(weight, u, eps=eps), weight @ soft) < 1e-12
    assert relative(reflect_weight(weight, u, eps=eps, transpose=True), weight @ soft.T) < 1e-12
    assert relative(reflect_weight(weight.T, u, eps=eps, side="output"), soft.T @ weight.T) < 1e-12
    assert float(normalize(u, eps).norm(dim=0).max()) < 1
    v = normalize(u, eps)
    assert relative(torch.eye(len(v)) - v @ wy_factor(v) @ v.T, soft) < 1e-12


def test_zero_columns_are_the_identity_in_the_soft_form_only() -> None:
    zero = torch.zeros(4, 2)
    assert torch.equal(reflect_weight(torch.eye(4), zero, eps=1e-4), torch.eye(4))
    zero[:, 0] = 1.0
    with pytest.raises(NumericsError, match="vector 1 of 2 is zero"):
        reflect_weight(torch.eye(4), zero)
    zero[2, 1] = float("nan")
    for eps in (0.0, 1.0):
        with pytest.raises(NumericsError, match="vector 1 of 2 is not finite"):
            normalize(zero, eps)


@pytest.mark.parametrize("shape", [(4, 5), (4, 0), (4,), (2, 3, 1)])
def test_more_reflections_than_directions_are_refused(shape: tuple[int, ...]) -> None:
    for function in (normalize, orthonormalize):
        with pytest.raises(TargetError, match="expected \\(width, rank\\)"):
            function(torch.ones(shape))


def test_a_wrong_width_or_side_is_refused() -> None:
    with pytest.raises(TargetError, match="length 4 on a side of width 3"):
        reflect_weight(torch.ones(4, 3), torch.ones(4, 1))
    with pytest.raises(TargetError, match="length 4 on a side of width 3"):
        reflect_activations(torch.ones(4, 3), torch.ones(4, 1))
    with pytest.raises(ValueError, match="'left'"):
        reflect_weight(torch.ones(4, 4), torch.ones(4, 1), side="left")
    with pytest.raises(ValueError, match="-1"):
        normalize(torch.ones(4, 1), eps=-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    u, weight = torch.randn(32, 8), torch.randn(6, 32).to(dtype)
    exact = weight.double() @ chain(u)
    for result in (reflect_weight(weight, u), reflect_activations(weight, u, transpose=True)):
        assert result.dtype == dtype
        assert (
            float((result.double() - exact).abs().max()) <= float((exact.to(dtype).double() - exact).abs().max()) * 1.01
        )


def test_float32_chains_stay_orthogonal_to_rounding() -> None:
    torch.manual_seed(0)
    for start in ("random", "pairs", "nearly-equal"):
        u = draw_vectors(512, 32, start, 0).float()
        product = reflect_weight(torch.eye(512), u)
        assert float((product.T @ product - torch.eye(512)).abs().max()) < 2e-6


def test_gradients_are_those_of_the_dense_chain() -> None:
    torch.manual_seed(0)
    u = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 7, dtype=torch.float64)
    ours = torch.autograd.grad((reflect_activations(x, u) * target).sum(), (u, x))
    product = torch.eye(7, dtype=torch.float64)
    for column in u.T:
        v = column / column.norm()
        product = product @ (torch.eye(7, dtype=torch.float64) - 2 * torch.outer(v, v))
    dense = torch.autograd.grad(((x @ product.T) * target).sum(), (u, x))
    for a, b in zip(ours, dense, strict=True):
        assert relative(a, b) < 1e-12
    # the length of a column is free: no gradient along it
    assert float((ours[0] * u.detach()).sum(dim=0).abs().max()) < 1e-12


@quick
@given(st.integers(1, 24), st.data())
def test_gram_schmidt_depends_on_the_span_only(width: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, width))
    torch.manual_seed(data.draw(seeds))
    u = torch.randn(width, rank, dtype=torch.float64)
    basis = orthonormalize(u)
    assert relative(basis.T @ basis, torch.eye(rank)) < 1e-12
    product = reflect_weight(torch.eye(width, dtype=torch.float64), basis)
    assert relative(product, torch.eye(width) - 2 * basis @ basis.T) < 1e-12
    assert float((product - torch.eye(width)).norm()) == pytest.approx(2 * rank**0.5)
    conditioned = torch.linalg.qr(u).Q  # u (u^T u)^-1 u^T without squaring the condition of u
    assert relative(basis @ basis.T, conditioned @ conditioned.T) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [8, 64, 640])
def test_gram_schmidt_refuses_the_paired_start(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    half = torch.randn(width, 4, dtype=dtype)
    with pytest.raises(NumericsError, match="8 reflection vectors span 4 directions") as caught:
        orthonormalize(half.repeat_interleave(2, dim=1))
    assert "pairs" in (caught.value.hint or "")
