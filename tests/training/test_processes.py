"""Two processes equal one with the same global batch, to float rounding; only one of them writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import LAUNCH, ortho, write

from ortho_cli.training.log import read_lines
from ortho_cli.training.state import checkpoint_steps, last_checkpoint, load_tensors

GROUP_NORM = "{name: resnet20, norm: group}"
VIT = "{name: vit-mini, patch: 4, depth: 2, heads: 2, dim: 32}"
METHODS = {
    "plain": ("[]", GROUP_NORM),
    "gor": ("[{name: gor, penalty: 1.0e-2}]", GROUP_NORM),
    "hra": ("[{name: hra, rank: 4, penalty: 1.0e-1, bias: all}]", VIT),
}
STEPS = 6
TOLERANCE = 1e-5


def sections(method: str) -> dict[str, str]:
    chosen, model = METHODS[method]
    return {
        "methods": chosen, "model": model, "optimizer": "{name: sgd, lr: 0.05, momentum: 0.9}",
        "train": f"{{steps: {STEPS}, accumulate: 2, clip: 1.0, ema: 0.5, eval_every_steps: 3, threads: 1}}",
        "data": "{name: digits, batch: 64, augment: [crop]}",
        "run": "{dir: FOLDER, save_every_steps: 3, keep: all, log_every: 2}",
    }  # fmt: skip


@pytest.mark.parametrize("method", ["hra", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gor", "plain"))])
def test_two_processes_equal_one(method: str, tmp_path: Path) -> None:
    """Losses, penalties, norms, evaluations and weights; gradients of penalties are averaged, not forgotten."""
    for name, processes in (("one", 1), ("two", 2)):
        done = ortho("train", str(write(tmp_path, name, **sections(method))), "--json", processes=processes)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["details"][0]["step"] == STEPS  # one object: the other process is silent
    one, two = (list(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("one", "two"))
    assert len(one) == len(two) == 3 + 2
    for mine, other in zip(one, two, strict=True):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            assert other[key] == pytest.approx(value, rel=1e-4, abs=TOLERANCE), key
        for exact in ("step", "epoch", "samples", "train/lr", "eval/accuracy"):
            assert mine.get(exact) == other.get(exact)
    for file in ("model", "ema", "optimizer"):
        found = []
        for name in ("one", "two"):
            folder = last_checkpoint(tmp_path / name)
            assert folder is not None
            found.append(load_tensors(folder / f"{file}.safetensors"))
        assert found[0].keys() == found[1].keys()
        for key, value in found[0].items():
            assert torch.allclose(value, found[1][key], atol=TOLERANCE, rtol=1e-4), key
    if method == "hra":
        assert (tmp_path / "two" / "export" / "hra" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    for name, lengths in (("whole", [STEPS]), ("parts", [4, STEPS])):
        path = write(tmp_path, name, **sections("gor"))
        for number, steps in enumerate(lengths):
            words = ["train", str(path), "-q", "--set", f"train.steps={steps}", "--set", "schedule={name: constant}"]
            done = ortho(*words, *(["--resume"] if number else []), processes=2)
            assert done.returncode == 0, done.stderr
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    lines = [[line for line in read_lines(run / "metrics.jsonl") if line["step"] != 4] for run in (whole, parts)]
    assert lines[0] == lines[1]
    for file in ("model", "ema", "optimizer"):
        name = f"checkpoints/step-{STEPS:06d}/{file}.safetensors"
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


@pytest.mark.slow
def test_a_stopped_launcher_leaves_a_state_to_go_on_from(tmp_path: Path) -> None:
    """What a cluster does to a job: all processes agree on the step, save once, and the run can be resumed."""
    steps = 60  # many seconds
    own = sections("plain")
    path = write(tmp_path, "run", **own | {"train": own["train"].replace(f"steps: {STEPS}", f"steps: {steps}")})
    process = subprocess.Popen(
        [sys.executable, *LAUNCH, "2", "-m", "ortho_cli", "train", str(path), "-q"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(1200):
        if process.poll() is not None or (metrics.exists() and len(metrics.read_bytes().splitlines()) > 2):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, talk = process.communicate(timeout=100)
    step = checkpoint_steps(tmp_path / "run")[-1]
    assert step < steps
    assert f"stopped at step {step} of {steps}" in talk, talk
    done = ortho("train", str(path), "-q", "--resume", processes=2)
    assert done.returncode == 0, done.stderr
    assert checkpoint_steps(tmp_path / "run")[-1] == steps


@pytest.mark.slow
@pytest.mark.parametrize("what", ["shapes", pytest.param("phases", marks=pytest.mark.slow)])
def test_shapes_and_phases_in_two_processes(what: str, tmp_path: Path) -> None:
    """A new wrapper when a method changed shapes, and only then; gradients of each phase are averaged."""
    script = Path(__file__).with_name("two_processes.py")
    results = []
    for name, processes in (("one", 1), ("two", 2)):
        folder = tmp_path / name
        folder.mkdir()
        start = [sys.executable, *LAUNCH, str(processes)] if processes > 1 else [sys.executable]
        done = subprocess.run([*start, str(script), what, str(folder)], capture_output=True, text=True,
                              env={**os.environ, "ACCELERATE_USE_CPU": "true"}, timeout=200)  # fmt: skip
        assert done.returncode == 0, done.stderr
        results += [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]
    alone, first, second = results
    assert first[2] == second[2] == (2 if what == "shapes" else 1)
    for own, mine, theirs in zip(alone[:2], first[:2], second[:2], strict=True):
        assert own.keys() == mine.keys() == theirs.keys()
        for key, value in own.items():
            assert torch.allclose(value, mine[key], atol=TOLERANCE), key
            assert torch.equal(mine[key], theirs[key]), key


@pytest.mark.slow
def test_what_one_process_refuses_all_refuse(tmp_path: Path) -> None:
    """The folder is looked at once, by one of them; what it writes meanwhile does not trip the other."""
    path = write(tmp_path, "run", train="{steps: 2}")
    first = ortho("train", str(path), "-q", processes=2)
    assert first.returncode == 0, first.stderr
    again = ortho("train", str(path), "--json", processes=2)
    assert again.returncode != 0
    assert json.loads(again.stdout)["error"]["exit_code"] == 6  # once, and whole
    assert "error in process 1: run folder exists" in again.stderr


def test_processes_that_do_not_know_of_each_other(tmp_path: Path) -> None:
    path = write(tmp_path, "run", train="{steps: 2}")
    done = ortho("train", str(path), "-q", WORLD_SIZE="2", ACCELERATE_USE_CPU="false", RANK="0")
    assert done.returncode == 2, done.stderr
    assert "each would train alone" in done.stderr
    assert not (tmp_path / "run").exists()
