"""SkewConv2d: orthogonal whatever the channels and the stride, buffers that follow, any type; and as a method."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli.errors import TargetError
from ortho_cli.linalg.skew_conv import four_norms, skew_filter
from ortho_cli.methods import skew_conv as skew_conv_module
from ortho_cli.methods import skew_conv_layer
from ortho_cli.methods.method import Context
from ortho_cli.methods.skew_conv import SOCMethod, skew_conv
from ortho_cli.methods.skew_conv_layer import FOLLOW, REFRESH, REFRESH_EVERY, SkewConv2d
from ortho_cli.recipe.methods import SOC

SIZES = [
    (4, 4, 3, 1, 6), (3, 8, 3, 1, 6), (8, 3, 3, 1, 5), (2, 6, 3, 2, 6), (2, 6, 3, 2, 5), (3, 5, 1, 1, 4),
    (2, 2, 3, 3, 7), (2, 2, 3, 1, 1),
]  # fmt: skip


def made(*sizes: int, seed: int = 0, **keys: object) -> SkewConv2d:
    return SkewConv2d(*sizes, generator=torch.Generator().manual_seed(seed), **keys)


def jacobian(layer: nn.Module, channels: int, size: int) -> Tensor:
    count = channels * size**2
    basis = torch.eye(count, dtype=torch.float64).view(count, channels, size, size)
    with torch.no_grad():
        return (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).mT


def test_the_examples() -> None:
    for module in (skew_conv_module, skew_conv_layer):
        tried = doctest.testmod(module)
        assert tried.attempted and not tried.failed


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_jacobian_is_orthogonal(sizes: tuple[int, ...], seed: int) -> None:
    into, out, kernel, stride, size = sizes
    layer = made(into, out, kernel, stride, seed=seed).double()
    for training, tolerance in ((True, 5e-3), (False, 1e-6)):
        matrix = jacobian(layer.train(training), into, size)
        gram = matrix.mT @ matrix if out >= into * stride**2 else matrix @ matrix.mT
        if size % stride and out < into * stride**2:  # places beyond the edge are cut off
            continue
        assert (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() < tolerance


@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, 7), (3, 2, 7), (3, 2, 8), (1, 2, 5), (5, 3, 10)])
def test_sizes_are_those_of_the_convolution_it_replaces(kernel: int, stride: int, size: int) -> None:
    plain = nn.Conv2d(3, 8, kernel, stride, padding=kernel // 2)
    images = torch.randn(2, 3, size, size + 1)
    layer = skew_conv(plain)
    assert layer(images).shape == plain(images).shape
    assert layer.bias is not None and skew_conv(nn.Conv2d(3, 8, 3, padding=1, bias=False)).bias is None


def test_parameters_and_start_are_the_papers() -> None:
    layer = made(3, 64, 3, 1, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == 36_864
    assert layer.random_conv_filter.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert layer.correction == 0.7 and made(3, 4, 1, 1).correction == 1.0
    assert (layer.terms, layer.eval_terms, REFRESH, FOLLOW, REFRESH_EVERY) == (5, 10, 50, 1, 200)
    matrix = torch.linalg.svdvals(
        F.conv2d(torch.eye(64 * 25).view(-1, 64, 5, 5), layer.filters(), padding=1).flatten(1)
    )
    assert matrix[0] < 0.7 * 3  # the bound of the four norms


def test_the_norms_are_right_before_the_first_training_pass_and_followed_after() -> None:
    layer = made(4, 4, 3).double().eval()
    assert layer.passes == 0
    start = layer.vectors()
    exact = four_norms(skew_filter(layer.random_conv_filter), start).min()
    unfolded = skew_filter(layer.random_conv_filter).flatten(1)
    assert exact <= torch.linalg.matrix_norm(unfolded, ord=2) * (1 + 1e-6) and exact > 0
    layer(torch.zeros(1, 4, 3, 3).double())
    assert all(torch.equal(a, b) for a, b in zip(start.right, layer.vectors().right, strict=True))  # not in evaluation
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    pictures = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(30):
        optimizer.zero_grad()
        (layer(pictures) - pictures.roll(1, 1)).square().mean().backward()
        optimizer.step()
    assert layer.passes == 30
    followed = four_norms(skew_filter(layer.random_conv_filter), layer.vectors()).min()
    layer.passes = 0  # the next pass is one of those that refresh
    layer(pictures)
    refreshed = four_norms(skew_filter(layer.random_conv_filter), layer.vectors()).min()
    assert followed.item() == pytest.approx(refreshed.item(), rel=0.1)
    gap = jacobian(layer.eval(), 4, 6)
    assert (gap.mT @ gap - torch.eye(len(gap), dtype=torch.float64)).abs().max() < 1e-6


def test_buffers_are_saved_and_two_passes_share_a_graph() -> None:
    layer = made(3, 6, 3)
    assert {f"{kind}{i}" for kind in "uv" for i in range(1, 5)} | {"random_conv_filter", "bias"} == set(
        layer.state_dict()
    )
    images = torch.randn(2, 3, 5, 5)
    (layer(images) + layer(images)).square().sum().backward()  # the second pass moves the vectors of the first
    assert layer.random_conv_filter.grad is not None and layer.random_conv_filter.grad.isfinite().all()
    again = made(3, 6, 3, seed=5)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.eval()(images), layer.eval()(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    layer = made(3, 6, 3, 1, bias=False).eval()
    images = torch.randn(2, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(images), copy.deepcopy(layer)(images))
        assert layer(images).dtype == torch.float32
    halved = layer.to(dtype)
    outputs = halved(images.to(dtype))
    assert outputs.dtype == dtype
    assert outputs.float().norm().item() == pytest.approx(images.to(dtype).float().norm().item(), rel=2e-3)


def test_channels_last_and_the_meta_device() -> None:
    layer = made(3, 8, 3, 2).eval()
    images = torch.randn(2, 3, 6, 6)
    assert torch.allclose(layer(images.to(memory_format=torch.channels_last)), layer(images), atol=1e-6)
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
        method = SOCMethod(SOC(name="soc", targets=("0",)))
        method.prepare(model, Context(0, 1, "classify", None))
    assert isinstance(model[0], SkewConv2d)
    assert all(each.device.type == "meta" for each in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(("conv", "reason"), [
    (nn.Conv2d(3, 8, 3), r"padding \(0, 0\) of zeros"), (nn.Conv2d(3, 8, 2, padding=1), r"a kernel of \(2, 2\)"),
    (nn.Conv2d(3, 8, (1, 3), padding=(0, 1)), r"a kernel of \(1, 3\)"),
    (nn.Conv2d(4, 8, 3, padding=1, groups=2), "2 groups"), (nn.Conv2d(3, 8, 3, padding=2, dilation=2), "dilation"),
    (nn.Conv2d(3, 8, 3, stride=(1, 2), padding=1), "a stride of"), (nn.Conv1d(3, 8, 3, padding=1), "a Conv1d, not"),
    (nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), "of circular"),
])  # fmt: skip
def test_what_it_cannot_replace_is_refused(conv: nn.Module, reason: str) -> None:
    with pytest.raises(TargetError, match=f"{reason}.*an orthogonal convolution has"):
        skew_conv(conv)


def test_one_channel_and_one_place_are_left_as_they_are() -> None:
    layer = SkewConv2d(1, 1, 1, bias=False)
    pictures = torch.randn(2, 1, 3, 3)
    for training in (True, False):
        assert torch.equal(layer.train(training)(pictures), pictures)


def test_even_kernels_are_refused() -> None:
    with pytest.raises(TargetError, match="needs an odd kernel and a stride of 1 or more, found 4 and 1"):
        SkewConv2d(3, 3, 4)


def test_a_shared_convolution_is_replaced_wherever_it_stands() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    method = SOCMethod(SOC(name="soc", targets=("0",), terms=3, eval_terms=6))
    method.prepare(model, Context(0, 1, "classify", "base"))
    assert isinstance(model[0], SkewConv2d) and model[0] is model[2] and model[0].terms == 3
    assert method.notes == ["1 orthogonal convolutions: 84 -> 84 parameters; the base's weights of them are not used"]
