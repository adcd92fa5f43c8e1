"""NOG and OLR in training: before and after momentum, with every kind of decay, guarded, together, logged."""

from __future__ import annotations

import copy
import doctest
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ortho_cli as ortho
from ortho_cli.errors import TargetError
from ortho_cli.linalg import olr as olr_module
from ortho_cli.linalg.nog import nearest_orthogonal
from ortho_cli.methods import nog as nog_module
from ortho_cli.methods.method import Context
from ortho_cli.methods.nog import NOGMethod
from ortho_cli.methods.olr import OLRMethod
from ortho_cli.recipe.methods import NOG, OLR
from ortho_cli.training.optimizers import NAG, UncorrectedAdam

CONTEXT = Context(seed=0, total_steps=10, task="classify", base=None)
LR, DECAY = 0.03, 0.2


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(7, 4, bias=False).double()


def gradient(step: int) -> Tensor:
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def nog(model: nn.Module, **keys: Any) -> NOGMethod:
    made = NOGMethod(NOG(name="nog", targets=("**",), **keys))
    made.prepare(model, CONTEXT)
    return made


def test_the_public_names_and_their_examples() -> None:
    assert ortho.nog_ is nog_module.nog_ and ortho.olr is olr_module.olr
    for module in (nog_module, olr_module):
        tried = doctest.testmod(module)
        assert tried.attempted > 5 and not tried.failed


