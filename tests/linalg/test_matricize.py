"""Weights as matrices and back, and factored layers against the dense ones of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ortho_cli.errors import TargetError
from ortho_cli.linalg.matricize import Matricization
from ortho_cli.linalg.spectral import spectral_factors

quick = settings(deadline=None, max_examples=60)
CONVOLUTIONS: list[Any] = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED: list[Any] = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def thin_pair(layer: Any, rank: int, dims: int, transposed: bool) -> nn.Sequential:
    """The two thin convolutions that stand for the factors of a dense one."""
    how = Matricization("transposed" if transposed else "conv", tuple(layer.weight.shape), layer.groups)
    found = spectral_factors(how.to_matrix(layer.weight.detach()), rank)
    stored = how.stack(found.u, found.vt)
    first, second = how.thin_kernels(*stored)
    make = (TRANSPOSED if transposed else CONVOLUTIONS)[dims - 1]
    inner = how.batch * stored[0].shape[1]
    strides, paddings = how.split_spatial(layer.stride, 1), how.split_spatial(layer.padding, 0)
    dilations = how.split_spatial(layer.dilation, 1)
    extra = [{"output_padding": o} for o in how.split_spatial(layer.output_padding, 0)] if transposed else [{}, {}]
    sides = [(layer.in_channels, inner), (inner, layer.out_channels)]
    pair = nn.Sequential()
    for place, kernel in enumerate((first, second)):
        conv = make(
            *sides[place], kernel.shape[2:], stride=strides[place], padding=paddings[place],
            dilation=dilations[place], groups=layer.groups, bias=place == 1 and layer.bias is not None, **extra[place],
        )  # fmt: skip
        assert conv.weight.shape == kernel.shape
        conv.weight.data = kernel
        pair.append(conv)
    if layer.bias is not None:
        pair[1].bias = layer.bias
    return pair


@st.composite
def convolutions(draw_: st.DrawFn) -> tuple[Any, int, bool]:
    """Dense layers of every kind, kernel, stride, padding, dilation and number of groups, with their dimensions."""
    dims, transposed = draw_(st.integers(1, 3)), draw_(st.booleans())
    groups = draw_(st.sampled_from([1, 2, 3]))
    sides = [groups * draw_(st.integers(1, 3)) for _ in range(2)]

    def each(values: list[int]) -> tuple[int, ...]:
        return tuple(draw_(st.sampled_from(values)) for _ in range(dims))

    kernel, stride, padding, dilation = each([1, 3, 5]), each([1, 2, 3]), each([0, 1, 2]), each([1, 2])
    extra = {}
    if transposed:
        most = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        extra["output_padding"] = tuple(draw_(st.integers(0, m)) for m in most)
    make = (TRANSPOSED if transposed else CONVOLUTIONS)[dims - 1]
    layer = make(*sides, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
                 bias=draw_(st.booleans()), **extra)  # fmt: skip
    return layer, dims, transposed


@quick
@given(convolutions(), st.integers(0, 2**20))
def test_full_rank_factors_reproduce_the_dense_convolution(case: tuple[Any, int, bool], seed: int) -> None:
    layer, dims, transposed = case
    layer.weight.data = draw(*layer.weight.shape, seed=seed)
    x = draw(2, layer.in_channels, *[13, 11, 12][:dims], seed=seed + 1)
    with torch.no_grad():
        dense = layer(x)
        scale = 1 + float(dense.abs().max())
        how = Matricization("transposed" if transposed else "conv", tuple(layer.weight.shape), layer.groups)
        full = min(how.rows, how.cols)
        assert float((thin_pair(layer, full, dims, transposed)(x) - dense).abs().max()) <= 1e-5 * scale
        found = spectral_factors(how.to_matrix(layer.weight), full)
        fused = how.to_weight(found.u @ found.vt)
        assert float((fused - layer.weight).abs().max()) <= 1e-5


@quick
@given(convolutions(), st.integers(1, 4))
def test_the_thin_pair_equals_the_fused_convolution_at_any_rank(case: tuple[Any, int, bool], rank: int) -> None:
    layer, dims, transposed = case
    how = Matricization("transposed" if transposed else "conv", tuple(layer.weight.shape), layer.groups)
    x = draw(2, layer.in_channels, *[13, 11, 12][:dims])
    pair = thin_pair(layer, rank, dims, transposed)
    found = spectral_factors(how.to_matrix(layer.weight.detach()), rank)
    with torch.no_grad():
        thin = pair(x)
        layer.weight.data = how.to_weight(found.u @ found.vt)
        fused = layer(x)
    assert float((thin - fused).abs().max()) <= 1e-5 * (1 + float(fused.abs().max()))


def test_the_convention_is_the_papers() -> None:
    out, inputs, kh, kw = 4, 3, 5, 2
    how, matrix = Matricization("conv", (out, inputs, kh, kw)), draw(4 * 5, 3 * 2)
    kernel = how.to_weight(matrix)
    assert torch.equal(kernel, matrix.reshape(out, kh, inputs, kw).transpose(1, 2))
    for o, i, p, q in [(0, 0, 0, 0), (3, 2, 4, 1), (1, 0, 3, 1)]:
        assert kernel[o, i, p, q] == matrix[o * kh + p, i * kw + q]
    stored = draw(out * kh, 7), draw(7, inputs * kw)
    horizontal, vertical = how.thin_kernels(*stored)
    assert horizontal.shape == (7, inputs, 1, kw) and vertical.shape == (out, 7, kh, 1)
    assert horizontal[5, 2, 0, 1] == stored[1][5, 2 * kw + 1] and vertical[3, 6, 4, 0] == stored[0][3 * kh + 4, 6]


def test_the_papers_raw_reshape_shuffles_the_kernel() -> None:
    """What its code decomposes is not what its layer computes with: a trained convolution comes back scrambled."""
    weight = draw(32, 16, 3, 3)
    how = Matricization("conv", (32, 16, 3, 3))
    raw = how.to_weight(how.to_matrix(weight, compat="raw-reshape"))
    assert float((raw - weight).norm() / weight.norm()) == pytest.approx(1.397, abs=0.02)
    for o, q in [(0, 0), (31, 2)]:
        for flat in range(16 * 3):
            (i, p), (p_new, i_new) = divmod(flat, 3), divmod(flat, 16)
            assert raw[o, i_new, p_new, q] == weight[o, i, p, q]
    with pytest.raises(TargetError, match="plain convolutions"):
        Matricization("conv", (32, 8, 3, 3), 2).to_matrix(draw(32, 8, 3, 3), compat="raw-reshape")


@pytest.mark.parametrize(
    ("kind", "shape", "groups", "matrix"),
    [
        ("linear", (5, 7), 1, (5, 7)),
        ("embedding", (100, 8), 1, (100, 8)),
        ("conv1d", (7, 5), 1, (5, 7)),
        ("conv", (8, 3, 5), 1, (8, 15)),
        ("conv", (8, 3, 5, 2), 1, (40, 6)),
        ("conv", (8, 3, 2, 3, 5), 1, (16, 45)),
        ("conv", (8, 3, 5, 2), 4, (4, 10, 6)),
        ("transposed", (8, 3, 5, 2), 1, (15, 16)),
        ("transposed", (8, 3, 5, 2), 4, (4, 15, 4)),
    ],
)
def test_shapes_and_round_trips(kind: str, shape: tuple[int, ...], groups: int, matrix: tuple[int, ...]) -> None:
    how = Matricization(kind, shape, groups)
    weight = draw(*shape)
    assert how.matrix_shape == matrix == tuple(how.to_matrix(weight).shape)
    assert how.batch * how.rows * how.cols == how.parameters == weight.numel()
    assert torch.equal(how.to_weight(how.to_matrix(weight)), weight)
    u, vt = draw(*matrix[:-1], 3), draw(*matrix[:-2], 3, matrix[-1])
    stored = how.stack(u, vt)
    assert [tuple(part.shape) for part in stored] == [(groups * how.rows, 3), (groups * 3, how.cols)]
    assert all(map(torch.equal, how.unstack(*stored), (u, vt)))


def test_plain_matrices_are_views() -> None:
    for kind, shape in (("linear", (3, 4)), ("conv1d", (3, 4)), ("conv", (3, 4, 1, 1)), ("conv", (3, 4, 1, 5))):
        weight = draw(*shape)
        assert Matricization(kind, shape).to_matrix(weight).data_ptr() == weight.data_ptr()


def test_a_conv1d_of_transformers_acts_as_its_matrix() -> None:
    from transformers.pytorch_utils import Conv1D

    layer, x = Conv1D(5, 7), draw(2, 7)
    matrix = Matricization("conv1d", (7, 5)).to_matrix(layer.weight)
    assert torch.allclose(layer(x), x @ matrix.mT + layer.bias, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "shape", "groups", "message"),
    [
        ("conv", (4, 4), 1, "three to five dimensions"),
        ("linear", (4, 4, 1, 1), 1, "two dimensions"),
        ("conv", (4, 4, 3, 3), 3, "3 groups"),
        ("linear", (4, 4), 2, "2 groups"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, shape: tuple[int, ...], groups: int, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        Matricization(kind, shape, groups)


def test_another_shape_is_refused() -> None:
    with pytest.raises(TargetError, match=r"\(4, 3\), found \(3, 4\)"):
        Matricization("linear", (4, 3)).to_matrix(draw(3, 4))
    with pytest.raises(ValueError, match="none of linear"):
        Matricization("dense", (4, 3))
