"""The way of HRA's own README, as README shows it: add, train with a control, generate, evaluate, convert.

Commands run as they are typed, on a Stable Diffusion with all its names and little else.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_sd import save_pipeline
from typer.testing import CliRunner

from ortho_cli.checkpoints.adapters import read_adapter
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.cli.app import app
from ortho_cli.recipe.train import load_train
from ortho_cli.surgery.convert import convert

pytest.importorskip("diffusers", reason="the networks are diffusers' own")
pytest.importorskip("cv2", reason="canny edges are OpenCV's")

RECIPE = """
version: 1
task: {name: control}
model: {name: stable-diffusion, base: v1-5-hra.safetensors, config: sd15}
data: {name: skimage-hints, hint: canny, size: 64, batch: 2}
methods:
  - {name: hra}
optimizer: {name: adamw, lr: 1e-2}
train: {steps: 4, threads: 1, eval_every_steps: 4}
run: {dir: runs/canny, log_every: 1, export: [kohya-lora, merged-ldm]}
"""
SMALL = "--steps 2 --seed 1"  # for the test alone

# What README shows; {SMALL} is not.
ADD = "add-hra v1-5.safetensors -o v1-5-hra.safetensors --rank 2"
TRAIN = "train control.yaml"
GENERATE = f"generate runs/canny --split val --reference real -o drawn {SMALL}"
EVALUATE = "evaluate --generated drawn --reference real --metrics canny -o scores"
CONVERT = "convert runs/canny/export/hra --to kohya-lora --base v1-5-hra.safetensors -o canny-lora.safetensors"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walkthrough")
    save_pipeline(folder / "sd15")
    convert(folder / "sd15", folder / "v1-5.safetensors", "ldm")
    (folder / "control.yaml").write_text(RECIPE)
    return folder


def ortho(command: str) -> str:
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output
    return result.output


def test_the_whole_way(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    ortho(ADD)
    base = open_checkpoint("v1-5-hra.safetensors")
    assert sum(name.endswith(".hra_u") for name in base.tensors) == 144
    ortho(TRAIN)
    adapter = read_adapter("runs/canny/export/hra")
    assert len(adapter.layers) == 144
    assert any(name.startswith("control_model.") for name in adapter.replacements)
    ortho(GENERATE)
    drawn = sorted(path.name for path in (work / "drawn").glob("*.png"))
    assert drawn == [f"{number:06d}_0.png" for number in range(len(drawn))]
    assert sorted(path.name for path in (work / "real").iterdir()) == [f"{name[:6]}.png" for name in drawn]
    ortho(EVALUATE)
    scores = json.loads((work / "scores" / "evaluation.json").read_text())
    assert 0 <= scores["metrics"]["canny_f1"] <= 1
    ortho(CONVERT)
    assert read_adapter("canny-lora.safetensors").kind == "lora"
    found, exported = load_file("canny-lora.safetensors"), load_file("runs/canny/export/kohya-lora.safetensors")
    assert found.keys() == exported.keys()
    assert all(torch.equal(found[name], exported[name]) for name in found)


def test_a_run_that_went_on_with_the_bases_adapter_resumes_by_its_own_recipe(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came with the adapter, such as its rank, stands in the recipe only where it was given."""
    monkeypatch.chdir(work)
    (method,) = load_train("runs/canny/recipe.yaml").methods
    assert not {"rank", "targets", "side"} & method.model_fields_set
    ortho("train runs/canny/recipe.yaml --resume --set run.export=[merged-ldm,merged-diffusers,diffusers-lora,peft]")
    exports = work / "runs" / "canny" / "export"
    assert not any(name.startswith("control_model") for name in open_checkpoint(exports / "merged-diffusers").tensors)
    told = json.loads((work / "runs" / "canny" / "outcome.json").read_text())["notes"]
    assert sum("the hint encoder (control_model.*) is left out" in note for note in told) == 3


def test_the_merged_file_draws_to_hints_as_the_run_does(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint encoder is inside it, under the names of the published checkpoints."""
    monkeypatch.chdir(work)
    words = f"--prompt 'a cat' --size 64 {SMALL}"
    hint = "--control real/000000.png --control-type canny"
    merged = "runs/canny/export/merged-ldm.safetensors --config sd15"
    ortho(f"generate runs/canny {words} {hint} -o run-hint")
    ortho(f"generate {merged} {words} {hint} -o file-hint")
    ortho(f"generate v1-5.safetensors --config sd15 --adapter runs/canny/export/hra {words} {hint} -o adapter-hint")
    ortho(f"generate runs/canny {words} -o run-plain")
    assert apart("run-hint", "file-hint") <= 1
    assert apart("run-hint", "adapter-hint") <= 1
    assert apart("run-hint", "run-plain") > 1


def apart(first: str, second: str) -> int:
    pixels = [np.asarray(Image.open(f"{folder}/000000_0.png")).astype(int) for folder in (first, second)]
    return int(np.abs(pixels[0] - pixels[1]).max())
