"""Runs of tiny Stable Diffusions: the loss falls, a killed run resumes bit for bit, two processes are one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import assert_same_runs, die_at, lines_of, ortho

from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.errors import CheckpointError, RecipeError, UsageError
from ortho_cli.recipe.train import load_train
from ortho_cli.training.dry_run import describe
from ortho_cli.training.evaluate import evaluate_run
from ortho_cli.training.run import train
from ortho_cli.training.session import open_session
from ortho_cli.training.state import load_tensors

pytest.importorskip("diffusers", reason="the networks are diffusers' own")
pytest.importorskip("skimage", reason="the pictures are scikit-image's")

BUFFERS = 4 * 1000 + 8 * 77  # the noise schedule, and the places of words
RECIPE = {
    "task": "{name: text_to_image, min_snr: 5.0, noise_offset: 0.1}",
    "model": "{name: stable-diffusion, base: BASE}",
    "data": "{name: skimage-captions, batch: 2, size: 16, held_out: 0.2, flip: true, caption_dropout: 0.2, buckets: 4}",
    "methods": "[{name: lora, rank: 2, targets: [sd15-attention]}, {name: gor, groups: 4, penalty: 1e-3}]",
    "optimizer": "{name: adamw, lr: 3e-3}",
    "train": "{steps: 7, seed: 0, threads: 1, eval_every_steps: 7}",
    "run": "{dir: FOLDER, save_every_steps: 3, keep: all, log_every: 1}",
}


def write(folder: Path, name: str, base: Path, **sections: str) -> Path:
    lines = [f"{key}: {value}\n" for key, value in {**RECIPE, **sections}.items()]
    text = "version: 1\n" + "".join(lines).replace("FOLDER", str(folder / name)).replace("BASE", str(base))
    (folder / f"{name}.yaml").write_text(text, "utf-8")
    return folder / f"{name}.yaml"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained the whole UNet a little."""
    folder = tmp_path_factory.mktemp("base")
    sections = {
        "task": "{name: text_to_image}", "model": "{name: stable-diffusion, size: tiny}", "methods": "[]",
        "data": "{name: skimage-captions, batch: 4, size: 16, held_out: 0.2}",
        "train": "{steps: 40, seed: 0, threads: 1, eval_every_steps: 20, clip: 1.0}",
        "run": "{dir: FOLDER, save_every_steps: 40, log_every: 4}",
    }  # fmt: skip
    train(load_train(write(folder, "base", folder, **sections)))
    return folder / "base"


def test_the_loss_falls(base: Path) -> None:
    losses = lines_of(base, "train/loss")
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    judged = lines_of(base, "eval/loss")
    assert judged[1] < judged[0]


@pytest.mark.parametrize("form", ["merged-ldm", "merged-diffusers"])
def test_a_run_as_base_has_no_merged_form_of_a_file_or_pipeline(base: Path, tmp_path: Path, form: str) -> None:
    with pytest.raises(RecipeError, match="base is neither an LDM file nor a diffusers folder"):
        train(load_train(write(tmp_path, "run", base, run=f"{{dir: FOLDER, export: [{form}]}}")))
    assert not (tmp_path / "run").exists()


