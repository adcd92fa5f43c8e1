"""`ortho generate` with runs of Stable Diffusion: what they trained shows, and their data need not be there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_runs import write
from typer.testing import CliRunner

from ortho_cli.cli.app import app
from ortho_cli.recipe.train import load_train
from ortho_cli.training.run import train

pytest.importorskip("diffusers", reason="the networks are diffusers' own")

SECTIONS = {
    "task": "{name: text_to_image, validation_prompts: [a cat, a dog]}",
    "model": "{name: stable-diffusion, size: tiny}",
    "data": "{name: caption-folder, path: DATA, size: 16, batch: 2, held_out: 0.0}",
    "methods": "[{name: hra, rank: 2, targets: [sd15-control]}]",
    "optimizer": "{name: adamw, lr: 0.1}",
    "schedule": "{name: constant}",
    "train": "{epochs: 1, threads: 1, eval_every: 1000}",
    "run": "{dir: FOLDER, export: [peft]}",
}
FAST = ("--steps", 2, "-q")


def ortho(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


def pictures(folder: Path, *words: object) -> list[np.ndarray]:  # type: ignore[type-arg]
    code, out = ortho("generate", *words, "-o", folder, *FAST)
    assert code == 0, out
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose data has gone."""
    work = tmp_path_factory.mktemp("runs")
    for number in range(4):
        folder = work / "data"
        folder.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"noise {number}")
    sections = SECTIONS | {"data": SECTIONS["data"].replace("DATA", str(work / "data"))}
    train(load_train(write(work, "run", **sections)))
    shutil.rmtree(work / "data")
    return work / "run"


def test_a_run_draws_its_own_prompts_and_needs_no_data(run: Path, tmp_path: Path) -> None:
    found = pictures(tmp_path / "own", run)
    assert [picture.shape for picture in found] == [(16, 16, 3)] * 2
    head, *lines = [json.loads(line) for line in (tmp_path / "own" / "manifest.jsonl").read_text().splitlines()]
    assert (head["run"], head["checkpoint"]) == ("run", "step-000002")
    assert [line["prompt"] for line in lines] == ["a cat", "a dog"]
    again = pictures(tmp_path / "typed", run, "--prompt", "a cat")
    assert np.abs(again[0] - found[0]).max() <= 1


def test_what_was_trained_can_be_turned_down(run: Path, tmp_path: Path) -> None:
    full, half, none = (pictures(tmp_path / str(strength), run, "--strength", strength)[0] for strength in (1, 0.5, 0))
    assert np.abs(full - none).max() > 1
    assert min(np.abs(half - full).max(), np.abs(half - none).max()) > 0
    twice = pictures(tmp_path / "twice", run, "--adapter", run / "export" / "hra")[0]  # its own again, behind it
    assert np.abs(twice - full).max() > 1


def test_what_a_run_decides_is_refused(run: Path, tmp_path: Path) -> None:
    for words in (("--precision", "bf16"), ("--split", "val"), ("--control", "x.png")):
        code, out = ortho("generate", run, *words, "-o", tmp_path / "x")
        assert code == 2, out
    assert list(tmp_path.iterdir()) == []
