"""What optimizers know of a weight when it becomes a core: images where there are any, else a whole new beginning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted import gap
from torch import Tensor, nn

import ortho_cli as ortho

BEGINNING: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-3),
    "centred rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, centered=True),
    "8 bits": lambda p: Coded(p, {}),
}


class Coded(torch.optim.Optimizer):
    """Momentum in 8 bits, a scale for each row: codes have the weight's shape, and are no averages."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            rows = parameter.grad.reshape(len(parameter), -1)
            if not state:
                state |= {
                    "step": 0,
                    "exp_avg": torch.full_like(rows, 127, dtype=torch.uint8),
                    "absmax": rows[:, :1] * 0,
                }
            moment = 0.9 * (state["exp_avg"].float() - 127) / 127 * state["absmax"] + rows
            state["step"] += 1
            state["absmax"] = moment.abs().amax(1, keepdim=True).clamp_min(1e-12)
            state["exp_avg"] = (moment / state["absmax"] * 127 + 127).round().to(torch.uint8)
            parameter.sub_(1e-2 * moment.view_as(parameter))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    inputs = torch.randn(32, 12, generator=torch.Generator().manual_seed(step))
    loss = (model(inputs) - inputs[:, :2]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", BEGINNING)
def test_state_without_an_image_begins_anew_as_a_whole(name: str) -> None:
    model = network()
    optimizer = BEGINNING[name](model.parameters())
    run = ortho.oialr(model, optimizer, when="step", delay=3, every=4, order="all", beta=0.3)
    losses = []
    for step in range(40):
        losses.append(stepped(model, optimizer, step))
        first, bias = model[0].weight if step < 2 else None, model[0].bias
        assert int(optimizer.state[bias]["step"]) == step + 1  # what keeps its shape goes on
        changed = run.step()
        assert changed == any(each.module.M not in optimizer.state for each in run.layers if each.converted)
        assert first is None or first in optimizer.state
    assert model[0].rank < 12 and losses[-1] < losses[0]
    if name == "rprop":
        fresh = [optimizer.state[each.module.M] for each in run.layers]
        assert all(bool((state["step_size"] > 0).all()) for state in fresh)


def test_averages_of_squared_steps_are_averages_of_squares() -> None:
    model = network()
    optimizer = torch.optim.Adadelta(model.parameters())
    run = ortho.oialr(model, optimizer, when="step", delay=3, every=2, order="all", beta=1e-6)
    for step in range(3):
        stepped(model, optimizer, step)
        before: Tensor = optimizer.state[model[0].weight]["acc_delta"] if step == 2 else torch.empty(0)
        run.step()
    layer = model[0]
    wanted = layer.U.mT.square() @ before @ layer.VT.mT.square()
    assert gap(optimizer.state[layer.M]["acc_delta"], wanted) < 1e-5
