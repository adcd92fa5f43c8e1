"""DreamBooth runs at tiny width: class pictures, resume, processes, and samples judged by small networks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from training_runs import LAUNCH, assert_same_runs, die_at, lines_of, write

from ortho_cli.errors import OutputError, RecipeError
from ortho_cli.models.stable_diffusion_files import random_parts
from ortho_cli.recipe.data_subject import SubjectPictures
from ortho_cli.recipe.train import load_train
from ortho_cli.tasks.subject_data import load_subject
from ortho_cli.training.dry_run import describe
from ortho_cli.training.evaluate import evaluate_run
from ortho_cli.training.evaluate_subject import SubjectJudge
from ortho_cli.training.run import train
from ortho_cli.training.session import open_session
from ortho_cli.training.state import load_tensors

# diffusers' DPM-Solver hands tensors to numpy in a way that numpy 2 will end.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
TASK = "{name: dreambooth, subject: cat, prompt: 3, class_pictures: 3, class_folder: CLASSES, samples: 2, steps: 2%s}"
SECTIONS = {
    "model": "{name: stable-diffusion, size: tiny}",
    "data": "{name: skimage-cat, batch: 2, size: 32}",
    "methods": "[{name: hra, rank: 2, targets: ['unet.**.attn*.**']}]",
    "optimizer": "{name: adamw, lr: 1e-2, weight_decay: 0.0}",
    "schedule": "{name: constant}",
    "train": "{steps: 4, threads: 1}",
    "run": "{dir: FOLDER, save_every_steps: 2, samples_every_steps: 2, log_every: 1, keep: all}",
}


def recipe(folder: Path, name: str, extra: str = "", **sections: str) -> Path:
    task = (TASK % extra).replace("CLASSES", str(folder / "classes"))
    return write(folder, name, **{"task": task, **SECTIONS, **sections})


def test_killed_and_resumed_bit_for_bit_with_the_class_pictures_that_were_drawn_once(tmp_path: Path) -> None:
    train(load_train(recipe(tmp_path, "whole")))
    drawn = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "classes" / "cat").iterdir()}
    assert sorted(drawn) == ["000000.png", "000001.png", "000002.png", "manifest.jsonl"]
    broken = recipe(tmp_path, "broken")
    die_at(broken, 4)
    train(load_train(broken), resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")
    assert drawn == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "classes" / "cat").iterdir()}
    assert len(lines_of(tmp_path / "whole", "train/prior")) == 4
    first, last = (tmp_path / "whole" / "samples" / f"step-{step:06d}" / "000003_0.png" for step in (2, 4))
    assert first.read_bytes() != last.read_bytes()


def test_the_loss_on_the_subject_falls(tmp_path: Path) -> None:
    path = recipe(tmp_path, "run", ", prior: 0.0", train="{steps: 60, threads: 1, eval_every_steps: 60}",
                  methods="[]", run="{dir: FOLDER}", data="{name: skimage-cat, batch: 4, size: 32}")  # fmt: skip
    session = open_session(load_train(path))
    before = session.task.evaluate(session.model, session.task.batches("eval", 0, batch=4))["loss"]
    assert train(load_train(path)).metrics["eval/loss"] < 0.95 * before


def test_everything_random_belongs_to_the_sample(tmp_path: Path) -> None:
    session = open_session(load_train(recipe(tmp_path, "run")))
    whole = next(session.task.batches("train", 1, batch=2))
    halves = [next(session.task.batches("train", 1, batch=2, rank=rank, world=2)) for rank in range(2)]
    assert whole.keys() == {"index"} | session.task.example(2).keys()
    for name, value in whole.items():
        assert torch.equal(torch.cat([half[name] for half in halves]), value)
    assert not torch.equal(whole["noise"], whole["class_noise"])


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    alone, both = (recipe(tmp_path, name, run="{dir: FOLDER, save_every_steps: 4}") for name in ("alone", "both"))
    train(load_train(alone))
    command = [sys.executable, *LAUNCH, "2", "-m", "ortho_cli", "train", str(both), "--quiet"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        load_tensors(tmp_path / name / "checkpoints" / "step-000004" / "model.safetensors")
        for name in ("alone", "both")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-4, atol=2e-5)


def test_class_pictures_drawn_otherwise_are_refused_and_those_of_ones_own_taken(tmp_path: Path) -> None:
    open_session(load_train(recipe(tmp_path, "run")))
    with pytest.raises(OutputError, match=r"guidance was 7\.5, now 2\.0"):
        open_session(load_train(recipe(tmp_path, "other", ", guidance: 2.0")))
    with pytest.raises(OutputError, match="weights was"):  # by another model of the same name
        open_session(load_train(recipe(tmp_path, "other"), ["train.seed=1"]))
    (tmp_path / "classes" / "cat" / "000001.png").write_bytes(b"no picture")
    with pytest.raises(RecipeError, match="no picture that Pillow can read") as caught:
        open_session(load_train(recipe(tmp_path, "run")))
    assert str(caught.value.where).endswith("000001.png")
    own = tmp_path / "own" / "classes" / "cat"
    own.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (40, 32), (number, 0, 0)).save(own / f"{number:06d}.png")
    session = open_session(load_train(recipe(tmp_path / "own", "run")))
    (own / "000001.png").unlink()
    with pytest.raises(OutputError, match=r"lacks 1 of 3 class pictures, first 000001\.png"):  # as on another machine
        next(session.task.batches("train", 0, batch=2))
    with pytest.raises(OutputError, match="holds 2 of 3 class pictures"):
        open_session(load_train(recipe(tmp_path / "own", "run")))


def test_pictures_of_a_subject_are_found_in_its_folder_and_broken_ones_told(tmp_path: Path) -> None:
    for name, suffix in (("00", "jpg"), ("01", "jpeg"), ("02", "PNG")):
        (tmp_path / "dataset" / "dog").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32)).save(tmp_path / "dataset" / "dog" / f"{name}.{suffix}")
    config = SubjectPictures(name="dreambooth", path=str(tmp_path))
    assert len(load_subject(config, "dog")) == 3
    with pytest.raises(RecipeError, match="no folder"):
        load_subject(config, "cat")
    (tmp_path / "dataset" / "dog" / "03.png").write_bytes(b"no picture")
    with pytest.raises(RecipeError, match="no picture that Pillow can read"):
        load_subject(config, "dog")


@pytest.mark.parametrize(("key", "reason"), [
    ("subject: kat", "did you mean 'cat'"), ("subject: cat, class_name: cat", "found both"),
    ("token: x", "found neither"), ("subject: cat, live: true", "goes with class_name"),
])  # fmt: skip
def test_a_subject_is_of_the_protocol_or_its_class_is_told(tmp_path: Path, key: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        load_train(write(tmp_path, "run", **{"task": f"{{name: dreambooth, {key}}}", **SECTIONS}))


def test_the_epoch_is_chosen_by_half_of_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 32, "patch_size": 16}
    transformers.ViTModel(transformers.ViTConfig(**small, **sizes)).save_pretrained(tmp_path / "vit")
    tokenizer = random_parts("tiny").tokenizer
    text = {**small, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPConfig(text_config=text, vision_config={**small, **sizes}, projection_dim=6)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    train(load_train(recipe(tmp_path, "run")))
    clip = {"model": str(tmp_path / "clip")}
    settings = {"dino": {"model": str(tmp_path / "vit")}, "clip-i": clip, "clip-t": clip}
    monkeypatch.setattr(SubjectJudge, "settings", settings)
    found = evaluate_run(tmp_path / "run")
    assert {"loss", "dino", "clip_i", "clip_t"} <= set(found.metrics)
    assert set(found.data["as_published"]) == {"step", "dino", "clip_i", "clip_t"}
    assert any("chosen by pictures that are not reported" in note for note in found.notes)


def test_full_size_counts(tmp_path: Path) -> None:
    """128 layers and 795,648 parameters at rank 8: facts of HRA's paper."""
    sections = {
        "model": "{name: stable-diffusion}", "methods": "[{name: hra, rank: 8, targets: [sd15-attention]}]",
        "data": "{name: skimage-cat, size: 64}",
    }  # fmt: skip
    path = recipe(tmp_path, "run", **sections)
    with pytest.raises(RecipeError, match=r"data\.size 96 is no multiple of 64") as caught:
        describe(load_train(path, ["data.size=96"]))
    assert caught.value.hint == "data.size: 128"
    plan = describe(load_train(path))
    assert (plan["totals"]["trainable"], plan["details"][0]["layers"]) == (795_648, 128)
