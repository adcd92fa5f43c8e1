"""The networks of FNL's low-memory and tensor experiments, against the parameter counts of the paper's own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from ortho_cli.models.wide_resnet import WideResNet
from ortho_cli.recipe.models import Model
from ortho_cli.registry import resolve


def build(config: dict[str, Any], classes: int = 10, channels: int = 3) -> nn.Module:
    section: Any = TypeAdapter(Model).validate_python(config)
    model: nn.Module = resolve("models", section.name)(section, classes, channels, 32)
    return model


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("vgg19", 10, 20_035_018),
        ("vgg19", 100, 20_081_188),
        ("vgg19", 200, 20_132_488),
        ("resnet32x2", 10, 7_427_914),
        ("resnet32x2", 100, 7_451_044),
        ("resnet32x2", 200, 7_476_744),
        ("wrn", 10, 36_479_194),
    ],
)
def test_parameter_counts(name: str, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        model = build({"name": name}, classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    "config",
    [
        {"name": "vgg19", "width": 0.125},
        {"name": "resnet32x2", "width": 0.125},
        {"name": "wrn", "depth": 10, "width": 1},
    ],
)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 64), (3, 33)])
def test_any_picture_size(config: dict[str, Any], channels: int, size: int) -> None:
    assert build(config, 7, channels)(torch.randn(2, channels, size, size)).shape == (2, 7)


def test_first_values_have_the_spread_of_the_papers() -> None:
    torch.manual_seed(0)
    vgg = build({"name": "vgg19", "width": 0.5})
    conv = next(m for m in vgg.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 128 and m.out_channels == 256)
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    wrn = build({"name": "wrn", "width": 2})
    conv = next(m for m in wrn.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 64 and m.out_channels == 128)
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


def test_a_wide_resnet_adds_its_shortcut_to_what_the_norm_has_activated() -> None:
    block = WideResNet(10, 1, 10).get_submodule("layer2.0").eval()
    nn.init.zeros_(block.get_submodule("conv2").weight)
    inputs = torch.randn(1, 16, 8, 8)
    assert torch.equal(block(inputs), block.get_submodule("shortcut")(block.get_submodule("norm1")(inputs).relu()))
    plain = WideResNet(16, 1, 10).get_submodule("layer2.1").eval()
    nn.init.zeros_(plain.get_submodule("conv2").weight)
    inputs = torch.randn(1, 32, 8, 8)
    assert torch.equal(plain(inputs), inputs)


def test_depths_that_are_not_six_n_plus_four() -> None:
    with pytest.raises(ValidationError, match="must be 6n \\+ 4"):
        build({"name": "wrn", "depth": 26})
    with pytest.raises(ValueError, match="not 26"):
        WideResNet(26, 1, 10)
