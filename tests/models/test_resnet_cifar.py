"""CIFAR ResNets against the parameter counts of the literature and the golden numbers of the GOR paper's own model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ortho_cli.models.resnet_cifar import CifarResNet, build
from ortho_cli.recipe.models import ResNet


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# He et al. 2015, table 6, gives 0.27, 0.46, 0.66, 0.85 and 1.7 million.
@pytest.mark.parametrize(
    ("name", "shortcut_a"),
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
    ],
)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_parameter_counts_are_those_of_the_literature(name: str, shortcut_a: int, norm: str) -> None:
    with torch.device("meta"):
        plain = build(ResNet.model_validate({"name": name, "norm": norm}), 10, 3, 32)
        convolved = build(ResNet.model_validate({"name": name, "norm": norm, "shortcut": "B"}), 10, 3, 32)
    assert parameters(plain) == shortcut_a
    assert parameters(convolved) == shortcut_a + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


def group_orthogonality(weight: torch.Tensor, mode: str) -> float:
    """The GOR penalty of one layer, written down from its definition, four filters a group."""
    filters = weight.detach().double().flatten(1)
    count = len(filters) // 4
    sets = filters.view(count, 4, -1) if mode == "inter" else filters.view(count, 4, -1).transpose(0, 1)
    gram = sets.mT @ sets if sets.shape[1] >= sets.shape[2] else sets @ sets.mT
    return float((gram - torch.eye(gram.shape[-1])).square().sum())


def test_the_paper_head_gives_the_papers_model_weight_for_weight() -> None:
    torch.manual_seed(0)
    model = build(ResNet.model_validate({"name": "resnet110", "shortcut": "B", "compat": "paper-head"}), 10, 3, 32)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert parameters(model) == 1_795_064
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)
    assert sum(group_orthogonality(conv.weight, "inter") for conv in convolutions) == pytest.approx(
        4239.944336, rel=1e-6
    )
    assert sum(group_orthogonality(conv.weight, "intra") for conv in convolutions) == pytest.approx(
        4520.875488, rel=1e-6
    )


def test_group_norm_has_the_groups_of_gor() -> None:
    model = CifarResNet(20, 10, norm="group")
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert {(norm.num_channels, norm.num_groups) for norm in norms} == {(16, 4), (32, 8), (64, 16)}
    few = CifarResNet(20, 10, norm="group", groups=2)
    assert {norm.num_groups for norm in few.modules() if isinstance(norm, nn.GroupNorm)} == {2}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_shortcut_a_keeps_every_second_pixel_and_appends_zeros() -> None:
    block = CifarResNet(20, 10).get_submodule("layer2.0")
    shortcut = block.get_submodule("downsample")
    inputs = torch.randn(2, 16, 7, 8)
    out = shortcut(inputs)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, :16], inputs[:, :, ::2, ::2])
    assert not out[:, 16:].any()
    assert not list(shortcut.parameters())


def test_a_block_with_silent_convolutions_is_its_shortcut() -> None:
    model = CifarResNet(20, 10).eval()
    block = model.get_submodule("layer1.0")
    nn.init.zeros_(block.get_submodule("norm2").weight)
    inputs = torch.randn(1, 16, 8, 8)
    assert torch.equal(block(inputs), inputs.relu())


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 33)])
def test_any_picture_size(channels: int, size: int) -> None:
    assert CifarResNet(20, 7, channels)(torch.randn(2, channels, size, size)).shape == (2, 7)


def test_a_depth_that_is_not_six_n_plus_two() -> None:
    with pytest.raises(ValueError, match="6n \\+ 2 layers, not 18"):
        CifarResNet(18, 10)