def test_a_killed_run_goes_on_bit_for_bit(base: Path, tmp_path: Path) -> None:
    train(load_train(write(tmp_path, "whole", base)))
    broken = write(tmp_path, "broken", base)
    die_at(broken, 5)
    train(load_train(broken), resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")
    state = tmp_path / "whole" / "checkpoints" / "step-000007"
    names = set(open_checkpoint(state / "model.safetensors").tensors)
    assert {name.rpartition(".")[2] for name in names} == {"lora_A", "lora_B"}
    found = json.loads((state / "state.json").read_text())["base"]
    assert found["source"] == str(base)
    with pytest.raises(UsageError, match="is judged by val only"):
        evaluate_run(tmp_path / "whole", split="train")
    judged = evaluate_run(tmp_path / "whole", sets=["train.threads=1"])
    assert judged.metrics["loss"] == pytest.approx(lines_of(tmp_path / "whole", "eval/loss")[-1], rel=1e-6)


def test_a_base_that_is_gone_or_another_is_refused(base: Path, tmp_path: Path) -> None:
    own = shutil.copytree(base, tmp_path / "own")
    path = write(tmp_path, "run", own, train="{steps: 2, threads: 1}", run="{dir: FOLDER, save_every_steps: 1}")
    train(load_train(path))
    path.write_text(path.read_text().replace("steps: 2", "steps: 3"))
    weights = own / "checkpoints" / "step-000040" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["unet.conv_in.bias"] += 1
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match="is not what the run started from") as caught:
        train(load_train(path), resume=True)
    assert caught.value.exit_code == 4
    shutil.rmtree(own)
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        train(load_train(path), resume=True)
    assert caught.value.exit_code == 4


