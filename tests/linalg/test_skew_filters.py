"""The mathematics of skew orthogonal convolutions: golden numbers, skewness, norms, the exponential."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ortho_cli.linalg.skew_conv import (
    Vectors,
    convolution_exponential,
    four_norms,
    power_iteration,
    skew_filter,
    space_to_depth,
    start_vectors,
)

RAW = torch.sin(0.3 + 1.1 * torch.arange(36, dtype=torch.float64)).view(2, 2, 3, 3)


def converged(filters: Tensor) -> Vectors:
    start = start_vectors(tuple(filters.shape), torch.Generator().manual_seed(0))
    return power_iteration(filters, Vectors(*(tuple(x.to(filters.dtype) for x in part) for part in start)), 500)


def jacobian(filters: Tensor, size: int) -> Tensor:
    """The matrix of a zero-padded convolution on pictures of this size."""
    count = filters.shape[1] * size**2
    basis = torch.eye(count, dtype=filters.dtype).view(count, filters.shape[1], size, size)
    padding = (filters.shape[2] // 2, filters.shape[3] // 2)
    return F.conv2d(basis, filters, padding=padding).flatten(1).mT


def test_golden_numbers() -> None:
    filters = skew_filter(RAW)
    norms = four_norms(filters, converged(filters))
    expected = [2.68358059497, 2.68358059497, 2.69992623211, 2.69992623211]
    assert norms.tolist() == pytest.approx(expected, abs=1e-10)
    scaled = 0.7 * filters / norms.min()
    delta = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    delta[0, 0, 2, 2] = 1
    for terms, norm, here, there in (
        (5, 1.000196028017, 0.923749115051, -0.160011299959),
        (10, 1.000000043127, 0.923259783946, -0.160528779852),
    ):
        found = convolution_exponential(delta, scaled, terms)
        assert found.norm().item() == pytest.approx(norm, abs=1e-11)
        assert (found[0, 0, 2, 2].item(), found[0, 1, 2, 3].item()) == pytest.approx((here, there), abs=1e-11)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (1, 3)])
def test_the_filter_is_skew_and_its_norms_bound_it(kernel: tuple[int, int]) -> None:
    raw = torch.randn(4, 4, *kernel, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    filters = skew_filter(raw)
    matrix = jacobian(filters, 6)
    assert torch.equal(matrix, -matrix.mT)
    norms = four_norms(filters, converged(filters))
    out, into, high, wide = filters.shape
    unfoldings = (
        filters.permute(0, 2, 1, 3).reshape(out * high, into * wide),
        filters.permute(0, 3, 1, 2).reshape(out * wide, into * high),
        filters.reshape(out, -1),
        filters.transpose(0, 1).reshape(into, -1),
    )
    exact = [torch.linalg.matrix_norm(unfolded, ord=2).item() for unfolded in unfoldings]
    assert norms.tolist() == pytest.approx(exact, rel=1e-6)
    bound = (high * wide) ** 0.5 * norms.min()
    assert torch.linalg.matrix_norm(matrix, ord=2) <= bound * (1 + 1e-9)


def test_the_exponential_is_that_of_the_jacobian() -> None:
    filters = 0.3 * skew_filter(RAW)
    pictures = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = torch.linalg.matrix_exp(jacobian(filters, 5)) @ pictures.flatten(1).mT
    assert torch.allclose(convolution_exponential(pictures, filters, 25).flatten(1).mT, exact, atol=1e-12)


def test_gradients_flow_through_filter_and_norm_with_the_vectors_held() -> None:
    raw = RAW.clone().requires_grad_()
    vectors = converged(skew_filter(RAW))

    def value(raw: Tensor) -> Tensor:
        filters = skew_filter(raw)
        return convolution_exponential(torch.ones(1, 2, 3, 3).double(), filters / four_norms(filters, vectors)[0], 3)

    assert torch.autograd.gradcheck(value, raw)
    assert not any(vector.requires_grad for part in vectors for vector in part)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_space_to_depth_keeps_every_place_once(stride: int) -> None:
    pictures = torch.arange(1.0, 1 + 2 * 3 * 5 * 7).view(2, 3, 5, 7)
    found = space_to_depth(pictures, stride)
    assert found.shape == (2, 3 * stride**2, -(-5 // stride), -(-7 // stride))
    assert torch.equal(found[found != 0].sort().values, pictures.flatten())
    assert found[1, stride * stride + min(1, stride - 1), 0, 0] == pictures[1, 1, 0, min(1, stride - 1)]
