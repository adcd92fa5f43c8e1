"""Hessian penalty and OroJaR: unbiased for what they estimate, zero where coordinates are independent, in a run too."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ortho_cli.errors import TargetError
from ortho_cli.linalg import curvature
from ortho_cli.linalg.curvature import hessian_penalty, orthogonal_jacobian_penalty
from ortho_cli.methods import code_penalties
from ortho_cli.methods.code_penalties import HessianMethod, OroJaRMethod
from ortho_cli.methods.method import Context
from ortho_cli.models.gan_simple import SimpleGenerator
from ortho_cli.recipe.methods_gan import Hessian, OroJaR

CONTEXT = Context(0, 10, "gan", None)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = SimpleGenerator(5, 1, [8, 4, 4])
        self.discriminator = nn.Conv2d(1, 1, 1)


def signs(count: int, *shape: int) -> Tensor:
    return 2.0 * torch.randint(0, 2, (count, *shape), generator=torch.Generator().manual_seed(0)).double() - 1


def test_hessian_variance_is_twice_the_sum_of_squares_off_the_diagonal() -> None:
    hessian = torch.tensor([[5.0, 1, 0], [1, -2, 2], [0, 2, 7]]).double()
    off = hessian - torch.diag(hessian.diagonal())
    found = hessian_penalty(
        lambda z: [0.5 * ((z @ hessian) * z).sum(1, keepdim=True)], torch.randn(1, 3).double(), signs(40_000, 1, 3)
    )
    assert found.item() == pytest.approx(2 * off.square().sum().item(), rel=0.05)


def test_jacobian_variance_is_twice_the_sum_of_squares_off_the_grams_diagonal() -> None:
    jacobian = torch.tensor([[1.0, 0.5, 0], [0, 2, 1], [0, 0, 3]]).double()
    gram = jacobian.T @ jacobian
    off = gram - torch.diag(gram.diagonal())
    found = orthogonal_jacobian_penalty(lambda z: [z @ jacobian.T], torch.zeros(1, 3).double(), signs(40_000, 1, 3))
    assert found.item() == pytest.approx(2 * off.square().sum().item(), rel=0.05)


def test_what_is_independent_costs_nothing() -> None:
    code, drawn = torch.randn(4, 3).double(), signs(6, 4, 3)
    turned = torch.linalg.qr(torch.randn(7, 3).double())[0] * torch.tensor([1.0, 5, 20]).double()
    assert hessian_penalty(lambda z: [z**3, z], code, drawn).item() == pytest.approx(0, abs=1e-12)
    assert orthogonal_jacobian_penalty(lambda z: [z @ turned.T], code, drawn).item() == pytest.approx(0, abs=1e-12)


METHODS: list[Any] = [
    HessianMethod(Hessian(name="hessian", targets=("project", "convs.*"), penalty=2.0)),
    OroJaRMethod(OroJaR(name="orojar", targets=("project", "convs.*"), penalty=2.0)),
]


@pytest.mark.parametrize("method", METHODS, ids=["hessian", "orojar"])
def test_a_method_is_of_the_generator_phase_and_its_layers(method: Any) -> None:
    torch.manual_seed(0)
    model = Pair()
    method.prepare(model, CONTEXT)
    assert method.layers == ["generator.project", "generator.convs.0", "generator.convs.1"]
    outputs = {"noise": torch.randn(4, 5), "signs": lambda count: signs(count, 4, 5).float()}
    assert method.penalty(model, {}, outputs, "discriminator") is None
    value = method.penalty(model, {}, outputs, "generator")
    assert float(value.detach()) > 0
    value.backward()
    assert model.generator.convs[0].weight.grad is not None
    assert model.generator.to_picture.weight.grad is None  # behind the chosen layers
    assert not model.generator.project._forward_hooks


@pytest.mark.parametrize("method", METHODS, ids=["hessian", "orojar"])
def test_a_layer_that_is_replaced_later_is_followed(method: Any) -> None:
    torch.manual_seed(0)
    model = Pair()
    method.prepare(model, CONTEXT)
    for name in ("0", "1"):
        old = model.generator.convs.get_submodule(name)
        model.generator.convs.register_module(name, nn.ConvTranspose2d(old.in_channels, old.out_channels, 4, 2, 1))
    outputs = {"noise": torch.randn(4, 5), "signs": lambda count: signs(count, 4, 5).float()}
    method.penalty(model, {}, outputs, "generator").backward()
    assert model.generator.convs[0].weight.grad is not None


def test_what_has_no_generator_is_refused() -> None:
    with pytest.raises(TargetError, match="task classify has none"):
        METHODS[0].prepare(nn.Linear(2, 2), Context(0, 1, "classify", None))
    with pytest.raises(TargetError, match="matched 0 of"):
        HessianMethod(Hessian(name="hessian", targets=("discriminator",))).prepare(Pair(), CONTEXT)


def test_examples_run() -> None:
    for module in (curvature, code_penalties):
        found = doctest.testmod(module)
        assert found.attempted > 0
        assert found.failed == 0