def test_in_place_and_guarded() -> None:
    weight = layer().weight
    with pytest.raises(TargetError, match=r"\(4, 7\) has no gradient") as caught:
        ortho.nog_(weight)
    assert "backward" in str(caught.value.hint)
    weight.grad = gradient(0)
    kept = weight.grad
    assert ortho.nog_(weight) is True and weight.grad is kept
    assert torch.allclose(kept, nearest_orthogonal(gradient(0)))
    kept[1, 2] = math.nan
    before = kept.clone()
    assert ortho.nog_(weight) is False
    assert torch.equal(kept.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients_stay_half(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(4, 7, dtype=dtype))
    weight.grad = gradient(0).to(dtype)
    expected = nearest_orthogonal(weight.grad).to(dtype)
    assert ortho.nog_(weight) and torch.equal(weight.grad, expected)


def test_channels_last_gradients_keep_their_layout() -> None:
    conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    conv(torch.randn(2, 3, 5, 5)).square().mean().backward()
    assert conv.weight.grad is not None
    conv.weight.grad = conv.weight.grad.to(memory_format=torch.channels_last)
    expected = nearest_orthogonal(conv.weight.grad.contiguous())
    ortho.nog_(conv.weight)
    assert torch.allclose(conv.weight.grad, expected, atol=1e-6)
    assert conv.weight.grad.is_contiguous(memory_format=torch.channels_last)


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, LR, momentum=0.9, weight_decay=DECAY),
    "nesterov": lambda p: torch.optim.SGD(p, LR, momentum=0.9, weight_decay=DECAY, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, LR, weight_decay=DECAY),
    "adamw": lambda p: torch.optim.AdamW(p, LR, weight_decay=DECAY),
    "muon": lambda p: torch.optim.Muon(p, LR, weight_decay=DECAY),
    "nag": lambda p: NAG(p, LR, weight_decay=DECAY),
    "uncorrected adam": lambda p: UncorrectedAdam(p, LR, weight_decay=DECAY),
}
COUPLED = {"sgd", "nesterov", "adam"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_before_momentum_the_optimizer_sees_the_nearest_orthogonal_gradient(name: str) -> None:
    model, reference = layer(), layer()
    own, theirs = (OPTIMIZERS[name](each.parameters()) for each in (model, reference))
    method = nog(model)
    for step in range(4):
        model.weight.grad, reference.weight.grad = gradient(step), nearest_orthogonal(gradient(step))
        method.after_backward(model, own, "train")
        own.step()
        method.after_step(model, own, step, "train")
        theirs.step()
    assert torch.equal(model.weight, reference.weight)
    assert method.scalars() == {"layers": 1.0, "skipped": 0.0}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_momentum_the_update_is_orthogonal_and_moments_are_the_optimizers(name: str) -> None:
    model, reference = layer(), layer()
    own, theirs = (OPTIMIZERS[name](each.parameters()) for each in (model, reference))
    method = nog(model, order="after")
    for step in range(4):
        with torch.no_grad():
            reference.weight.copy_(model.weight)  # the same weights before each step, own moments throughout
        before = model.weight.detach().clone()
        model.weight.grad, reference.weight.grad = gradient(step), gradient(step)
        method.after_backward(model, own, "train")
        own.step()
        method.after_step(model, own, step, "train")
        theirs.step()
        kept = before if name in COUPLED else (1 - LR * DECAY) * before
        update = nearest_orthogonal(reference.weight.detach() - kept)
        assert torch.allclose(model.weight, kept + LR * update, atol=1e-9 if name != "muon" else 1e-4)
        assert torch.linalg.svdvals(model.weight.detach() - kept).tolist() == pytest.approx([LR] * 4, rel=1e-9)
    for mine, other in zip(own.state.values(), theirs.state.values(), strict=True):
        for key in mine:
            assert torch.allclose(torch.as_tensor(mine[key]), torch.as_tensor(other[key]), atol=1e-4), key
    assert not own._optimizer_step_pre_hooks and not own._optimizer_step_post_hooks


def test_a_gradient_that_is_not_finite_is_left_to_the_optimizer() -> None:
    for order in ("before", "after"):
        model = nn.ModuleList([layer(), layer()])
        method, optimizer = nog(model, order=order), torch.optim.SGD(model.parameters(), LR)
        for index, each in enumerate(model):
            each.weight.grad = gradient(index)
        model[0].weight.grad[0, 0] = math.inf
        method.after_backward(model, optimizer, "train")
        optimizer.step()
        method.after_step(model, optimizer, 0, "train")
        assert model[0].weight[0, 0] == -math.inf and model[0].weight[1:].isfinite().all()
        assert torch.allclose(model[1].weight, layer().weight - LR * nearest_orthogonal(gradient(1)))
        assert method.scalars()["skipped"] == 1.0


@pytest.mark.parametrize("skip", [False, True])
def test_with_a_gradient_scaler_a_step_that_is_left_out_moves_nothing(skip: bool) -> None:
    model = layer().float()
    before = model.weight.detach().clone()
    method, optimizer = nog(model, order="after"), torch.optim.SGD(model.parameters(), LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((model.weight * (math.inf if skip else 2.0)).sum()).backward()
    scaler.unscale_(optimizer)
    method.after_backward(model, optimizer, "train")
    scaler.step(optimizer)
    method.after_step(model, optimizer, 0, "train")
    assert torch.equal(model.weight, before) is skip
    assert not optimizer._optimizer_step_pre_hooks


def test_only_what_the_phase_steps() -> None:
    model = nn.ModuleDict({"g": layer(), "d": layer()})
    method = nog(model)
    for each in model.values():
        each.weight.grad = gradient(0)
    method.after_backward(model, torch.optim.SGD(model["d"].parameters(), LR), "d")
    assert torch.equal(model["g"].weight.grad, gradient(0))
    assert torch.allclose(model["d"].weight.grad, nearest_orthogonal(gradient(0)))


def rates(model: nn.Module, **keys: Any) -> tuple[OLRMethod, torch.optim.Optimizer]:
    method = OLRMethod(OLR(name="olr", targets=("**",), **keys))
    method.prepare(model, CONTEXT)
    return method, torch.optim.SGD(method.param_groups(model), LR, momentum=0.9)


@pytest.mark.parametrize("first", [False, True])
def test_the_optimal_rate_is_of_the_gradient_that_nog_left(first: bool) -> None:
    model = layer()
    method, optimizer = rates(model)
    model.weight.grad = (0.1 * model.weight.detach() + gradient(0)).clone()
    if first:
        nog(model).after_backward(model, optimizer, "train")
    wanted = float(ortho.olr(model.weight, model.weight.grad))
    optimizer.param_groups[0]["lr"] = base = 2 * abs(wanted)
    before, step = model.weight.detach().clone(), model.weight.grad.clone()
    method.after_backward(model, optimizer, "train")
    optimizer.step()
    rate = wanted if wanted > 0 else base
    assert torch.allclose(model.weight, before - rate * step)
    assert method.scalars()["rate_mean"] == pytest.approx(rate / base)


def test_accepted_steps_are_counted_and_the_floor_holds() -> None:
    model = nn.ModuleList([layer(), layer(), layer()])
    method, optimizer = rates(model, floor=0.5)
    towards, away, slight = (each.weight.detach().clone() for each in model)
    model[0].weight.grad = 1e3 * towards  # 1/3 of 1e-3: below the floor
    model[1].weight.grad = -away
    model[2].weight.grad = slight / 3 / (0.8 * LR)  # eta = 0.8 of the base
    method.after_backward(model, optimizer, "train")
    assert [group["lr"] / LR for group in optimizer.param_groups] == pytest.approx([0.5, 1.0, 0.8])
    told = {"accepted": pytest.approx(2 / 3), "rate_mean": pytest.approx(2.3 / 3), "rate_min": pytest.approx(0.5)}
    assert method.scalars() == told
    restored, _ = rates(copy.deepcopy(model), floor=0.5)
    restored.load_state(method.state())
    assert restored.scalars() == told
    for group in optimizer.param_groups:
        group["lr"] = LR
    for each in model:
        each.weight.grad = torch.zeros_like(each.weight)
    method.after_backward(model, optimizer, "train")
    assert [group["lr"] for group in optimizer.param_groups] == [LR] * 3  # no rate is optimal: everyone's
    assert method.scalars()["accepted"] == pytest.approx(2 / 6)


def test_another_phase_leaves_the_rates_told() -> None:
    model = layer()
    method, optimizer = rates(model)
    model.weight.grad = model.weight.detach() / 3 / (0.5 * LR)
    method.after_backward(model, optimizer, "discriminator")
    method.after_backward(model, torch.optim.SGD(layer().parameters(), LR), "generator")
    assert method.scalars()["rate_mean"] == pytest.approx(0.5)
