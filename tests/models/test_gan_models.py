"""Networks of GANs: the parameter counts of the released code, the shapes, and every parameter taking part."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.models import Model
from ortho_cli.registry import resolve

# Section, channels and size; parameters of generator and discriminator.
PUBLISHED: list[tuple[dict[str, Any], int, int, int, int]] = [
    ({"name": "eigengan"}, 3, 256, 22_994_951, 13_635_601),
    ({"name": "eigengan"}, 3, 128, 10_262_529, 8_915_985),
    ({"name": "gan64", "noise": 6}, 1, 64, 2_869_313, 6_950_721),
    ({"name": "gan128", "noise": 30}, 3, 128, 28_416_579, 27_927_361),
]
SMALL: list[tuple[dict[str, Any], int]] = [
    ({"name": "eigengan", "basis": 2, "noise": 3, "base_channels": 4, "max_channels": 8}, 16),
    ({"name": "gan64", "noise": 5, "width": 1 / 64}, 64),
    ({"name": "gan128", "noise": 5, "width": 1 / 64}, 128),
]


def build(section: dict[str, Any], channels: int, size: int) -> tuple[nn.Module, nn.Module]:
    config: Any = TypeAdapter(Model).validate_python(section)
    pair: tuple[nn.Module, nn.Module] = resolve("models", config.name)(config, channels, size)
    return pair


@pytest.mark.parametrize(("section", "channels", "size", "generator", "discriminator"), PUBLISHED)
def test_parameters_are_the_published_ones(
    section: dict[str, Any], channels: int, size: int, generator: int, discriminator: int
) -> None:
    with torch.device("meta"):
        pair = build(section, channels, size)
    assert [sum(each.numel() for each in network.parameters()) for network in pair] == [generator, discriminator]


@pytest.mark.parametrize(("side", "dims"), [(256, [8192, 32768, 65536, 131072, 262144, 524288])])
def test_subspaces_are_of_features(side: int, dims: list[int]) -> None:
    with torch.device("meta"):
        generator, _ = build({"name": "eigengan"}, 3, side)
    bases = [value.shape for name, value in generator.named_parameters() if name.endswith("subspace.U")]
    assert bases == [(6, dim) for dim in dims]


def test_subspaces_start_orthonormal_and_fall_in_importance() -> None:
    torch.manual_seed(0)
    generator, _ = build({"name": "eigengan", "base_channels": 4, "max_channels": 8}, 1, 16)
    for block in generator.get_submodule("blocks"):  # type: ignore[attr-defined]
        space = block.subspace
        assert torch.allclose(space.U @ space.U.T, torch.eye(6), atol=1e-5)
        assert space.importance.tolist() == [18, 15, 12, 9, 6, 3]
        assert not space.mu.any()


@pytest.mark.parametrize(("section", "size"), SMALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_parameter_takes_part(section: dict[str, Any], size: int, channels: int) -> None:
    torch.manual_seed(0)
    generator, discriminator = build(section, channels, size)
    noise = torch.randn(3, generator.noise_dim, requires_grad=True)  # type: ignore[call-overload]
    pictures = generator(noise)
    assert pictures.shape == (3, channels, size, size)
    assert float(pictures.detach().abs().max()) <= 1
    logits = discriminator(pictures)
    assert logits.shape == (3, 1)
    logits.square().sum().backward()
    assert noise.grad is not None
    assert bool(noise.grad.any(0).all())  # every column moves the picture
    for network in (generator, discriminator):
        assert [name for name, each in network.named_parameters() if each.grad is None] == []


@pytest.mark.parametrize(("section", "size"), [(SMALL[0][0], 12), (SMALL[0][0], 4), (SMALL[1][0], 32)])
def test_sizes_that_cannot_be_made(section: dict[str, Any], size: int) -> None:
    with pytest.raises(RecipeError, match=f"these have {size}") as caught:
        build(section, 1, size)
    assert "data.size" in (caught.value.hint or "")


@pytest.mark.parametrize("module", ["eigengan", "gan_simple"])
def test_examples_in_the_documentation_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"ortho_cli.models.{module}"))
    assert found.failed == 0
    assert found.attempted > 0
