"""Layers in tensor-train and Tucker form: what they compute, the paper's counts, decay that acts, the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

import ortho_cli as ortho
from ortho_cli.errors import TargetError, UsageError
from ortho_cli.linalg.tensor import fold_dims, tensor_parameters, tensor_ranks
from ortho_cli.methods.factorized import FactorizedMethod
from ortho_cli.methods.method import Context
from ortho_cli.methods.tensor_layers import TensorLayer
from ortho_cli.models.wide_resnet import WideResNet
from ortho_cli.recipe.methods import Factorized

KINDS = ("tensor-train", "tucker")
BLOCKS = ["layer*.*.conv{1,2}"]


def filled(base: nn.Module, kind: str, scale: float = 2.0, *, weight: bool = True) -> TensorLayer:
    """Of full rank unless told."""
    layer = TensorLayer(base, kind, scale)
    assert isinstance(base.weight, Tensor)
    layer.fill_(base.weight.detach() if weight else None, torch.Generator().manual_seed(0))
    return layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("base", "shape"),
    [
        (nn.Linear(12, 8), (2, 3, 12)),
        (nn.Linear(12, 8, bias=False), (12,)),
        (nn.Conv2d(8, 12, 1), (2, 8, 5, 4)),
        (nn.Conv2d(8, 12, 1, stride=2, padding=1), (2, 8, 5, 4)),
        (nn.Conv1d(8, 12, 1), (2, 8, 5)),
    ],
    ids=repr,
)  # fmt: skip
def test_pointwise_layers_of_full_rank_are_the_dense_ones(kind: str, base: nn.Module, shape: tuple[int, ...]) -> None:
    inputs = torch.randn(shape)
    layer = filled(base, kind)
    assert torch.allclose(layer(inputs), base(inputs), atol=1e-5)
    assert torch.allclose(layer.dense()(inputs), base(inputs), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"stride": 2, "dilation": (1, 2)}, {"padding_mode": "reflect"}])
@pytest.mark.parametrize("kernel", [3, (1, 3)])
def test_a_separable_kernel_is_found_again(kind: str, settings: dict[str, Any], kernel: Any) -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(8, 12, kernel, padding=(1, 1) if kernel == 3 else (0, 1), **settings)
    with torch.no_grad():
        depthwise = torch.randn(8, *base.kernel_size)
        base.weight.copy_(torch.randn(12, 8, 1, 1) * depthwise)
    inputs = torch.randn(2, 8, 9, 10)
    layer = filled(base, kind)
    assert torch.allclose(layer(inputs), base(inputs), atol=1e-4)
    assert torch.allclose(layer.weight, base.weight, atol=1e-5)
    assert torch.allclose(layer(inputs[0]), base(inputs[0]), atol=1e-4)
    assert torch.allclose(layer.dense()(inputs), base(inputs), atol=1e-4)


def test_the_separable_start_is_the_nearest() -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(6, 10, 3)
    layer = filled(base, "tucker")
    left = (base.weight - layer.weight).square().sum((0, 2, 3))
    values = torch.linalg.svdvals(base.weight.detach().transpose(0, 1).flatten(2))
    assert torch.allclose(left, values[:, 1:].square().sum(1), rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "scale", "parameters", "compat"),
    [
        ("tensor-train", 0.234, 607_160, None), ("tensor-train", 0.705, 2_434_702, None),
        ("tucker", 0.211, 608_501, "tntorch"), ("tucker", 0.68, 2_444_223, "tntorch"),
    ],
)  # fmt: skip
def test_the_papers_wide_resnets(kind: str, scale: float, parameters: int, compat: str | None) -> None:
    """A Tucker core is here a core; the paper's library keeps it as three of a train, which is counted for it."""
    with torch.device("meta"):
        model = WideResNet(28, 10, 10)
        layers = ortho.factorize_(model, rank_scale=scale, form=kind, targets=BLOCKS)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert len(layers) == 24
    for layer in layers.values():
        dims = fold_dims(layer.out * layer.width)
        ranks = tensor_ranks(kind, dims, scale)
        count += tensor_parameters(kind, dims, ranks, compat) - tensor_parameters(kind, dims, ranks)
    assert count == parameters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [0.0167, 0.0667, 0.1])
