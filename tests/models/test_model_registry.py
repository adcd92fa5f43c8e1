"""Laws over every model that a recipe can name: the same weights from a seed, a meta form, every parameter trained."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from ortho_cli.recipe.models import Model
from ortho_cli.registry import TABLES, resolve

SIZE, CLASSES = 8, 7
SMALL = {
    "vgg19": {"width": 0.125},
    "resnet32x2": {"width": 0.125},
    **{f"resnet{depth}": {"width": 0.125} for depth in (18, 34, 50)},
    "wrn": {"depth": 10, "width": 1},
    "vit-mini": {"patch": 4, "depth": 1, "heads": 2, "dim": 8},
    "vit-b16": {"patch": 4, "depth": 1, "heads": 2, "dim": 8},
}
# Tested on their own: what has its base's sizes, what a library has, what takes no pictures, and what makes them.
APART = {
    "hf-image", "hf-text", "timm", "forecaster", "causal-lm", "tiny-lm", "eigengan", "gan64", "gan128",
    "stable-diffusion", "transformer-base", "transformer-small",
}  # fmt: skip
OWN = [name for name in TABLES["models"] if name not in APART]


def build(name: str, channels: int) -> torch.nn.Module:
    config: Any = TypeAdapter(Model).validate_python({"name": name, **SMALL.get(name, {})})
    model: torch.nn.Module = resolve("models", name)(config, CLASSES, channels, SIZE)
    return model


@pytest.mark.parametrize("name", OWN)
def test_a_seed_decides_the_weights(name: str) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build(name, 3).state_dict())
    first, same, other = states
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", OWN)
def test_the_meta_form_has_the_same_parameters_and_no_memory(name: str) -> None:
    with torch.device("meta"):
        model = build(name, 3)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in build(name, 3).state_dict().items()
    }


@pytest.mark.parametrize("name", [name for name in OWN if name not in ("resnet44", "resnet56", "resnet110")])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_parameter_takes_part(name: str, channels: int) -> None:
    torch.manual_seed(0)
    model = build(name, channels)
    logits = model(torch.randn(4, channels, SIZE, SIZE))
    assert logits.shape == (4, CLASSES)
    logits.square().sum().backward()
    silent = [key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert silent == []


@pytest.mark.parametrize(
    "module", ["resnet_cifar", "resnet", "vgg", "wide_resnet", "vit", "mlp", "hf_image", "timm_image", "forecaster"]
)
def test_examples_in_the_documentation_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"ortho_cli.models.{module}"))
    assert found.failed == 0
    assert found.attempted > 0 or module in ("hf_image", "timm_image")
