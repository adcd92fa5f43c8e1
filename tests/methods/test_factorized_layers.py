"""Factored layers compute what their dense layers compute, by every route, and turn back into them."""

from __future__ import annotations

import copy
import doctest
import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ortho_cli.errors import TargetError
from ortho_cli.linalg.spectral import spectral_factors
from ortho_cli.methods.factorized_base import FactorizedLayer, matricization
from ortho_cli.methods.factorized_conv import FactorizedConv
from ortho_cli.methods.factorized_layers import factorized_layer

PICTURE = torch.randn(2, 4, 13, 12, generator=torch.Generator().manual_seed(0)).double()


def filled(base: nn.Module, rank: int | None = None, *, square: bool = False) -> FactorizedLayer:
    """The layer by its spectral factors; of full rank unless told."""
    form = matricization(base)
    layer = factorized_layer(base, rank or min(form.rows, form.cols), square=square)
    found = spectral_factors(form.to_matrix(base.weight.detach()), layer.rank)
    with torch.no_grad():
        for own, value in zip((layer.U, layer.VT), form.stack(found.u, found.vt), strict=True):
            own.copy_(value)
    return layer


def check_equal(base: nn.Module, inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full-rank factors, with and without M, thin and whole, and the dense layer made again."""
    base = base.double()
    expected = base(inputs)
    for square, whole in itertools.product((False, True), repeat=2):
        monkeypatch.setattr(FactorizedConv, "prefers_whole", lambda self, shape, whole=whole: whole)
        layer = filled(base, square=square)
        assert torch.allclose(layer(inputs), expected, rtol=0, atol=1e-9)
        assert torch.allclose(layer.weight, base.weight, rtol=0, atol=1e-9)
        dense = layer.dense()
        assert type(dense) is type(base)
        assert torch.allclose(dense(inputs), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kernel", [1, 3, 5, (3, 1), (1, 5), (2, 3)])
@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_of_full_rank_is_the_dense_one(
    kernel: Any, stride: Any, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    for padding, dilation, bias in itertools.product((0, 2, (1, 0)), (1, 2), (False, True)):
        base = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups, bias)
        check_equal(base, PICTURE, monkeypatch)


@pytest.mark.parametrize("kernel", [1, 3, (2, 5)])
@pytest.mark.parametrize("stride", [1, 2, (3, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_too(kernel: Any, stride: Any, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for padding, dilation in itertools.product((0, (0, 1)), (1, 2)):
        extra = 1 if stride == (3, 2) else 0
        base = nn.ConvTranspose2d(4, 6, kernel, stride, padding, extra, groups, dilation=dilation)
        check_equal(base, PICTURE, monkeypatch)


@pytest.mark.parametrize(
    ("base", "shape"),
    [
        (nn.Linear(7, 5), (2, 3, 7)),
        (nn.Linear(7, 5, bias=False), (7,)),
        (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (2, 4, 13)),
        (nn.Conv3d(4, 6, (2, 3, 3), 2, 1), (2, 4, 6, 7, 8)),
        (nn.ConvTranspose1d(4, 6, 3, 2, 1), (2, 4, 13)),
        (nn.ConvTranspose3d(4, 6, 2, 2), (2, 4, 3, 4, 5)),
        (nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 2), padding_mode="reflect"), (2, 4, 13, 12)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 13, 12)),
        (nn.Conv2d(4, 6, (3, 5), padding="same", dilation=2), (2, 4, 13, 12)),
        (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 13, 12)),
        (nn.Conv2d(4, 6, 3), (4, 13, 12)),
    ],
    ids=repr,
)  # fmt: skip
def test_every_other_kind(base: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    check_equal(base, torch.randn(shape, dtype=torch.float64), monkeypatch)


def test_float32_stays_within_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for kernel, stride in itertools.product((1, 3, 5), (1, 2, 3)):
        base = nn.Conv2d(16, 32, kernel, stride, kernel // 2)
        inputs = torch.randn(4, 16, 17, 17)
        for whole in (False, True):
            monkeypatch.setattr(FactorizedConv, "prefers_whole", lambda self, shape, whole=whole: whole)
            assert torch.allclose(filled(base)(inputs), base(inputs), rtol=0, atol=1e-5)


def test_embeddings_and_the_conv1d_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.pytorch_utils import Conv1D

    check_equal(nn.Embedding(9, 5, padding_idx=2), torch.tensor([[1, 2], [8, 0]]), monkeypatch)
    check_equal(Conv1D(5, 7), torch.randn(3, 7).double(), monkeypatch)
    layer = filled(nn.Embedding(9, 5, padding_idx=2))
    layer(torch.tensor([2, 2])).sum().backward()
    assert layer.U.grad is not None
    assert not layer.U.grad.any()


@pytest.mark.parametrize("whole", [False, True])
def test_both_routes_have_the_gradients_of_the_product(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(4, 6, 3, 2, 1, groups=2).double()
    monkeypatch.setattr(FactorizedConv, "prefers_whole", lambda self, shape: whole)
    layer = filled(base, rank=3, square=True)
    layer(PICTURE).square().sum().backward()
    found = [parameter.grad for parameter in layer.parameters()]
    conv = torch.nn.functional.conv2d(PICTURE, layer.weight, layer.bias, 2, 1, groups=2)
    expected = torch.autograd.grad(conv.square().sum(), list(layer.parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True) if a is not None)
    assert all(gradient is not None for gradient in found)


def test_the_cheaper_route_is_taken() -> None:
    conv = nn.Conv2d(32, 32, 3, padding=1)
    assert not factorized_layer(conv, 4).prefers_whole((64, 32, 16, 16))
    assert factorized_layer(conv, 96).prefers_whole((64, 32, 16, 16))  # overcomplete: twice the work by two
    # The first of two thin convolutions sees all rows: with a stride of 2 it costs more than at 1.
    assert not factorized_layer(conv, 40).prefers_whole((64, 32, 16, 16))
    assert factorized_layer(nn.Conv2d(32, 32, 3, 2, 1), 40).prefers_whole((64, 32, 16, 16))
    layer = factorized_layer(nn.Linear(64, 64), 64)
    assert torch.equal(layer(torch.ones(512, 64)), layer(torch.ones(1, 64)).expand(512, -1))


def test_sizes_between_and_after_are_those_of_the_convolutions() -> None:
    for base in (
        nn.Conv2d(2, 4, (3, 5), (2, 3), (1, 2), (2, 1)),
        nn.Conv2d(2, 4, (1, 3), 2),
        nn.ConvTranspose2d(2, 4, (3, 5), (2, 3), (1, 0), (1, 2)),
    ):
        layer = factorized_layer(base, 2)
        assert isinstance(layer, FactorizedConv)
        between = layer._places_after((13, 12), layer._thin[0], 0)
        assert tuple(layer._places_after(between, layer._thin[1], 1)) == base(torch.ones(1, 2, 13, 12)).shape[2:]


def test_it_copies_saves_and_compiles() -> None:
    layer = filled(nn.Conv2d(4, 6, 3, groups=2), rank=3)
    inputs = torch.randn(2, 4, 9, 9)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(inputs), layer(inputs))
    assert set(layer.state_dict()) == {"U", "VT", "bias"}
    fresh = factorized_layer(nn.Conv2d(4, 6, 3, groups=2), 3)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(inputs), layer(inputs))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(inputs), layer(inputs))
    assert layer.in_channels == 4
    assert layer.weight.requires_grad
    with pytest.raises(AttributeError):
        layer.nonsense  # noqa: B018


def test_dense_layers_have_tensors_of_their_own() -> None:
    layer = filled(nn.Linear(4, 3).eval().requires_grad_(False))
    dense = layer.dense()
    assert not dense.training
    assert not any(parameter.requires_grad for parameter in (*dense.parameters(), *layer.parameters()))
    with torch.no_grad():
        dense.bias.zero_()
    assert layer.bias is not None
    assert layer.bias.any()


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (nn.LayerNorm(4), "a LayerNorm, which is neither"),
        (nn.ReLU(), "multiplies by no plain weight"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
        (nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), "no plain weight of its own"),
        (nn.Bilinear(2, 2, 2), "neither linear"),
    ],
)
def test_what_has_no_factored_form_says_why(base: nn.Module, reason: str) -> None:
    with pytest.raises(TargetError, match=reason):
        factorized_layer(base, 2)
    with pytest.raises(ValueError, match="at least 1"):
        factorized_layer(nn.Linear(2, 2), 0)


@pytest.mark.parametrize("module", ["factorized_base", "factorized_layers", "factorized_conv"])
def test_examples_in_the_documentation_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"ortho_cli.methods.{module}"))
    assert found.failed == 0
    assert found.attempted > 0
