"""Optimizers against the formulas of their sources, their groups, and what becomes of their moments."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.optim import Optimizer
from ortho_cli.training.optimizers import (
    build_optimizer,
    clip_gradients,
    keep_moments,
    parameter_groups,
    set_learning_rate,
)

STEPS = 6
RATES = (1.0, 0.5, 0.5, 2.0, 0.1, 0.0)  # factors of the schedule; fairseq's momentum depends on their ratios


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3), nn.Conv1d(3, 2, 1))


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(value.shape, generator=generator) for value in model.parameters()]


def trained(section: dict[str, Any], *, decay_norms: bool = True) -> list[Tensor]:
    """Weights after a few steps with given gradients and rates."""
    config: Any = TypeAdapter(Optimizer).validate_python({**section, "decay_norms": decay_norms})
    model = network()
    optimizer = build_optimizer(config, parameter_groups(model, config.weight_decay, decay_norms=decay_norms))
    for step, factor in enumerate(RATES):
        set_learning_rate(optimizer, factor)
        for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [value.detach() for value in model.parameters()]


@pytest.mark.parametrize(
    ("section", "make", "options"),
    [
        ({"name": "sgd"}, torch.optim.SGD, {}),
        ({"name": "sgd", "momentum": 0.9, "weight_decay": 0.1}, torch.optim.SGD,
         {"momentum": 0.9, "weight_decay": 0.1}),
        ({"name": "nesterov", "weight_decay": 0.1}, torch.optim.SGD,
         {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
        ({"name": "adam", "weight_decay": 0.1}, torch.optim.Adam, {"weight_decay": 0.1}),
        ({"name": "adamw", "betas": (0.8, 0.9), "eps": 1e-5}, torch.optim.AdamW,
         {"betas": (0.8, 0.9), "eps": 1e-5, "weight_decay": 0.01}),
    ],
)  # fmt: skip
def test_torch_has_these(section: dict[str, Any], make: Any, options: dict[str, Any]) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=0.1, **options)
    for step, factor in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = 0.1 * factor
        for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    for mine, theirs in zip(trained({**section, "lr": 0.1}), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_fairseqs_nag() -> None:
    """fairseq/optim/nag.py, by its lines: momentum is rescaled by the ratio of learning rates."""
    momentum, decay, last = 0.99, 0.1, 0.1
    expected = [value.detach().clone() for value in network().parameters()]
    buffers = [torch.zeros_like(value) for value in expected]
    for step, factor in enumerate(RATES):
        lr = 0.1 * factor
        correct = lr / last if last > 0 else lr
        for value, buffer, gradient in zip(expected, buffers, gradients(network(), step), strict=True):
            value.mul_(1 - lr * decay)
            value.add_(buffer, alpha=momentum * momentum * correct)
            value.add_(gradient, alpha=-(1 + momentum) * lr)
            buffer.mul_(momentum * correct).add_(gradient, alpha=-lr)
        last = lr
    for mine, theirs in zip(trained({"name": "nag", "lr": 0.1, "weight_decay": decay}), expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-7)


def test_berts_adam() -> None:
    """No correction of the moments' start; decay is of the weight, not of the gradient."""
    expected = [value.detach().clone() for value in network().parameters()]
    first, second = ([torch.zeros_like(value) for value in expected] for _ in range(2))
    for step, factor in enumerate(RATES):
        for value, m, v, gradient in zip(expected, first, second, gradients(network(), step), strict=True):
            m.copy_(0.9 * m + 0.1 * gradient)
            v.copy_(0.999 * v + 0.001 * gradient**2)
            value -= 0.1 * factor * (m / (v.sqrt() + 1e-6) + 0.01 * value)
    section = {"name": "adam", "lr": 0.1, "eps": 1e-6, "weight_decay": 0.01, "bias_correction": False}
    for mine, theirs in zip(trained(section), expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_muon_is_for_matrices_of_hidden_layers_and_adamw_for_the_rest() -> None:
    """Each part is torch's own, at the same learning rate; embeddings, kernels and vectors are AdamW's."""
    model = network()
    parameters = list(model.parameters())
    parts = [
        torch.optim.Muon([model[2].weight], lr=0.1),
        torch.optim.AdamW([value for value in parameters if value is not model[2].weight], lr=0.1, weight_decay=0.1),
    ]
    for step, factor in enumerate(RATES):
        for parameter, gradient in zip(parameters, gradients(model, step), strict=True):
            parameter.grad = gradient
        for part in parts:
            part.param_groups[0]["lr"] = 0.1 * factor
            part.step()
    for mine, theirs in zip(trained({"name": "muon", "lr": 0.1}), parameters, strict=True):
        assert torch.equal(mine, theirs)


def test_muon_leaves_the_head_to_adamw_and_needs_another_matrix() -> None:
    config = TypeAdapter(Optimizer).validate_python({"name": "muon", "lr": 0.1})
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.LayerNorm(2))
    optimizer = build_optimizer(config, parameter_groups(model, 0.1, decay_norms=False))
    hidden, *rest = optimizer.param_groups
    assert hidden["params"] == [model[0].weight] and "momentum" in hidden
    assert sum(len(group["params"]) for group in rest) == 5 and all("betas" in group for group in rest)
    kernels = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(RecipeError, match="muon is for matrices of hidden layers, and none trains here") as caught:
        build_optimizer(config, parameter_groups(kernels, 0.1, decay_norms=False))
    assert caught.value.hint == "use adamw"


