"""What steps say between two lines of the log: exact means, the first bad step, and a state that survives JSON."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator

from ortho_cli.errors import NumericsError
from ortho_cli.training.window import Window


def window(*losses: float, **others: float) -> Window:
    made = Window(Accelerator(cpu=True))
    for step, loss in enumerate(losses, 1):
        made.add(
            step, {"train/loss": torch.tensor(loss), **{key: torch.tensor(value) for key, value in others.items()}}
        )
    return made


def test_means_are_over_steps_and_asked_for_once() -> None:
    asked = window(1.0, 2.0, 6.0)
    assert asked.means() == {"train/loss": 3.0}
    assert asked.means() == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_bad_step_is_named(bad: float) -> None:
    """Whether it is looked for at once or when the mean is taken; a step is looked at once."""
    for look in (Window.check, Window.means):
        with pytest.raises(NumericsError, match=f"train/loss is {bad} at step 2"):
            look(window(1.0, bad, 1.0, bad))
    fine = window(1.0)
    fine.check()
    fine.add(2, {"train/loss": torch.tensor(bad)})
    with pytest.raises(NumericsError, match="step 2"):
        fine.check()


def test_a_penalty_must_be_finite_and_a_norm_need_not() -> None:
    with pytest.raises(NumericsError, match="method/hra/penalty"):
        window(1.0, **{"method/hra/penalty": float("nan")}).check()
    assert window(1.0, **{"train/gradient_norm": float("inf")}).means()["train/gradient_norm"] == float("inf")


def test_its_state_survives_json_bit_for_bit() -> None:
    values = torch.rand(7, generator=torch.Generator().manual_seed(0)).tolist()
    whole, parts, resumed = window(*values), window(*values[:4]), Window(Accelerator(cpu=True))
    resumed.load_state(json.loads(json.dumps(parts.state())))
    for step, value in enumerate(values[4:], 5):
        resumed.add(step, {"train/loss": torch.tensor(value)})
    assert resumed.means() == whole.means()


def test_speed_leaves_pauses_out() -> None:
    import time

    paused = window(1.0)
    with paused.paused():
        time.sleep(0.3)
    assert paused.steps_per_second() > 1 / 0.3
