"""Schedules against torch's and transformers' own schedulers, step by step, and against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch.optim import lr_scheduler

from ortho_cli.recipe.optim import Schedule
from ortho_cli.training.schedule import build_schedule

TOTAL, EPOCH, WARMUP = 60, 12, 7


def made(**section: Any) -> list[float]:
    config = TypeAdapter(Schedule).validate_python(section)
    schedule = build_schedule(config, TOTAL, EPOCH)
    return [schedule(step) for step in range(TOTAL)]


def by_torch(make: Any, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, **options)
    found = []
    for _ in range(TOTAL):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("section", "make", "options"),
    [
        ({"name": "constant"}, lr_scheduler.ConstantLR, {"factor": 1.0}),
        ({"name": "linear"}, lr_scheduler.LinearLR, {"start_factor": 1.0, "end_factor": 0.0, "total_iters": TOTAL}),
        ({"name": "cosine"}, lr_scheduler.CosineAnnealingLR, {"T_max": TOTAL}),
        ({"name": "cosine", "floor": 0.1}, lr_scheduler.CosineAnnealingLR, {"T_max": TOTAL, "eta_min": 0.1}),
        ({"name": "multistep", "at": (2, 4), "factor": 0.2}, lr_scheduler.MultiStepLR,
         {"milestones": [2 * EPOCH, 4 * EPOCH], "gamma": 0.2}),
    ],
)  # fmt: skip
def test_without_warm_up_as_torch_has_them(section: dict[str, Any], make: Any, options: dict[str, Any]) -> None:
    assert made(**section) == pytest.approx(by_torch(make, **options), abs=1e-9)


def test_one_cycle_as_torch_has_it() -> None:
    """Theirs reaches the ends of both legs one step earlier: the same curve over TOTAL + 1 points."""
    options = {"max_lr": 1.0, "total_steps": TOTAL + 1, "pct_start": (0.3 * TOTAL + 1) / (TOTAL + 1)}
    theirs = by_torch(lr_scheduler.OneCycleLR, **options)
    assert made(name="one-cycle") == pytest.approx(theirs, abs=1e-9)


def test_with_warm_up_as_transformers_has_them() -> None:
    """Theirs begins at zero, so that its first step does nothing: ours rises from 1 / warmup, one step ahead."""
    optimization = pytest.importorskip("transformers.optimization")
    for name in ("linear", "cosine"):
        make = getattr(optimization, f"get_{name}_schedule_with_warmup")
        theirs = by_torch(make, num_warmup_steps=WARMUP, num_training_steps=TOTAL)
        mine = made(name=name, warmup=WARMUP)
        assert mine[WARMUP:] == pytest.approx(theirs[WARMUP:], abs=1e-9)
        assert mine[: WARMUP - 1] == pytest.approx(theirs[1:WARMUP], abs=1e-9)
    theirs = by_torch(optimization.get_inverse_sqrt_schedule, num_warmup_steps=WARMUP)
    assert made(name="inverse-sqrt", warmup=WARMUP)[:-1] == pytest.approx(theirs[1:], abs=1e-9)


def test_inverse_square_root() -> None:
    expected = [min((step + 1) / WARMUP, math.sqrt(WARMUP / (step + 1))) for step in range(TOTAL)]
    assert made(name="inverse-sqrt", warmup=WARMUP) == pytest.approx(expected)
    assert made(name="inverse-sqrt") == pytest.approx([1 / math.sqrt(step + 1) for step in range(TOTAL)])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "multistep", "inverse-sqrt", "one-cycle"])
def test_warm_up_of_each(name: str) -> None:
    """A share of all steps is the same as their number; it scales the schedule and leaves the rest alone."""
    at = {"at": (1,)} if name == "multistep" else {}
    by_count, by_share = made(name=name, warmup=6, **at), made(name=name, warmup_ratio=0.1, **at)
    assert by_count == by_share
    assert by_count[0] < by_count[3] < by_count[5]
    assert all(0 <= factor <= 1 for factor in by_count)
    assert by_count[0] <= 1 / 6 + 1e-12


def test_the_last_step_still_learns() -> None:
    for name in ("linear", "cosine", "one-cycle"):
        assert made(name=name)[-1] > 0