class OwnNorm(nn.Module):
    """A norm that torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


def test_what_decays_is_told_by_the_module() -> None:
    """Norms of any rank, biases and vectors do not decay, whatever they are called; matrices do, called bias or not."""
    model = nn.ModuleDict({
        "norm": nn.LayerNorm((2, 4)), "bias": nn.Linear(4, 2), "own": OwnNorm(), "conv": nn.Conv2d(1, 2, 3),
        "frozen": nn.Linear(2, 2).requires_grad_(False),
    })  # fmt: skip
    decayed, bare = parameter_groups(model, 0.1, decay_norms=False)
    names = {id(value): name for name, value in model.named_parameters()}
    assert [names[id(value)] for value in decayed["params"]] == ["bias.weight", "conv.weight"]
    assert {names[id(value)] for value in bare["params"]} == {
        "norm.weight", "norm.bias", "bias.bias", "own.weight", "conv.bias",
    }  # fmt: skip
    assert (decayed["weight_decay"], bare["weight_decay"]) == (0.1, 0.0)
    (everything,) = parameter_groups(model, 0.1, decay_norms=True)
    assert len(everything["params"]) == 7


def test_what_methods_claim() -> None:
    """A claimed parameter is in its own group alone; one of another phase's model, or frozen, is in none."""
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    claimed = [{"params": [model.weight, other.weight], "lr": 0.5}]
    groups = parameter_groups(model, 0.1, decay_norms=False, claimed=claimed)
    assert [(group["params"], group["weight_decay"]) for group in groups] == [
        ([model.bias], 0.0),
        ([model.weight], 0.1),
    ]
    optimizer = build_optimizer(TypeAdapter(Optimizer).validate_python({"name": "sgd", "lr": 0.1}), groups)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.25]
    model.weight.requires_grad_(False)
    assert parameter_groups(model, 0.1, decay_norms=False, claimed=claimed)[0]["params"] == [model.bias]


def test_shared_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    groups = parameter_groups(model, 0.1, decay_norms=False)
    assert [len(group["params"]) for group in groups] == [1, 2]


def test_clipping() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for parameter, gradient in zip(model.parameters(), gradients(model, 0), strict=True):
        parameter.grad = gradient
    before = torch.cat([value.grad.flatten() for value in model.parameters()])
    assert clip_gradients(optimizer, 0.5).item() == pytest.approx(before.norm().item(), rel=1e-6)
    after = torch.cat([value.grad.flatten() for value in model.parameters()])
    assert torch.allclose(after, 0.5 * before / before.norm(), atol=1e-6)
    assert clip_gradients(optimizer, 10.0).item() == pytest.approx(0.5, rel=1e-5)
    assert torch.equal(after, torch.cat([value.grad.flatten() for value in model.parameters()]))


@pytest.mark.parametrize("name", ["adamw", "muon", "nag"])
def test_moments_are_handed_on(name: str) -> None:
    """A new optimizer over the same parameters goes on as the old one would have."""
    config = TypeAdapter(Optimizer).validate_python({"name": name, "lr": 0.1})
    model = network()
    old = build_optimizer(config, parameter_groups(model, 0.0, decay_norms=False))
    twin = copy.deepcopy(model)
    for step in range(STEPS):
        for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = gradient
        if step == 2:
            new = build_optimizer(config, parameter_groups(model, 0.0, decay_norms=False))
            keep_moments(old, new)
            old = new
        old.step()
    own = build_optimizer(config, parameter_groups(twin, 0.0, decay_norms=False))
    for step in range(STEPS):
        for parameter, gradient in zip(twin.parameters(), gradients(twin, step), strict=True):
            parameter.grad = gradient
        own.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
