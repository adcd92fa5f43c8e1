"""Runs: their folder, what they keep and leave, losses that are not finite, signals that stop them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import lines_of, ortho, write

from ortho_cli.errors import NumericsError, OutputError, RecipeError, TargetError, UsageError
from ortho_cli.recipe.train import load_train
from ortho_cli.training.run import Interrupted, train
from ortho_cli.training.state import checkpoint_steps, load_tensors

EXPLODES = {
    "optimizer": "{name: sgd, lr: 1e30}", "schedule": "{name: constant}", "methods": "[]",
    "train": "{epochs: 1, eval_every_steps: 1}",
}  # fmt: skip


def test_a_folder_is_not_used_twice_unasked(tmp_path: Path) -> None:
    recipe = load_train(write(tmp_path, "run"), ["train.epochs=1"])
    train(recipe)
    with pytest.raises(OutputError, match="run folder exists") as caught:
        train(recipe)
    assert "--resume" in str(caught.value.hint)
    mine = tmp_path / "run" / "notes.txt"
    mine.write_text("kept")
    other = load_train(tmp_path / "run.yaml", ["train.epochs=1", "train.seed=1"])
    assert train(other, force=True).step == 22
    assert mine.read_text() == "kept"  # --force removes what runs write, and nothing else
    assert len(lines_of(tmp_path / "run", "train/loss")) == 5


def test_a_refused_recipe_leaves_an_earlier_run_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "run")
    train(load_train(path, ["train.epochs=1"]))
    with pytest.raises(TargetError):
        train(load_train(path, ["methods.gor.targets=[nothing.*]"]), force=True)
    assert checkpoint_steps(tmp_path / "run")


def test_a_run_leaves_its_outcome(tmp_path: Path) -> None:
    outcome = train(load_train(write(tmp_path, "run"), ["train.epochs=1"]))
    written = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert written == vars(outcome)
    assert written["step"] == 22
    assert written["parameters"] == written["trainable"] == 64 * 32 + 32 + 32 * 10 + 10
    assert written["best"] == written["metrics"]["eval/accuracy"]
    timing = (tmp_path / "run" / "timing.jsonl").read_text().splitlines()
    assert json.loads(timing[-1])["steps_per_second"] > 0
    assert json.loads(timing[-1])["step"] == 22


def test_keep(tmp_path: Path) -> None:
    train(load_train(write(tmp_path, "run"), ["run.keep=2"]))
    assert checkpoint_steps(tmp_path / "run") == [63, 66]
    assert (tmp_path / "run" / "checkpoints" / "best" / "state.json").is_file()


@pytest.mark.parametrize("saves", [1, 7])
def test_a_loss_that_is_not_finite_ends_the_run(saves: int, tmp_path: Path) -> None:
    """The first update ruins the weights: no state after it is kept, as a step's or as the best."""
    run = f"{{dir: FOLDER, save_every_steps: {saves}, log_every: 100, best: {{metric: eval/accuracy}}}}"
    recipe = load_train(write(tmp_path, "run", **EXPLODES, run=run))
    with pytest.raises(NumericsError, match=r"step [12] .*no checkpoint was saved before it") as caught:
        train(recipe)
    assert "optimizer.lr" in str(caught.value.hint)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_step_and_the_last_good_state_are_named(tmp_path: Path) -> None:
    """Step 9 has a loss of nothing but nan; logs are due at 20, saves at 4, 8, 12."""
    sections = {"run": "{dir: FOLDER, save_every_steps: 4, log_every: 20, keep: all}", "train": "{steps: 30}"}
    script = (
        "import sys\n"
        "from ortho_cli.cli.app import main\n"
        "from ortho_cli.training import loop\n"
        "plain = loop._step\n"
        "def step(session, number, parts):\n"
        "    if number == 8: parts[0]['image'].fill_(float('nan'))\n"
        "    return plain(session, number, parts)\n"
        "loop._step = step\n"
        "main()\n"
    )
    words = ["train", str(write(tmp_path, "run", **sections)), "-q"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert "train/loss is nan at step 9" in done.stderr
    assert "last good checkpoint" in done.stderr and "step-000008" in done.stderr
    assert checkpoint_steps(tmp_path / "run") == [4, 8]
    again = ortho("train", str(tmp_path / "run.yaml"), "--resume", "--set", "run.save_every_steps=15", "-q")
    assert again.returncode == 0, again.stderr
    assert checkpoint_steps(tmp_path / "run") == [4, 8, 15, 30]


def test_metrics_hold_no_numbers_that_json_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ortho_cli.methods.gor import GORMethod

    monkeypatch.setattr(GORMethod, "scalars", lambda self: {"condition": float("inf")})
    outcome = train(load_train(write(tmp_path, "run"), ["train.epochs=1"]))
    assert outcome.metrics["method/gor/condition"] is None
    assert "Infinity" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_exports_and_bases_are_averages_where_the_run_averages(tmp_path: Path) -> None:
    """What was judged is what is handed on."""
    train(load_train(write(tmp_path, "base", methods="[]", train="{epochs: 1, ema: 0.5}")))
    saved = tmp_path / "base" / "checkpoints" / "best"
    model, averaged = (load_tensors(saved / f"{name}.safetensors") for name in ("model", "ema"))
    assert any(not torch.equal(model[name], averaged[name]) for name in averaged)
    methods = "[{name: hra, rank: 2, targets: ['layers.0']}]"
    name = next(name for name in averaged if name.endswith("weight"))
    hra = write(tmp_path, "hra", methods=methods.replace("layers.0", name.removesuffix(".weight")),
                model=f"{{name: mlp, hidden: [32], base: {tmp_path / 'base'}}}")  # fmt: skip
    train(load_train(hra, ["train.epochs=1", "train.ema=0.5"]))
    last = tmp_path / "hra" / "checkpoints" / "step-000022"
    kept = load_tensors(last / "model.safetensors")
    layer = name.removesuffix(".weight")
    assert torch.equal(kept[f"{layer}.fixed_linear.weight"], averaged[name])
    exported = load_tensors(tmp_path / "hra" / "export" / "hra" / "adapter_model.safetensors")
    vectors = load_tensors(last / "ema.safetensors")[f"{layer}.hra_u"]
    assert torch.equal(next(iter(exported.values())), vectors)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ("train.precision=fp16", RecipeError, "fp16 needs a GPU"),
        ("run.trackers=[clearml]", UsageError, "clearml is not installed"),
        ("run.best.metric=eval/acuracy", RecipeError, "eval/acuracy is not evaluated"),
    ],
)
def test_what_cannot_be_done_is_said(change: str, kind: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message) as caught:
        train(load_train(write(tmp_path, "run"), ["train.epochs=1", change]))
    assert getattr(caught.value, "hint", None)


