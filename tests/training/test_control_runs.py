"""Controllable generation trains: the hint is listened to, runs resume bit for bit, two processes equal one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import assert_same_runs, die_at, lines_of, ortho, write

pytest.importorskip("diffusers", reason="the networks are diffusers' own")

from tiny_sd import save_pipeline

from ortho_cli.errors import RecipeError
from ortho_cli.models.hint_encoder import HintEncoder
from ortho_cli.recipe.train import load_train
from ortho_cli.surgery.add_hra import add_hra
from ortho_cli.surgery.convert import convert
from ortho_cli.tasks.control import ControlTask
from ortho_cli.training.evaluate import evaluate_run
from ortho_cli.training.log import read_lines
from ortho_cli.training.model_judge import Drawing
from ortho_cli.training.run import train
from ortho_cli.training.session import open_session, prepare_training
from ortho_cli.training.state import last_checkpoint, load_tensors

STEPS = 6
HINT_ENCODER = 1_086_480 - (256 * 9 + 1) * (320 - 16)  # as published, but for a UNet of 16 channels
REFLECTIONS = 1_632  # two on the inputs of 36 layers
SECTIONS = {
    "task": "{name: control, prompt_dropout: 0.5, samples: 2, steps: 2, scored: 1}",
    "model": "{name: stable-diffusion, size: tiny}",
    "data": "{name: skimage-hints, hint: canny, size: 16, batch: 4}",
    "methods": "[{name: hra, rank: 2, targets: [sd15-control], penalty: 1e-3}]",
    "optimizer": "{name: adamw, lr: 1e-3, weight_decay: 1e-2}",
    "schedule": "{name: constant}",
    "train": f"{{steps: {STEPS}, threads: 1, eval_every_steps: 3}}",
    "run": "{dir: FOLDER, save_every_steps: 2, samples_every_steps: 3, log_every: 1, keep: all}",
}


def opened(folder: Path, **sections: str) -> Any:
    session = open_session(load_train(write(folder, "run", **{**SECTIONS, **sections})))
    assert isinstance(session.task, ControlTask)
    return session


def test_what_trains_is_the_encoder_and_the_reflections(tmp_path: Path) -> None:
    session = opened(tmp_path)
    trains = {name: each.numel() for name, each in session.model.named_parameters() if each.requires_grad}
    encoder = sum(count for name, count in trains.items() if name.startswith("control_model."))
    assert (encoder, sum(trains.values()) - encoder) == (HINT_ENCODER, REFLECTIONS)
    session = opened(tmp_path, methods="[{name: lora, rank: 2, targets: [sd15-control]}]")
    trains = {name: each.numel() for name, each in session.model.named_parameters() if each.requires_grad}
    assert sum(count for name, count in trains.items() if name.startswith("control_model.")) == HINT_ENCODER


def test_the_loss_is_the_published_one_and_hints_say_nothing_at_first(tmp_path: Path) -> None:
    session = opened(tmp_path)
    task, model = session.task, session.model
    batch = next(task.batches("train", 0, batch=4))
    found = task.loss(model, batch, "train")[0]
    moments = model.encode_pictures(batch["image"])
    latents = moments[:, 0] + moments[:, 1] * batch["latent_noise"]
    noisy = model.scheduler.add_noise(latents, batch["noise"], batch["timestep"])
    plain = model(noisy, batch["timestep"], batch["tokens"])  # without its hint: the encoder starts at zero
    assert torch.allclose(found, (plain - batch["noise"]).square().mean(), atol=1e-5)
    for parameter in task.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert abs((task.loss(model, batch, "train")[0] - found).item()) > 1e-3
    model.scheduler.register_to_config(prediction_type="v_prediction")
    velocity = model.scheduler.get_velocity(latents, batch["noise"], batch["timestep"])
    heard = model(noisy, batch["timestep"], batch["tokens"], batch["hint"])
    assert torch.allclose(task.loss(model, batch, "train")[0], (heard - velocity).square().mean(), atol=1e-5)


def test_the_loss_falls(tmp_path: Path) -> None:
    """Two pictures learnt by heart at fixed noise: every part of the chain has its gradient."""
    data, optimizer = "{name: skimage-hints, hint: canny, size: 16, batch: 2}", "{name: adamw, lr: 3e-3}"
    session = opened(tmp_path, data=data, optimizer=optimizer)
    prepare_training(session)
    (adamw,) = session.optimizers.values()
    batch = next(session.task.batches("train", 0, batch=2))
    losses = []
    for _ in range(40):
        adamw.zero_grad()
        loss = session.task.loss(session.model, batch, "train")[0]
        loss.backward()
        adamw.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(each.grad is not None for each in session.model.parameters() if each.requires_grad)


def test_everything_random_belongs_to_the_sample(tmp_path: Path) -> None:
    session = opened(tmp_path)
    task = session.task
    whole = next(task.batches("train", 1, batch=4))
    halves = [next(task.batches("train", 1, batch=4, rank=rank, world=2)) for rank in range(2)]
    for key in ("image", "hint", "tokens", "noise", "latent_noise", "timestep", "index"):
        assert torch.equal(torch.cat([half[key] for half in halves]), whole[key])
    ten = next(task.batches("train", 2, batch=10))
    empty = task.model.tokens([""])[0]
    dropped = [bool(torch.equal(tokens, empty)) for tokens in ten["tokens"]]
    assert 0 < sum(dropped) < 10
    assert not any(torch.equal(tokens, empty) for tokens in next(task.batches("eval", 0, batch=2))["tokens"])
    assert 0 <= int(ten["timestep"].min()) < int(ten["timestep"].max()) < 1000
    judged = [
        next(each.batches("eval", 0, batch=2)) for each in (task, opened(tmp_path, train="{steps: 6, seed: 9}").task)
    ]
    assert torch.equal(judged[0]["noise"], judged[1]["noise"])


def test_processes_without_a_share_of_a_batch_judge_what_one_judges(tmp_path: Path) -> None:
    session = opened(tmp_path)
    task, sums = session.task, []
    alone = task.evaluate(session.model, task.batches("eval", 0, batch=1))
    for rank in range(3):
        batches = list(task.batches("eval", 0, batch=1, rank=rank, world=3))
        assert [len(each["image"]) for each in batches] == [1, 1]
        task.evaluate(session.model, batches, lambda own: sums.append(own) or own)
    together = task.evaluate(session.model, [], lambda _: sum(sums))
    assert together == pytest.approx(alone, rel=1e-6)
    assert together.keys() == {"loss", "canny_f1"}
    assert task.evaluate(session.model, []) == {}


def test_killed_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    train(load_train(write(tmp_path, "whole", **SECTIONS)))
    broken = write(tmp_path, "broken", **SECTIONS)
    die_at(broken, 4)
    train(load_train(broken), resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")
    sheets = [(tmp_path / run / "samples" / "step-000006" / "samples.png").read_bytes() for run in ("whole", "broken")]
    assert sheets[0] == sheets[1]
    assert len(lines_of(tmp_path / "whole", "eval/canny_f1")) == 2
    config = json.loads((tmp_path / "whole" / "export" / "hra" / "adapter_config.json").read_text("utf-8"))
    assert "control_model.input_hint_block.14" in config["modules_to_save"]


def test_a_run_goes_on_from_the_adapter_and_the_encoder_of_another(tmp_path: Path) -> None:
    train(load_train(write(tmp_path, "first", **SECTIONS)))
    folder = tmp_path / "first" / "export" / "hra"
    session = opened(tmp_path, methods=f"[{{name: hra, adapter: {folder}, rank: 2}}]")
    stored = last_checkpoint(tmp_path / "first")
    assert stored is not None
    trained = {k: v for k, v in load_tensors(stored / "model.safetensors").items() if "hint_block" in k or "hra_u" in k}
    state = session.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trained.items())


def test_an_ldm_file_with_reflections_and_an_encoder_is_trained_as_it_is(tmp_path: Path) -> None:
    """What `add-hra` and the authors' trainer make of a base: both parts go on, and are saved, in their own names."""
    folder = save_pipeline(tmp_path / "pipeline")
    convert(folder, tmp_path / "ldm.safetensors", "ldm")
    add_hra(tmp_path / "ldm.safetensors", tmp_path / "hra.safetensors", rank=4, form="checkpoint")
    torch.manual_seed(3)
    encoder = {f"control_model.{name}": torch.randn_like(value) for name, value in HintEncoder(16).state_dict().items()}
    unused = {"control_model.time_embed.0.bias": torch.zeros(64)}
    save_file(load_file(tmp_path / "hra.safetensors") | encoder | unused, tmp_path / "base.safetensors")
    sections = {
        "model": f"{{name: stable-diffusion, base: {tmp_path / 'base.safetensors'}, config: {folder}}}",
        "data": "{name: skimage-hints, hint: canny, size: 64, batch: 2}",
        "methods": "[{name: hra, rank: 4, targets: [sd15-control]}]",
        "task": "{name: control, samples: 0}",
        "train": "{steps: 1, threads: 1, limit_batches: 1}",
        "run": "{dir: FOLDER, save_every_steps: 1}",
    }
    session = opened(tmp_path, **sections)
    state = session.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in encoder.items())
    assert any("144 layers of rank 4" in note for note in session.notes)
    assert any("the base's own hint encoder" in note for note in session.notes)
    assert any("1 tensors control_model.time_embed.* are left out" in note for note in session.notes)
    train(load_train(write(tmp_path, "on", **{**SECTIONS, **sections})))
    stored = last_checkpoint(tmp_path / "on")
    assert stored is not None
    saved = load_tensors(stored / "model.safetensors")
    assert encoder.keys() <= saved.keys()
    assert sum(name.endswith(".hra_u") for name in saved) == 144
    assert not any(torch.equal(saved[name], value) for name, value in encoder.items())


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.size 17 is no multiple of 4"):
        opened(tmp_path, data="{name: skimage-hints, hint: canny, size: 17, batch: 4}")
    folder = tmp_path / "pictures"
    folder.mkdir()
    with pytest.raises(RecipeError, match=r"task\.scored compares edges, and the hints are depth"):
        opened(tmp_path, data=f"{{name: hint-folder, path: {folder}, hint: depth, size: 16, batch: 4}}")
    with pytest.raises(RecipeError, match="has no depth hints, but canny"):
        opened(tmp_path, data="{name: skimage-hints, hint: depth, size: 16}")


