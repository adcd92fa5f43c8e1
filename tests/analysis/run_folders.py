"""Runs to read: tiny real ones, and folders written by hand with numbers that are known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ortho_cli.recipe.train import load_train, resolved_yaml
from ortho_cli.training.run import train

RECIPE = """
version: 1
task: {name: classify}
model: {name: mlp, hidden: [16]}
data: {name: digits, batch: 128}
methods: []
optimizer: {name: adamw, lr: 1e-2}
train: {epochs: 2, seed: 0, threads: 1}
run: {dir: FOLDER, log_every: 4, best: {metric: eval/accuracy}}
"""


def write_recipe(folder: Path, *sets: str) -> Path:
    """The recipe above, as a file."""
    path = folder.with_name(f"{folder.name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RECIPE.replace("FOLDER", json.dumps(str(folder))), "utf-8")
    return path


def real_run(folder: Path, *sets: str) -> Path:
    """Train for two epochs, a tenth of a second each."""
    train(load_train(write_recipe(folder), sets))
    return folder


def written_run(
    folder: Path, metrics: Mapping[str, Sequence[tuple[int, float]]], *sets: str, finished: bool = True
) -> Path:
    """A run's folder with given numbers: `{name: [(step, value), ...]}`."""
    folder.mkdir(parents=True)
    recipe = load_train(write_recipe(folder), [*sets, f"run.dir={json.dumps(str(folder))}"])
    (folder / "recipe.yaml").write_text(resolved_yaml(recipe), "utf-8")
    lines = [
        {"step": step, "epoch": 0, "samples": step, name: value}
        for name, points in metrics.items()
        for step, value in points
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    if finished:
        last = {name: points[-1][1] for name, points in metrics.items()}
        outcome = {"step": 10, "metrics": last, "parameters": 300, "trainable": 100, "seconds": 1.5, "notes": []}
        (folder / "outcome.json").write_text(json.dumps(outcome), "utf-8")
    return folder
