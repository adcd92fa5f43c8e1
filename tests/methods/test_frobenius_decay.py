"""Frobenius decay: its gradient, with either kind of optimizer, what it leaves alone, and against weight decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ortho_cli as ortho
from ortho_cli.errors import TargetError
from ortho_cli.methods.factorized_base import FactorizedLayer
from ortho_cli.methods.frobenius_decay import FrobeniusDecayMethod
from ortho_cli.methods.method import Context
from ortho_cli.methods.weight_decay import decoupled
from ortho_cli.recipe.methods import FrobeniusDecay
from ortho_cli.training.optimizers import NAG, UncorrectedAdam, _Pair, parameter_groups

COEF = 0.3
CONTEXT = Context(0, 10, "classify", None)


def network(*, square: bool = False, rank_scale: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 6, (1, 3)), nn.ConvTranspose2d(6, 4, 3),
        nn.Flatten(), nn.Linear(4 * 36, 12), nn.Linear(12, 3),
    ).double()  # fmt: skip
    ortho.factorize_(model, rank_scale=rank_scale, square=square)
    return model


def layers_of(model: nn.Module) -> list[FactorizedLayer]:
    return [module for module in model.modules() if isinstance(module, FactorizedLayer)]


def by_autograd(model: nn.Module, coef: float = COEF) -> dict[str, Tensor]:
    penalty = sum(coef / 2 * layer.weight.square().sum() for layer in layers_of(model))
    named = {f"{i}.{key}": p for i, layer in enumerate(layers_of(model)) for key, p in layer.named_parameters()}
    named = {key: p for key, p in named.items() if not key.endswith("bias")}
    assert isinstance(penalty, Tensor)
    return dict(zip(named, torch.autograd.grad(penalty, list(named.values())), strict=True))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{i}.{key}": p.grad.clone()
        for i, layer in enumerate(layers_of(model))
        for key, p in layer.named_parameters()
        if p.grad is not None and key != "bias"
    }


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("rank_scale", [0.2, 1.0, 3.0])
def test_the_gradient_is_that_of_half_the_squared_product(square: bool, rank_scale: float) -> None:
    model = network(square=square, rank_scale=rank_scale)
    assert len(layers_of(model)) == 4
    expected = by_autograd(model)
    ortho.frobenius_decay_(model, COEF)
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], expected[key], rtol=1e-9, atol=1e-12) for key in expected)
    ortho.frobenius_decay_(model, COEF)  # adds to what is there
    assert all(torch.allclose(gradients(model)[key], 2 * expected[key]) for key in expected)
    biases = [layer.bias for layer in layers_of(model)]
    assert all(bias is not None and bias.grad is None for bias in biases)


def test_beside_the_step_factors_lose_rate_times_gradient() -> None:
    model = network(square=True)
    expected = by_autograd(model)
    before = {key: p.detach().clone() for key, p in _factors(model).items()}
    ortho.frobenius_decay_(model, COEF, lr=0.5)
    assert gradients(model) == {}
    for key, parameter in _factors(model).items():
        assert torch.allclose(parameter, before[key] - 0.5 * expected[key])


def _factors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{i}.{key}": p
        for i, layer in enumerate(layers_of(model))
        for key, p in layer.named_parameters()
        if key != "bias"
    }


def test_what_a_product_loses() -> None:
    """To first order in the rate `U VT` loses `U U^T W + W V V^T`: what W would, turned as any gradient step is."""
    layer = layers_of(network())[-1]
    before = layer.weight.detach()
    ortho.frobenius_decay_([layer], 1.0, lr=1e-6)
    u, vt = layer.factors()
    lost = (before - layer.weight.detach()) / 1e-6
    expected = u @ u.T @ before + before @ vt.T @ vt
    assert torch.allclose(lost, expected.detach(), rtol=1e-4, atol=1e-6)


def test_it_leaves_more_of_the_nuclear_norm_than_weight_decay_on_factors() -> None:
    """Balanced factors lose sigma^2 by the one and sigma by the other: at an equal norm the spectrum is flatter."""
    shares = []
    for coef, lr in ((1.0, 1e-2), (0.0, 0.0)):
        base = nn.Linear(3, 3, bias=False)
        base.weight = nn.Parameter(torch.diag(torch.tensor([4.0, 2.0, 1.0])))
        layer = layers_of(nn.Sequential(*ortho.factorize_(nn.Sequential(base), rank=3, targets=["0"]).values()))[0]
        start = layer.weight.norm().item()
        while layer.weight.norm().item() > start / 2:
            if coef:
                ortho.frobenius_decay_([layer], coef, lr=lr)
            else:
                layer.scale_(torch.tensor(0.99))  # weight decay on both
        values = torch.linalg.svdvals(layer.weight.detach())
        shares.append((values.sum() / values.norm()).item())
    assert shares[0] > 1.05 * shares[1]


def test_half_precision_and_frozen_factors() -> None:
    model = network().to(torch.bfloat16)
    frozen = layers_of(model)[0].VT.requires_grad_(False)
    ortho.frobenius_decay_(model, COEF)
    expected = by_autograd_of_rest(model)
    assert frozen.grad is None
    for key, gradient in gradients(model).items():
        assert gradient.dtype == torch.bfloat16
        assert torch.allclose(gradient.float(), expected[key], rtol=2e-2, atol=1e-3)


def by_autograd_of_rest(model: nn.Module) -> dict[str, Tensor]:
    wide = network().float()
    wide.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    return by_autograd(wide)


OPTIMIZERS: list[tuple[Any, bool]] = [
    (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), False),
    (lambda p: torch.optim.Adam(p, 0.1), False),
    (lambda p: torch.optim.AdamW(p, 0.1), True),
    (lambda p: torch.optim.Muon(p, 0.1), True),
    (lambda p: NAG(p, 0.1), True),
    (lambda p: UncorrectedAdam(p, 0.1), True),
    (lambda p: _Pair([torch.optim.Muon(p, 0.1)]), True),
]


@pytest.mark.parametrize(("make", "beside"), OPTIMIZERS)
def test_how_an_optimizer_decays(make: Any, beside: bool) -> None:
    assert decoupled(make([nn.Parameter(torch.ones(2, 2))])) is beside


@pytest.mark.parametrize(("make", "beside"), OPTIMIZERS)
def test_a_scalar_chain_decays_exactly_as_weight_decay(make: Any, beside: bool) -> None:
    """One matrix times a frozen identity is one matrix: Frobenius decay on it must be the optimizer's weight decay."""
    torch.manual_seed(0)
    base = nn.Linear(4, 4, bias=False).double()
    plain = nn.Parameter(base.weight.detach().clone())
    layer = one_matrix(base)
    method = FrobeniusDecayMethod(FrobeniusDecay(name="frobenius_decay", penalty=COEF))
    model = nn.ModuleDict({"layer": layer})
    method.prepare(model, CONTEXT)
    ours = make([{"params": [layer.U], "weight_decay": 0.0}])
    theirs = make([{"params": [plain], "weight_decay": COEF}])
    for step in range(5):
        pull = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        layer.U.grad, plain.grad = pull.clone(), pull.clone()
        method.after_backward(model, ours, "train")
        ours.step()
        theirs.step()
    assert torch.allclose(layer.U, plain, rtol=0, atol=1e-12)