def test_bad_samples_that_are_left_out_are_told(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "pictures" / "train"
    folder.mkdir(parents=True)
    lines = []
    for place in range(3):
        Image.new("RGB", (16, 16), (place, 9, 9)).save(folder / f"{place}.png")
        lines.append(json.dumps({"file_name": f"{place}.png", "text": "a field"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), "utf-8")
    (tmp_path / "pictures" / "val").symlink_to(folder)
    (folder / "1.png").write_bytes(b"nothing")
    given = f"name: hint-folder, path: {tmp_path / 'pictures'}, hint: canny, size: 16, batch: 2"
    with pytest.raises(RecipeError, match=r"picture '.*1.png': no picture") as caught:
        opened(tmp_path, data=f"{{{given}}}")
    assert caught.value.where == f"{folder / 'metadata.jsonl'}:2"
    told = [note for note in opened(tmp_path, data=f"{{{given}, skip_bad: true}}").notes if "left out" in note]
    assert len(told) == 2
    assert "1 bad samples of train are left out" in told[0]


def test_the_shipped_twin_trains_and_shows_samples(tmp_path: Path) -> None:
    changes = ["model.base=null", "model.size=tiny", "train.steps=2", "train.eval_every_steps=2", "task.steps=2"]
    places = [f"run.dir={tmp_path / 'twin'}", "run.samples_every_steps=2", "run.save_every_steps=2", "run.log_every=1"]
    train(load_train("tiny-sd-control-canny-hra", [*changes, *places]))
    from PIL import Image

    with Image.open(tmp_path / "twin" / "samples" / "step-000002" / "samples.png") as sheet:
        assert sheet.size == (3 * 32 + 2, 2 * 32 + 1)  # two rows of hint, drawn and real picture, enlarged
    assert len(lines_of(tmp_path / "twin", "eval/loss")) == 1


def test_evaluate_draws_to_the_hints_where_it_is_asked(tmp_path: Path) -> None:
    sections = {**SECTIONS, "train": "{steps: 1, threads: 1}", "run": "{dir: FOLDER, save_every_steps: 1}"}
    train(load_train(write(tmp_path, "run", **sections)))
    plain = evaluate_run(tmp_path / "run")
    assert set(plain.metrics) == {"loss", "canny_f1"}
    asked = evaluate_run(tmp_path / "run", metrics=["canny", "landmarks"], drawing=Drawing(number=1))
    assert {"canny_iou", "canny_f1"} <= set(asked.metrics)
    assert [skipped.metric for skipped in asked.skipped] == ["landmarks"]
    assert asked.notes == ["1 pictures were drawn, in 2 steps at guidance 9"]
    again = evaluate_run(tmp_path / "run", metrics=["canny"], drawing=Drawing(number=1))
    assert again.metrics["canny_iou"] == asked.metrics["canny_iou"]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    sections = {**SECTIONS, "optimizer": "{name: sgd, lr: 0.01}"}
    for name, processes in (("one", 1), ("two", 2)):
        done = ortho("train", str(write(tmp_path, name, **sections)), "-q", processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = (list(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("one", "two"))
    for mine, other in zip(one, two, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
    states = []
    for name in ("one", "two"):
        stored = last_checkpoint(tmp_path / name)
        assert stored is not None
        states.append(load_tensors(stored / "model.safetensors"))
    for key, value in states[0].items():
        assert torch.allclose(value, states[1][key], atol=1e-5, rtol=1e-4), key
