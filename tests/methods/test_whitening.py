"""The whitening layer: what comes out is whitened as computed, gradients are exact, memory formats do not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ortho_cli.methods.whitening import Whitening, grouped, moments

DTYPES = (torch.float32, torch.float64)
FORMATS = (torch.contiguous_format, torch.channels_last)


def pictures(dtype: torch.dtype = torch.float64, channels: int = 6, seed: int = 0) -> Tensor:
    """Correlated channels, of different sizes and with means of their own."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    raw = torch.randn(16, channels, 5, 5, generator=generator, dtype=torch.float64)
    offsets = 10 * torch.arange(channels, dtype=torch.float64)[:, None, None]
    return (torch.einsum("ij,bjhw->bihw", mix, raw) + offsets).to(dtype)


def covariance(values: Tensor, groups: int) -> Tensor:
    rows = grouped(values.detach().double(), groups)
    centered = rows - rows.mean(-1, keepdim=True)
    return centered @ centered.mT / rows.shape[-1]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_covariance_is_the_identity_less_what_the_ridge_takes(
    groups: int, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    inputs = pictures(dtype).to(memory_format=memory_format)
    layer = Whitening(6, groups, ridge=0.05).to(dtype)
    outputs = layer(inputs)
    assert outputs.dtype == dtype and outputs.is_contiguous(memory_format=memory_format)
    before = covariance(inputs, groups)
    eye = torch.eye(6 // groups, dtype=torch.float64)
    wanted = before @ torch.linalg.inv(before + 0.05 * eye)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert torch.allclose(covariance(outputs, groups), wanted, atol=tolerance)
    assert torch.allclose(outputs.mean((0, 2, 3)), torch.zeros(6, dtype=dtype), atol=tolerance)


def test_one_channel_a_group_is_batch_norm() -> None:
    inputs = pictures()
    ours, theirs = Whitening(6, 6, ridge=1e-5).double(), nn.BatchNorm2d(6).double()
    for layer in (ours, theirs):
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(2))
    values = [inputs.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(value) for layer, value in zip((ours, theirs), values, strict=True)]
    assert torch.allclose(*outputs, atol=1e-12)
    for output in outputs:
        output.pow(3).sum().backward()
    assert torch.allclose(values[0].grad, values[1].grad, atol=1e-10)  # type: ignore[arg-type]
    assert torch.allclose(ours.weight.grad, theirs.weight.grad)  # type: ignore[union-attr, arg-type]
    assert torch.allclose(ours.bias.grad, theirs.bias.grad)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("solver", ["eigh", "newton-schulz"])
def test_gradients_are_those_of_finite_differences(solver: str, memory_format: torch.memory_format) -> None:
    layer = Whitening(4, 2, solver=solver).double()
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    inputs = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(memory_format=memory_format).requires_grad_()

    def through(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (inputs,))
        return found

    assert torch.autograd.gradcheck(through, (inputs, layer.weight, layer.bias))


@pytest.mark.parametrize("shape", [(20, 6), (20, 6, 7), (4, 6, 3, 3, 3)])
def test_vectors_sequences_and_volumes(shape: tuple[int, ...]) -> None:
    inputs = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = Whitening(6, 2, ridge=1e-9).double()(inputs)
    assert outputs.shape == inputs.shape
    assert torch.allclose(covariance(outputs, 2), torch.eye(3, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("averages_whitening", [False, True])
def test_evaluation_does_what_training_did(averages_whitening: bool) -> None:
    """With a momentum of 1 the running statistics are those of the last batch."""
    inputs = pictures()
    layer = Whitening(6, 2, momentum=1.0, averages_whitening=averages_whitening).double()
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(2))
    trained = layer(inputs)
    assert torch.allclose(layer.eval()(inputs), trained, atol=1e-10)
    assert torch.allclose(layer(inputs[:1]), trained[:1], atol=1e-10)  # of one picture, too
    assert layer(inputs).requires_grad and torch.equal(layer(inputs), layer(inputs))


def test_what_is_averaged() -> None:
    first, second = pictures(seed=0), pictures(seed=1)
    ours, published = Whitening(6, 2).double(), Whitening(6, 2, averages_whitening=True).double()
    for inputs in (first, second):
        ours(inputs)
        published(inputs)
    eye = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    covariances = [covariance(inputs, 2) for inputs in (first, second)]
    mixed = 0.9 * (0.9 * eye + 0.1 * covariances[0]) + 0.1 * covariances[1]
    assert ours.running_covariance is not None and torch.allclose(ours.running_covariance, mixed)
    roots = []
    for each in covariances:
        values, vectors = torch.linalg.eigh(each + 1e-2 * eye)
        roots.append((vectors / values.sqrt()[:, None]) @ vectors.mT)
    mixed = 0.9 * (0.9 * eye + 0.1 * roots[0]) + 0.1 * roots[1]
    assert published.running_whitening is not None and torch.allclose(published.running_whitening, mixed)
    assert set(ours.state_dict()) == {"weight", "bias", "running_mean", "running_covariance"}
    assert set(published.state_dict()) == {"weight", "bias", "running_mean", "running_whitening"}


def test_state_goes_round() -> None:
    layer = Whitening(6, 3)
    for seed in range(3):
        layer(pictures(torch.float32, seed=seed))
    again = Whitening(6, 3)
    again.load_state_dict(layer.state_dict())
    inputs = pictures(torch.float32, seed=9)
    assert torch.equal(again.eval()(inputs), layer.eval()(inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_whitened_in_float32(dtype: torch.dtype) -> None:
    inputs = pictures(torch.float32) - 25
    layer = Whitening(6)
    wanted = layer(inputs.to(dtype).float())
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(inputs.to(dtype))
    assert found.dtype == dtype and torch.allclose(found.float(), wanted, atol=2e-2)


def test_a_batch_without_variance_is_no_accident() -> None:
    inputs = torch.full((4, 3, 2, 2), 7.0, requires_grad=True)
    outputs = Whitening(3, ridge=1e-2)(inputs)
    outputs.square().sum().backward()
    assert torch.equal(outputs, torch.zeros_like(outputs))
    assert inputs.grad is not None and bool(inputs.grad.isfinite().all())


def test_the_published_solver_whitens_less() -> None:
    """Its root never falls below 1/11 of the norm's: small directions stay small."""
    mix = torch.diag(torch.tensor([1.0, 1e-4, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    raw = torch.randn(4096, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) @ mix
    found: dict[str, Any] = {}
    for solver in ("eigh", "mpa"):
        outputs = Whitening(6, ridge=1e-12, solver=solver).double()(raw)
        found[solver] = outputs[:, 1].var().item()
    assert found["eigh"] == pytest.approx(1.0, rel=1e-2) and found["mpa"] < 1e-4


def test_moments_have_the_gradient_of_the_plain_form() -> None:
    values = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean, found, _ = moments(values)
    (gradient,) = torch.autograd.grad((found * weight).sum() + mean.square().sum(), values)
    centered = values - values.mean(-1, keepdim=True)
    plain = centered @ centered.mT / 7
    (wanted,) = torch.autograd.grad((plain * weight).sum() + values.mean(-1).square().sum(), values)
    assert torch.allclose(found, plain) and torch.allclose(gradient, wanted)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="6 channels do not divide into 4 groups"):
        Whitening(6, 4)
    with pytest.raises(ValueError, match=r"expected \(B, 6, ...\), found shape \(2, 5, 3, 3\)"):
        Whitening(6)(torch.zeros(2, 5, 3, 3))