def one_matrix(base: nn.Linear) -> FactorizedLayer:
    from ortho_cli.methods.factorized_layers import factorized_layer

    layer = factorized_layer(base, 4)
    with torch.no_grad():
        layer.U.copy_(base.weight)
        layer.VT.copy_(torch.eye(4))
    layer.VT.requires_grad_(False)
    return layer


def prepared(model: nn.Module, **settings: Any) -> FrobeniusDecayMethod:
    method = FrobeniusDecayMethod(FrobeniusDecay(name="frobenius_decay", penalty=COEF, **settings))
    method.prepare(model, CONTEXT)
    return method


def test_it_takes_the_place_of_weight_decay_on_its_factors_and_nothing_else() -> None:
    model = network()
    method = prepared(model, exclude=("3",))  # a name that ends other names too: "3" is one module
    assert list(method.layers) == ["1", "2", "5"]
    groups = parameter_groups(model, 0.1, decay_norms=False, claimed=method.param_groups(model))
    undecayed = {id(p) for group in groups for p in group["params"] if not group["weight_decay"]}
    decayed = {id(p) for group in groups for p in group["params"] if group["weight_decay"]}
    for name, layer in ((name, m) for name, m in model.named_modules() if isinstance(m, FactorizedLayer)):
        for parameter in layer.factor_parameters():
            assert id(parameter) in (decayed if name == "3" else undecayed)
    assert id(model[0].weight) in decayed
    optimizer = torch.optim.SGD(groups, 0.1)
    method.after_backward(model, optimizer, "train")
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {f"{name}.{part}" for name in ("1", "2", "5") for part in ("U", "VT")}
    assert method.notes == ["decays the products of 3 layers by 0.3; 1 factored layers keep weight decay"]
    expected = COEF / 2 * sum(model[int(name)].weight.square().sum().item() for name in method.layers)
    assert method.scalars()["penalty"] == pytest.approx(expected)


def test_a_phase_decays_what_it_steps() -> None:
    model = network()
    method = prepared(model)
    method.after_backward(model, torch.optim.SGD(model[5].parameters(), 0.1), "second")
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"5.U", "5.VT"}


def test_nothing_to_decay() -> None:
    with pytest.raises(TargetError, match="no factored layers") as caught:
        prepared(nn.Linear(2, 2))
    assert "before it" in str(caught.value.hint)
    with pytest.raises(TargetError, match="no factored layers"):
        ortho.frobenius_decay_(nn.Linear(2, 2), 0.1)
    with pytest.raises(TargetError, match="layer9"):
        prepared(network(), targets=("layer9",))
