"""Runs: a killed and resumed one equals an uninterrupted one bit for bit; folders, NaN, stop signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ortho_cli.errors import NumericsError, OutputError
from ortho_cli.recipe.train import load_train
from ortho_cli.training.run import train
from ortho_cli.training.state import checkpoint_steps, last_checkpoint

RECIPE = """
version: 1
task: {{name: classify}}
model: {{name: mlp, hidden: [32]}}
data: {{name: digits, batch: 64, augment: [crop]}}
methods: [{{name: gor, targets: linear, groups: 4, penalty: 1.0e-2}}]
optimizer: {{name: {optimizer}, lr: 1e-3}}
schedule: {{name: cosine, warmup: 5}}
train: {{epochs: 3, seed: 0, ema: 0.9, accumulate: 2, clip: 1.0, threads: 1}}
run: {{dir: {folder}, save_every_steps: 7, keep: all, log_every: 5}}
"""


def write(folder: Path, name: str, optimizer: str = "adamw", **changes: str) -> Path:
    path = folder / f"{name}.yaml"
    text = RECIPE.format(folder=folder / name, optimizer=optimizer)
    for old, new in changes.items():
        text = text.replace(old, new)
    path.write_text(text)
    return path


def assert_same_runs(first: Path, second: Path) -> None:
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    a, b = last_checkpoint(first), last_checkpoint(second)
    assert a is not None and b is not None and a.name == b.name
    for name in ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "nag", "adam", "muon"])
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    whole = write(tmp_path, "whole", optimizer)
    train(load_train(str(whole)))
    broken = write(tmp_path, "broken", optimizer)
    steps = {"adamw": (5, 9, 40), "sgd": (23,), "nag": (8,), "adam": (30,), "muon": (14,)}[optimizer]
    for stop in steps:
        _die_at(broken, stop)
    train(load_train(str(broken)), resume=last_checkpoint(tmp_path / "broken") is not None, force=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")


def _die_at(recipe: Path, step: int) -> None:
    """Train in another process that kills itself, without warning, after a step."""
    script = (
        "import os, signal, sys\n"
        "from ortho_cli.recipe.train import load_train\n"
        "from ortho_cli.training import loop\n"
        "from ortho_cli.training.run import train\n"
        "from ortho_cli.training.state import last_checkpoint\n"
        "plain, stop = loop._step, int(sys.argv[2])\n"
        "def step(session, counters, *rest):\n"
        "    if counters.step == stop: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    plain(session, counters, *rest)\n"
        "loop._step = step\n"
        "recipe = load_train(sys.argv[1])\n"
        "from pathlib import Path\n"
        "resume = last_checkpoint(Path(recipe.run.dir)) is not None\n"
        "train(recipe, resume=resume, force=not resume)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(recipe), str(step)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_folder_is_not_used_twice_unasked(tmp_path: Path) -> None:
    recipe = load_train(str(write(tmp_path, "run")), ["train.epochs=1"])
    train(recipe)
    with pytest.raises(OutputError, match="run folder exists") as caught:
        train(recipe)
    assert "--resume" in str(caught.value.hint)
    changed = load_train(str(tmp_path / "run.yaml"), ["train.epochs=1", "optimizer.lr=1.0"])
    with pytest.raises(OutputError, match=r"optimizer\.lr"):
        train(changed, resume=True)
    with pytest.raises(OutputError, match="no complete checkpoint"):
        train(load_train(str(write(tmp_path, "other"))), resume=True)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    recipe = load_train(
        str(write(tmp_path, "nan", "sgd")), ["optimizer.lr=1e30", "train.clip=null", "schedule.warmup=0"]
    )
    with pytest.raises(NumericsError, match="not finite at step"):
        train(recipe)


def test_longer_training_may_be_resumed(tmp_path: Path) -> None:
    path = write(tmp_path, "run")
    train(load_train(str(path), ["train.epochs=1"]))
    outcome = train(load_train(str(path), ["train.epochs=2"]), resume=True)
    assert outcome.step == 2 * checkpoint_steps(tmp_path / "run")[2 - 1] or outcome.step == 44


def test_sigterm_saves_and_stops(tmp_path: Path) -> None:
    path = write(tmp_path, "run")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ortho_cli", "train", str(path), "--set", "train.epochs=2000", "-q"],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130, talk
    assert "--resume" in talk
    saved = last_checkpoint(tmp_path / "run")
    assert saved is not None and json.loads((saved / "state.json").read_text())["step"] > 0
