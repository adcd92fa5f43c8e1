"""The loop against arithmetic done by hand: means over uneven parts, phases, clipping, samples, methods' hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_tasks import SIZE, OpposedTask, UnevenTask, points
from training_runs import lines_of, write

from ortho_cli.recipe.train import load_train
from ortho_cli.registry import TABLES
from ortho_cli.training.keeper import Keeper
from ortho_cli.training.loop import fit
from ortho_cli.training.run import train
from ortho_cli.training.session import open_session, prepare_training
from ortho_cli.training.state import load_tensors

SECTIONS = {
    "methods": "[]", "optimizer": "{name: sgd, lr: 0.1}", "schedule": "{name: constant}",
    "run": "{dir: FOLDER, save_every: 1, log_every: 1}",
}  # fmt: skip


def use(monkeypatch: pytest.MonkeyPatch, task: type) -> None:
    monkeypatch.setitem(TABLES["tasks"], "classify", f"toy_tasks:{task.__name__}")


def saved(run: Path, step: int) -> dict[str, Tensor]:
    return load_tensors(run / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def by_hand(steps: int, batch: int) -> tuple[nn.Linear, list[float]]:
    """Gradient descent on the mean of whole batches."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    losses = []
    for step in range(steps):
        start = step * batch % (-(-SIZE // batch) * batch)
        part = {name: value[start : start + batch] for name, value in points().items()}
        loss = (model(part["input"]) - part["target"]).square().mean()
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    return model, losses


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_parts_of_a_batch_make_the_mean_over_its_samples(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 8 and 6; in four parts the second is 2 + 2 + 2, in two parts 4 + 2: means of means would be wrong."""
    use(monkeypatch, UnevenTask)
    length = f"{{epochs: 2, accumulate: {accumulate}}}"
    path = write(tmp_path, "run", **SECTIONS, train=length, data="{name: digits, batch: 8}")
    outcome = train(load_train(path))
    expected, losses = by_hand(4, 8)
    assert outcome.step == 4
    assert lines_of(tmp_path / "run", "train/loss") == pytest.approx(losses, rel=1e-6)
    for name, value in saved(tmp_path / "run", 4).items():
        assert torch.allclose(value, expected.state_dict()[name], atol=1e-7), name
    assert lines_of(tmp_path / "run", "samples") == [8, SIZE, SIZE, SIZE + 8, 2 * SIZE, 2 * SIZE]  # with evaluations


def test_phases_have_their_own_parameters_and_optimizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Critic first, then the maker against the new critic; neither moves the other's weights, clipped each alone."""
    use(monkeypatch, OpposedTask)
    path = write(tmp_path, "run", **SECTIONS, train="{epochs: 1, clip: 0.5}", data=f"{{name: digits, batch: {SIZE}}}")
    train(load_train(path))
    torch.manual_seed(0)
    task: Any = OpposedTask(None, None, seed=0)  # type: ignore[arg-type]
    model = task.build_model(None)
    for phase in ("critic", "maker"):
        model.zero_grad()
        loss, _, _ = task.loss(model, points(), phase)
        loss.backward()
        own = list(task.phase_module(model, phase).parameters())
        norm = nn.utils.clip_grad_norm_(own, 0.5)
        with torch.no_grad():
            for parameter in own:
                parameter -= 0.1 * parameter.grad
        assert lines_of(tmp_path / "run", f"train/{phase}/loss") == pytest.approx([loss.item()], rel=1e-6)
        assert lines_of(tmp_path / "run", f"train/{phase}/gradient_norm") == pytest.approx([norm.item()], rel=1e-6)
    for name, value in saved(tmp_path / "run", 1).items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-7), name


def test_phases_resume_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, OpposedTask)
    sections = {**SECTIONS, "optimizer": "{name: adam, lr: 0.1}", "data": "{name: digits, batch: 7}"}
    whole, parts = (write(tmp_path, name, **sections, train="{epochs: 4}") for name in ("whole", "parts"))
    train(load_train(whole))
    train(load_train(parts, ["train.epochs=2"]))
    train(load_train(parts), resume=True)
    for name, value in saved(tmp_path / "whole", 8).items():
        assert torch.equal(value, saved(tmp_path / "parts", 8)[name]), name
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() != b""
    assert lines_of(tmp_path / "whole", "train/maker/loss") == lines_of(tmp_path / "parts", "train/maker/loss")


def test_samples_lie_in_a_folder_of_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, UnevenTask)
    sections = {**SECTIONS, "run": "{dir: FOLDER, samples_every_steps: 3, save_every: 1}"}
    path = write(tmp_path, "run", **sections, train="{epochs: 4}", data="{name: digits, batch: 7}")
    train(load_train(path))
    folders = sorted((tmp_path / "run" / "samples").iterdir())
    assert [folder.name for folder in folders] == ["step-000003", "step-000006"]
    written = (folders[0] / "sample.txt").read_text()
    assert written.startswith("False ")  # the model is judged, not trained
    assert written != (folders[1] / "sample.txt").read_text()


def test_a_task_without_samples_says_so(tmp_path: Path) -> None:
    outcome = train(load_train(write(tmp_path, "run"), ["train.epochs=1", "run.samples_every=1"]))
    assert "run.samples_every: task classify has no samples to show" in outcome.notes


def test_a_task_that_gives_too_few_batches_is_a_bug_and_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, UnevenTask)
    monkeypatch.setattr(UnevenTask, "steps_per_epoch", 5)
    path = write(tmp_path, "run", **SECTIONS, train="{epochs: 1}", data="{name: digits, batch: 7}")
    with pytest.raises(ValueError, match="fewer batches than the 5 steps"):
        train(load_train(path))


def test_what_methods_are_told_and_what_becomes_of_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks in their order, gradients not yet clipped; after a change of shapes old and handed-over moments go on."""
    monkeypatch.setitem(TABLES["methods"], "gor", "toy_methods:Halving")
    recipe = load_train(write(tmp_path, "run", train="{steps: 3, accumulate: 2, clip: 0.001, ema: 0.5}"))
    session = open_session(recipe)
    prepare_training(session)
    session.folder.mkdir()
    keeper = Keeper(session)
    with keeper.open_logs():
        fit(session, keeper.counters, keeper.window, keeper.after_step)
    parts = ["penalty train 32 True"] * 2
    steps = [[*parts, "after_backward True", f"after_step {step}"] for step in range(3)]
    told = session.methods[0].told  # type: ignore[attr-defined]
    assert told == ["prepare 3", "param_groups", *steps[0], *steps[1], "param_groups", *steps[2]]
    sizes = [tuple(parameter.shape) for parameter in session.model.parameters()]
    assert sizes == [(16, 64), (16,), (10, 16), (10,)]
    (optimizer,) = session.optimizers.values()
    for parameter in session.model.parameters():
        state = optimizer.state[parameter]
        assert state["exp_avg"].shape == parameter.shape
        assert float(state["step"]) == 3  # of all three steps
    assert session.average is not None
    assert {name: value.shape for name, value in session.average.values.items()} == {
        name: value.shape for name, value in session.model.named_parameters()
    }
