"""What the tests of runs start from: a small recipe, a way to die in the middle, and what makes two runs the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from ortho_cli.training.log import read_lines
from ortho_cli.training.state import last_checkpoint

__all__ = ["LAUNCH", "assert_same_runs", "die_at", "lines_of", "ortho", "write"]

# 22 steps an epoch; saves at 7, 14, 21 ... fall between epochs and between lines of the log.
RECIPE: dict[str, str] = {
    "task": "{name: classify}",
    "model": "{name: mlp, hidden: [32]}",
    "data": "{name: digits, batch: 64, augment: [crop]}",
    "methods": "[{name: gor, targets: linear, groups: 4, penalty: 1.0e-2}]",
    "optimizer": "{name: adamw, lr: 1e-3}",
    "schedule": "{name: cosine, warmup: 5}",
    "train": "{epochs: 3, seed: 0, ema: 0.9, accumulate: 2, clip: 1.0, threads: 1}",
    "run": "{dir: FOLDER, save_every_steps: 7, keep: all, log_every: 5, best: {metric: eval/accuracy}}",
}


def write(folder: Path, name: str, **sections: str) -> Path:
    """A recipe file whose run goes to `folder/name`; sections replace those above, FOLDER stands for that place."""
    path = folder / f"{name}.yaml"
    lines = [f"{key}: {value}\n" for key, value in {**RECIPE, **sections}.items()]
    path.write_text("version: 1\n" + "".join(lines).replace("FOLDER", str(folder / name)), "utf-8")
    return path


LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")  # torchrun

DIE = """
import os, signal, sys
from pathlib import Path
from ortho_cli.training import loop
from ortho_cli.training.cells import run_recipe
from ortho_cli.recipe.train import load_train
plain, stop = loop._step, int(sys.argv[2])
steps = 0
def step(*arguments):
    global steps
    steps += 1
    if steps == stop: os.kill(os.getpid(), signal.SIGKILL)
    return plain(*arguments)
loop._step = step
run_recipe(sys.argv[1], resume=(Path(load_train(sys.argv[1]).run.dir) / "recipe.yaml").is_file())
"""


def die_at(recipe: Path, step: int) -> None:
    """Train (or go on) in another process that is killed, without warning, in the `step`-th step it does."""
    done = subprocess.run([sys.executable, "-c", DIE, str(recipe), str(step)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def assert_same_runs(first: Path, second: Path) -> None:
    """Metrics and every file of the kept states are equal, bit for bit."""
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (first, second)]
    assert names[0] == names[1]
    last = last_checkpoint(first)
    assert last is not None
    for folder in {last.name, *names[0][:1]}:  # the newest, and `best` where there is one
        for file in (first / "checkpoints" / folder).iterdir():
            other = second / "checkpoints" / folder / file.name
            assert file.read_bytes() == other.read_bytes(), f"{folder}/{file.name}"


def lines_of(run: Path, key: str) -> list[float]:
    """The values of a metric, in order."""
    return [line[key] for line in read_lines(run / "metrics.jsonl") if key in line]


def ortho(*words: str, processes: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    """`ortho WORDS` in another process, or in several that know each other."""
    start = [sys.executable, *LAUNCH, str(processes)] if processes > 1 else [sys.executable]
    own = {**os.environ, "ACCELERATE_USE_CPU": "true", **environment}
    return subprocess.run([*start, "-m", "ortho_cli", *words], env=own, capture_output=True, text=True, timeout=280)