def test_what_two_processes_draw_is_what_one_draws(base: Path, tmp_path: Path) -> None:
    task = open_session(load_train(write(tmp_path, "run", base))).task
    one = list(task.batches("train", 1, batch=2))
    two = [task.batches("train", 1, batch=2, rank=rank, world=2) for rank in range(2)]
    for whole, *halves in zip(one, *two, strict=True):
        assert {"noise", "latent_noise", "timestep", "tokens", "image"} <= whole.keys()
        assert all(torch.equal(torch.cat([half[name] for half in halves]), whole[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_are_one(base: Path, tmp_path: Path) -> None:
    recipes = {name: write(tmp_path, name, base) for name in ("one", "two")}
    train(load_train(recipes["one"]))
    done = ortho("train", str(recipes["two"]), processes=2, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    for key in ("train/loss", "eval/loss"):
        assert lines_of(tmp_path / "one", key) == pytest.approx(lines_of(tmp_path / "two", key), rel=1e-4)
    first, second = (
        load_tensors(tmp_path / name / "checkpoints" / "step-000007" / "model.safetensors") for name in ("one", "two")
    )
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_kept_latents_change_nothing(base: Path, tmp_path: Path) -> None:
    data = RECIPE["data"].replace("buckets: 4", f"cache: {tmp_path / 'kept'}")
    train(load_train(write(tmp_path, "plain", base, data=RECIPE["data"].replace(", buckets: 4", ""))))
    train(load_train(write(tmp_path, "first", base, data=data)))
    files = sorted((tmp_path / "kept").rglob("*.safetensors"))
    stamps = [path.stat().st_mtime_ns for path in files]
    train(load_train(write(tmp_path, "second", base, data=data)))
    assert [path.stat().st_mtime_ns for path in files] == stamps
    assert (tmp_path / "first" / "metrics.jsonl").read_bytes() == (tmp_path / "second" / "metrics.jsonl").read_bytes()
    assert lines_of(tmp_path / "plain", "train/loss") == pytest.approx(
        lines_of(tmp_path / "first", "train/loss"), rel=1e-4
    )


def test_the_text_encoder_learns_at_its_own_rate(base: Path, tmp_path: Path) -> None:
    methods = (
        "[{name: hra, rank: 2, targets: [sd15-control, 'text_encoder.**.{q,v}_proj'], rates: {text_encoder.**: 1e-4}}]"
    )
    recipe = load_train(write(tmp_path, "text", base, methods=methods))
    train(recipe)
    saved = load_tensors(tmp_path / "text" / "checkpoints" / "step-000007" / "model.safetensors")
    start = open_session(recipe).model.state_dict()
    moved: dict[str, float] = {"unet": 0.0, "text_encoder": 0.0}
    for name, tensor in saved.items():
        part = name.partition(".")[0]
        moved[part] = max(moved[part], (tensor - start[name]).abs().max().item())
    assert 0 < moved["text_encoder"] <= 7.5e-4 < moved["unet"]
    wrong = methods.replace("text_encoder.**: 1e-4", "text_encoder2.**: 1e-4")
    with pytest.raises(Exception, match=r"rates: 'text_encoder2\.\*\*' matches none"):
        train(load_train(write(tmp_path, "wrong", base, methods=wrong)))


def test_samples_follow_the_adapter_and_frozen_halves_train(base: Path, tmp_path: Path) -> None:
    sheets = {}
    for name, lr in (("still", "1e-12"), ("moved", "3e-2")):
        path = write(
            tmp_path, name, base, optimizer=f"{{name: adamw, lr: {lr}}}",
            model="{name: stable-diffusion, base: BASE, frozen: bf16}",
            task="{name: text_to_image, validation_prompts: [a cat, a wall, a, b, c], steps: 3}",
            train="{steps: 4, threads: 1}", run="{dir: FOLDER, samples_every_steps: 2, save_every_steps: 4}",
        )  # fmt: skip
        train(load_train(path))
        folders = sorted((tmp_path / name / "samples").iterdir())
        sheets[name] = [(folder / "samples.png").read_bytes() for folder in folders]
    assert sheets["still"][0] == sheets["still"][1]
    assert sheets["moved"][0] != sheets["moved"][1]


def test_full_size_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def lines(*sets: str) -> tuple[list[tuple[int, int]], dict[str, Any]]:
        plan = describe(load_train("sd15-lora-gor-pokemon", sets))
        return [(line["layers"], line["added"]) for line in plan["details"]], plan["totals"]

    found, totals = lines()
    assert found == [(128, 797_184), (72, 0)]
    assert totals["parameters"] == 859_520_964 + 83_653_863 + 123_060_480
    assert totals["memory_weights"] == 2 * totals["parameters"] + 4 * 797_184 + BUFFERS
    hra = 'methods=[{name: hra, rank: 8, targets: ["%s"]}]'
    assert lines(hra % "sd15-control")[0] == [(144, 895_488)]
    assert lines(hra % "sd15-attention")[0] == [(128, 795_648)]


def test_bad_samples_stop_a_run_before_it_starts_or_are_left_out(tmp_path: Path) -> None:
    from PIL import Image
    from typer.testing import CliRunner

    from ortho_cli.cli.app import app

    (tmp_path / "set").mkdir()
    for number in range(5):
        Image.new("RGB", (20, 20), (40 * number, 0, 0)).save(tmp_path / "set" / f"{number}.png")
        (tmp_path / "set" / f"{number}.txt").write_text(f"picture {number}")
    (tmp_path / "set" / "5.txt").write_text("of no picture")
    path = write(
        tmp_path, "run", tmp_path, model="{name: stable-diffusion, size: tiny}", methods="[]",
        data=f"{{name: caption-folder, path: {tmp_path / 'set'}, batch: 2, size: 16}}",
        train="{steps: 1, threads: 1}", run="{dir: FOLDER}",
    )  # fmt: skip
    with pytest.raises(RecipeError, match="a caption without a picture") as caught:
        train(load_train(path))
    assert caught.value.exit_code == 3
    assert not (tmp_path / "run").exists()
    done = CliRunner().invoke(app, ["train", str(path), "--skip-bad", "--quiet"])
    assert done.exit_code == 0, done.output
    notes = json.loads((tmp_path / "run" / "outcome.json").read_text())["notes"]
    assert any("1 bad samples are left out" in note and "5.txt: a caption without a picture" in note for note in notes)


def test_sizes_must_fit_the_latents(base: Path, tmp_path: Path) -> None:
    wrong = write(tmp_path, "size", base, data="{name: skimage-captions, batch: 2, size: 18}")
    with pytest.raises(RecipeError, match=r"data\.size 18 is no multiple of 4"):
        train(load_train(wrong))
