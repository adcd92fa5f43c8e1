"""`ortho bench hra` compares layers that give the same numbers; how fast they are is its output, never a test."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from ortho_cli.cli.app import app
from ortho_cli.errors import NumericsError, UsageError
from ortho_cli.methods import hra_benchmark
from ortho_cli.methods.hra_benchmark import (
    FLOOR,
    LORA,
    LORA_WIDE,
    OUR_LORA,
    OURS,
    THEIR_HRA,
    Case,
    HRALayer,
    Step,
    measure_hra,
    summary,
)  # fmt: skip
from ortho_cli.methods.side_by_side import LEAST_ROUNDS, SLOW_ROUNDS, check_device, shuffled_rounds

pytest.importorskip("peft")

runner = CliRunner()
SMALL: dict[str, Any] = {"dims": (64,), "tokens": (96,), "ranks": (4,), "rounds": 4}


@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_kind_of_layer_is_timed(dtype: str, input_grad: bool) -> None:
    (case,) = measure_hra(**SMALL, dtype=dtype, input_grad=input_grad)
    wide = [LORA_WIDE] if dtype == "bf16" else []
    floor = [FLOOR] if input_grad else []  # without trained parameters and input gradient there is no backward
    assert list(case.steps) == [OURS, OUR_LORA, LORA, *wide, THEIR_HRA, *floor] and case.reference == LORA
    for name, step in case.steps.items():
        assert len(step.seconds) == (SLOW_ROUNDS if name == THEIR_HRA else 4)
        assert (step.kept_bytes > 0) == (name != FLOOR) and step.peak_bytes is None
    ratios = case.ratios()
    assert ratios[LORA] == pytest.approx(case.steps[OURS].median / case.steps[LORA].median)
    assert ratios["kept"] == pytest.approx(case.steps[OURS].kept_bytes / case.steps[LORA].kept_bytes)
    assert ratios["kept"] < (1.02 if input_grad else 1.2)
    assert case.steps[THEIR_HRA].kept_bytes > 3 * case.steps[OURS].kept_bytes


def test_what_is_kept_is_the_input_and_its_coordinates() -> None:
    (case,) = measure_hra((128,), (512,), (8,), rounds=1)
    assert case.steps[LORA].kept_bytes == 4 * 512 * (128 + 8)
    assert case.steps[OURS].kept_bytes == 4 * (512 * (128 + 8) + 8 * 8)


def test_sizes_come_in_order_and_are_summed_up() -> None:
    cases = list(measure_hra((32, 64), (16,), (2, 4), rounds=1))
    assert [(case.dim, case.rank) for case in cases] == [(32, 2), (32, 4), (64, 2), (64, 4)]
    steps = {name: Step(name, [seconds], 8) for name, seconds in ((OURS, 1.0), (OUR_LORA, 2.0), (LORA, 4.0))}
    other = {name: Step(name, [seconds], 8) for name, seconds in ((OURS, 3.0), (OUR_LORA, 2.0), (LORA, 4.0))}
    found = summary([Case(8, 8, 2, steps), Case(8, 8, 4, other)])
    assert found[LORA] == {"median": 0.5, "lowest": 0.25, "highest": 0.75}
    assert found["kept"] == {"median": 1.0, "lowest": 1.0, "highest": 1.0}


def test_a_layer_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(HRALayer):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(x) * 1.001

    monkeypatch.setattr(hra_benchmark, "HRALayer", Wrong)
    with pytest.raises(NumericsError, match="differ by"):
        list(measure_hra(**SMALL))


def test_without_peft_our_own_lora_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hra_benchmark, "find_spec", lambda name: None)
    (case,) = measure_hra(**SMALL)
    assert list(case.steps) == [OURS, OUR_LORA, FLOOR] and case.reference == OUR_LORA
    done = runner.invoke(app, ["bench", "hra", "--dims", "32", "--tokens", "16", "--ranks", "2", "--rounds", "1"])
    assert done.exit_code == 0 and "pip install peft" in done.stdout


def test_the_command_prints_a_table_or_json() -> None:
    sizes = ["--dims", "32,64", "--tokens", "16", "--ranks", "2", "--rounds", "1"]
    done = runner.invoke(app, ["bench", "hra", *sizes, "--no-input-grad", "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["ok"] is True and report["command"] == "bench hra"
    assert [(case["dim"], case["tokens"], case["rank"]) for case in report["details"]] == [(32, 16, 2), (64, 16, 2)]
    assert report["totals"].keys() == report["details"][0]["ratios"].keys() >= {LORA, THEIR_HRA, "kept"}
    assert report["input_grad"] is False and report["notes"] == []
    done = runner.invoke(app, ["bench", "hra", *sizes, "--dtype", "bf16"])
    assert done.exit_code == 0 and f"x {LORA_WIDE}" in done.stdout and "median" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--dims", "32,x"], ["--tokens", "0"], ["--ranks", "3"], ["--dims", "4"], ["--dtype", "fp8"]]
)
def test_sizes_that_cannot_be_are_usage_errors(arguments: list[str]) -> None:
    assert runner.invoke(app, ["bench", "hra", *arguments]).exit_code == 2


def test_rounds_end_when_time_is_up_and_slow_forms_stop_early() -> None:
    calls: list[str] = []
    forms = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    timed = shuffled_rounds(forms, 50, "cpu", limit=0.0, slow=("b",))
    assert {name: len(timing.seconds) for name, timing in timed.items()} == {"a": LEAST_ROUNDS, "b": SLOW_ROUNDS}
    assert calls.count("a") == LEAST_ROUNDS and list(timed) == ["a", "b"]
    assert timed["a"].as_dict().keys() == {"name", "median_seconds", "fastest_seconds", "seconds"}


def test_a_device_that_is_not_here_is_refused() -> None:
    for device in ("nowhere", "meta"):
        with pytest.raises(UsageError, match="is not here"):
            check_device(device)
    with pytest.raises(UsageError, match="is not here"):
        next(measure_hra(**SMALL, device="meta"))


def test_the_layers_share_one_frozen_weight() -> None:
    base = nn.Linear(16, 16).requires_grad_(False)
    for layer in hra_benchmark._layers(base, torch.randn(16, 2), "fp32").values():
        frozen = [p for p in layer.parameters() if not p.requires_grad]
        assert any(p is base.weight for p in frozen)