def test_bf16(tmp_path: Path) -> None:
    """Products in bf16, weights in fp32; not the same numbers, but the same training."""
    path = write(tmp_path, "plain", methods="[]", train="{epochs: 3}")
    full = train(load_train(path))
    half = train(load_train(path, ["train.precision=bf16", f"run.dir={tmp_path / 'half'}"]))
    assert full.metrics["train/loss"] != half.metrics["train/loss"]
    assert half.metrics["train/loss"] == pytest.approx(full.metrics["train/loss"], rel=0.05)
    saved = load_tensors(tmp_path / "half" / "checkpoints" / "best" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number: int, tmp_path: Path) -> None:
    path = write(tmp_path, "run")
    process = subprocess.Popen(
        [sys.executable, "-m", "ortho_cli", "train", str(path), "--set", "train.epochs=2000", "-q"],
        env={**os.environ, "PYTHONUNBUFFERED": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130, talk
    assert "--resume" in talk
    steps = checkpoint_steps(tmp_path / "run")
    assert steps
    assert f"stopped at step {steps[-1]} of" in talk


def test_a_signal_is_announced_between_steps_and_not_by_its_handler(tmp_path: Path) -> None:
    """A handler may run in the middle of anything, such as the import that the announcement itself needs."""
    events: list[str] = []

    class Finger:
        def total(self, steps: int, done: int) -> None: ...

        def timing(self, counters: Any, values: dict[str, float]) -> None: ...

        def metrics(self, counters: Any, values: dict[str, float]) -> None:
            if not events:
                signal.raise_signal(signal.SIGTERM)
                events.append("pressed")

        def stopping(self) -> None:
            events.append("announced")
            assert not checkpoint_steps(tmp_path / "run")

    with pytest.raises(Interrupted, match="the state is saved"):
        train(load_train(write(tmp_path, "run")), observer=Finger())
    assert events == ["pressed", "announced"]
    assert checkpoint_steps(tmp_path / "run")
