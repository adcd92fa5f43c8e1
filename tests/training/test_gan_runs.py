"""GANs train: killed and resumed bit for bit with both optimizers and averages; two processes equal one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import assert_same_runs, die_at, lines_of, ortho, write

from ortho_cli.recipe.train import load_train
from ortho_cli.tasks.gan import GANTask
from ortho_cli.training.log import read_lines
from ortho_cli.training.run import train
from ortho_cli.training.session import open_session, prepare_training
from ortho_cli.training.state import last_checkpoint, load_tensors

STEPS = 6
SECTIONS = {
    "task": "{name: gan, r1: 1.0, r1_every: 2, gradient_penalty: 0.5, augment: 0.6, samples: 9}",
    "model": "{name: eigengan, basis: 2, noise: 4, base_channels: 4, max_channels: 8}",
    "data": "{name: digits, batch: 16, size: 16, augment: [crop]}",
    "methods": "[{name: nog, targets: [subspace]}, {name: orthogonal_loss, targets: [subspace], penalty_form: mean}, "
    "{name: orojar, targets: [feature_conv1], penalty: 0.1}]",
    "optimizer": "{name: adam, lr: 1e-3, betas: [0.5, 0.99]}",
    "train": f"{{steps: {STEPS}, ema: 0.9, limit_batches: 4, threads: 1}}",
    "run": "{dir: FOLDER, save_every_steps: 2, samples_every_steps: 3, log_every: 1, keep: all}",
}


def test_killed_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    more = SECTIONS["methods"].removesuffix("]") + (
        ", {name: olr, targets: [subspace]}"
        ", {name: track_conditioning, targets: [feature_conv1, discriminator.0], every: 2}"
        ", {name: vp, penalty: 0.1}]"  # which learns a classifier beside it
    )
    sections = {**SECTIONS, "methods": more}
    train(load_train(write(tmp_path, "whole", **sections)))
    broken = write(tmp_path, "broken", **sections)
    die_at(broken, 4)
    train(load_train(broken), resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")
    grids = [(tmp_path / run / "samples" / "step-000006" / "samples.png").read_bytes() for run in ("whole", "broken")]
    assert grids[0] == grids[1]
    assert len(lines_of(tmp_path / "whole", "train/discriminator/r1")) == STEPS // 2
    assert len(lines_of(tmp_path / "whole", "method/vp/accuracy")) == STEPS
    assert len(lines_of(tmp_path / "whole", "method/olr/rate_mean")) == STEPS
    assert lines_of(tmp_path / "whole", "method/track_conditioning/measured_at") == [1, 2, 2, 4, 4, 6]
    folder = last_checkpoint(tmp_path / "whole")
    assert folder is not None
    assert {name.partition(".")[0] for name in load_tensors(folder / "model.safetensors")} == set(GANTask.phases)


def test_each_phase_moves_its_own_network_and_leaves_no_gradients_elsewhere(tmp_path: Path) -> None:
    session = open_session(load_train(write(tmp_path, "run", **SECTIONS)))
    prepare_training(session)
    batch = next(session.task.batches("train", 0, batch=16))
    for phase, other in (("discriminator", "generator"), ("generator", "discriminator")):
        session.model.zero_grad()
        with session.training_only(phase):
            loss, _, _ = session.task.loss(session.model, batch, phase)
            loss.backward()
        assert all(each.grad is not None for each in session.model.get_submodule(phase).parameters())
        assert all(each.grad is None for each in session.model.get_submodule(other).parameters())
    assert all(each.requires_grad for each in session.model.parameters())


def test_averages_are_of_the_generator_alone(tmp_path: Path) -> None:
    train(load_train(write(tmp_path, "run", **SECTIONS)))
    folder = last_checkpoint(tmp_path / "run")
    assert folder is not None
    assert {name.partition(".")[0] for name in load_tensors(folder / "ema.safetensors")} == {"generator"}


def test_noise_belongs_to_the_sample(tmp_path: Path) -> None:
    recipe = load_train(write(tmp_path, "run", **SECTIONS))
    task = GANTask(recipe.task, recipe.data, seed=0)  # type: ignore[arg-type]
    task.build_model(recipe.model)
    whole = next(task.batches("train", 1, batch=16))
    halves = [next(task.batches("train", 1, batch=16, rank=rank, world=2)) for rank in range(2)]
    for key in ("image", "noise", "draws", "mix"):
        assert torch.equal(torch.cat([half[key] for half in halves]), whole[key])
    again, later = (next(task.batches("train", epoch, batch=1438))["noise"] for epoch in (1, 2))
    assert not torch.equal(again, later)
    assert abs(float(again.mean())) < 0.01
    assert abs(float(again.std()) - 1) < 0.01
    assert [("r1" in each) for each in task.batches("train", 0, batch=300)] == [True, False, True, False]


def test_better_pictures_are_told_from_worse(tmp_path: Path) -> None:
    """The metric is small for a generator that returns real pictures, and grows as they lose their variety."""
    recipe = load_train(write(tmp_path, "run", **SECTIONS))
    task = GANTask(recipe.task, recipe.data, seed=0)  # type: ignore[arg-type]
    task.build_model(recipe.model)
    batches = list(task.batches("eval", 0, batch=64))

    class Copies(torch.nn.Module):
        def __init__(self, kept: float) -> None:
            super().__init__()
            self.kept, self.real = kept, iter(batches)

        def forward(self, phase: str, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            real = next(self.real)["image"]
            return {"pictures": torch.lerp(real.mean(0, keepdim=True), real, self.kept)}

    found = [task.evaluate(Copies(kept), batches)["frechet_pixels"] for kept in (1.0, 0.7, 0.0)]
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[0] < found[1] < found[2]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    sections = {**SECTIONS, "optimizer": "{name: sgd, lr: 0.01}"}
    for name, processes in (("one", 1), ("two", 2)):
        done = ortho("train", str(write(tmp_path, name, **sections)), "-q", processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = (list(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("one", "two"))
    for mine, other in zip(one, two, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-4)
    for file in ("model", "ema"):
        states = []
        for name in ("one", "two"):
            folder = last_checkpoint(tmp_path / name)
            assert folder is not None
            states.append(load_tensors(folder / f"{file}.safetensors"))
        for key, value in states[0].items():
            assert torch.allclose(value, states[1][key], atol=1e-4, rtol=1e-3), key
