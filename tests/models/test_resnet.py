"""ResNet-18, 34 and 50 for small pictures, against the literature's parameter counts and torchvision's layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ortho_cli.methods.whiten import norm_widths
from ortho_cli.models.resnet import ResNet


# Of the CIFAR forms in common use; torchvision's, less the larger first convolution and the other head.
@pytest.mark.parametrize(
    ("depth", "classes", "parameters"),
    [
        (18, 10, 11_689_512 - 64 * 3 * (49 - 9) - 990 * 513),
        (34, 10, 21_797_672 - 64 * 3 * (49 - 9) - 990 * 513),
        (50, 100, 25_557_032 - 64 * 3 * (49 - 9) - 900 * 2049),
        (18, 10, 11_173_962),
        (50, 100, 23_705_252),
    ],
)
def test_parameter_counts(depth: int, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        model = ResNet(depth, classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_layers_have_torchvisions_names_and_shapes() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(each.shape) for name, each in ResNet(50, 100).named_parameters()}
    assert shapes["conv1.weight"] == (64, 3, 3, 3)
    assert shapes["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert shapes["layer2.0.conv2.weight"] == (128, 128, 3, 3)
    assert shapes["layer4.2.bn3.weight"] == (2048,)
    assert "layer1.1.downsample.0.weight" not in shapes


@pytest.mark.parametrize("depth", [18, 50])
def test_stages_halve_the_picture_where_it_is_strided(depth: int) -> None:
    model = ResNet(depth, 10, channels=8).eval()
    sizes = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        stage = model.get_submodule(name)
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    model(torch.randn(1, 3, 32, 32))
    assert sizes == [32, 16, 8, 4]
    strided = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    third = "conv1" if depth == 18 else "conv2"  # a bottleneck halves in its 3x3 convolution
    assert [name for name in strided if "downsample" not in name] == [f"layer{i}.0.{third}" for i in (2, 3, 4)]


def test_a_block_adds_its_input_before_the_last_activation() -> None:
    block = ResNet(18, 10, channels=8).get_submodule("layer1.0").eval()
    nn.init.zeros_(block.get_submodule("conv2").weight)
    inputs = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(inputs), inputs.relu())


def test_the_first_norm_is_the_one_behind_the_first_convolution() -> None:
    assert next(iter(norm_widths(ResNet(18, 10, channels=8)))) == "bn1"


def test_depths_that_are_not_known() -> None:
    with pytest.raises(ValueError, match="depth 19 is none of 18, 34, 50"):
        ResNet(19, 10)