def test_a_target_ratio(kind: str, target: float) -> None:
    with torch.device("meta"):
        model = WideResNet(28, 10, 10)
        ortho.factorize_(model, target_ratio=target, form=kind, targets=BLOCKS)
    assert sum(parameter.numel() for parameter in model.parameters()) / 36_479_194 == pytest.approx(target, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_decay_is_the_gradient_of_half_the_squared_norm_and_acts(kind: str) -> None:
    """In the paper's code it is added to the loss after backward, so that nothing decays its cores."""
    torch.manual_seed(0)
    base = nn.Conv2d(8, 12, 3).double()
    layer = filled(base, kind, 0.7)
    model = nn.Sequential(layer)
    pointwise = layer.weight / layer.depthwise.transpose(0, 1)  # type: ignore[union-attr]
    penalty = 0.3 / 2 * pointwise[..., 0, 0].square().sum()
    parts = layer.factor_parameters()
    expected = torch.autograd.grad(penalty, parts)
    assert layer.squared_norm(*parts).item() == pytest.approx(penalty.item() * 2 / 0.3, rel=1e-9)
    ortho.frobenius_decay_(model, 0.3)
    assert all(
        torch.allclose(p.grad, e, atol=1e-12) for p, e in zip(parts, expected, strict=True) if p.grad is not None
    )
    assert all(part.grad is not None for part in parts)
    assert layer.depthwise is not None
    assert layer.depthwise.grad is None
    before = layer.squared_norm(*parts).item()
    ortho.frobenius_decay_(model, 0.3, lr=0.1)
    assert layer.squared_norm(*parts).item() < before


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_scaled_evenly(kind: str) -> None:
    layer = filled(nn.Linear(12, 8), kind, 0.5)
    before = layer.weight.detach()
    layer.scale_(torch.tensor(3.0))
    assert torch.allclose(layer.weight, 3 * before, rtol=1e-4)


def test_draws_are_the_papers() -> None:
    base = nn.Conv2d(256, 64, 3)
    for start, spread in (("fan-out", (2 / 64) ** 0.5), (None, 1 / (3 * 256) ** 0.5)):
        layer = TensorLayer(base, "tensor-train", 2.0)
        layer.fill_(None, torch.Generator().manual_seed(0), start)
        pointwise = (layer.weight / layer.depthwise.transpose(0, 1))[..., 0, 0]  # type: ignore[union-attr]
        assert pointwise.std().item() == pytest.approx(spread, rel=0.02)
        assert layer.depthwise is not None
        assert layer.depthwise.abs().max().item() <= 1 / 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_is_the_dense_network(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WideResNet(10, 2, 5, 1).eval()
    method = FactorizedMethod(
        Factorized(name="factorized", form=kind, rank_scale=0.4, spectral=False, targets=tuple(BLOCKS))
    )
    method.prepare(model, Context(0, 1, "classify", None))
    inputs = torch.randn(2, 1, 8, 8)
    expected = model(inputs)
    method.export(model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dense"]
    from safetensors.torch import load_file

    plain = WideResNet(10, 2, 5, 1).eval()
    plain.load_state_dict(load_file(tmp_path / "out" / "dense" / "model.safetensors"))
    assert torch.allclose(plain(inputs), expected, atol=1e-5 * expected.abs().max().item())
    assert set(method.scalars()) == {"product_norm"}
    assert method.state()["ranks"]["layer1.0.conv1"] == list(method.layers["layer1.0.conv1"].ranks)


def test_what_has_no_tensor_form() -> None:
    for base, reason in (
        (nn.Conv2d(4, 4, 3, groups=2), "a conv of 2 groups, which has no tucker form"),
        (nn.ConvTranspose2d(4, 4, 3), "a transposed"),
        (nn.Embedding(4, 4), "embedding"),
    ):
        with pytest.raises(TargetError, match=reason):
            TensorLayer(base, "tucker", 0.5)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(TargetError, match="layer '1' is a conv of 2 groups"):
        ortho.factorize_(model, rank_scale=0.5, form="tucker")
    for settings in ({"rank": 2}, {"rank_scale": 0.5, "square": True}, {}, {"target_ratio": 1e-3}):
        with pytest.raises(UsageError):
            ortho.factorize_(WideResNet(10, 1, 5), form="tucker", **settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"0\.9 cannot be reached by a tucker"):
        ortho.factorize_(WideResNet(10, 1, 5), form="tucker", target_ratio=0.9)
    with pytest.raises(UsageError, match="is none of"):
        ortho.factorize_(WideResNet(10, 1, 5), rank_scale=0.5, form="tukcer")
    for settings in ({"rank": 2}, {"rank_scale": 0.5, "square": True}, {"rank_scale": 0.5, "compat": "paper"}):
        with pytest.raises(ValidationError, match="is for form: factors"):
            Factorized.model_validate({"name": "factorized", "form": "tucker", **settings})


def test_a_compiled_layer_gives_the_same() -> None:
    layer = filled(nn.Conv2d(8, 12, 3, padding=1), "tensor-train", 0.5)
    inputs = torch.randn(2, 8, 6, 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(inputs), layer(inputs), atol=1e-6)
    assert F.mse_loss(compiled(inputs), layer(inputs)).item() < 1e-10
