"""Gradient checkpointing, compiled models and trackers: the same training, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_runs import lines_of, write

from ortho_cli.errors import UsageError
from ortho_cli.models.resnet_cifar import CifarResNet
from ortho_cli.models.vit import VisionTransformer
from ortho_cli.recipe.train import load_train
from ortho_cli.training.recompute import recompute_activations
from ortho_cli.training.run import train

SECTIONS = {"train": "{steps: 3, threads: 1}", "model": "{name: resnet20, norm: group}", "methods": "[{name: gor}]"}


def kept_bytes(model: nn.Module, images: Tensor) -> int:
    """What a forward pass keeps for backward, parameters excluded."""
    weights = {value.data_ptr() for value in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    return sum(kept.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda: CifarResNet(20, 10, 1, norm="group"),
        lambda: VisionTransformer(10, 1, 8, patch=2, depth=3, heads=2, dim=16),
    ],
    ids=["resnet", "vit"],
)  # fmt: skip
def test_the_same_gradients_from_less_memory(make: object) -> None:
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    models, sizes = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model: nn.Module = make()  # type: ignore[operator]
        names = set(model.state_dict())
        if recompute:
            recompute_activations(model)
        assert set(model.state_dict()) == names
        sizes.append(kept_bytes(model, images))
        model(images).square().sum().backward()
        models.append(model)
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)
    assert sizes[1] < 0.5 * sizes[0]


def test_batch_norm_and_flat_models_are_refused() -> None:
    with pytest.raises(UsageError, match="batch norm twice"):
        recompute_activations(CifarResNet(20, 10, 1))
    with pytest.raises(UsageError, match="no repeated blocks"):
        recompute_activations(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_in_a_run(tmp_path: Path) -> None:
    """With adapters inside the blocks."""
    base = write(tmp_path, "base", **{**SECTIONS, "methods": "[]"})
    train(load_train(base))
    model = f"{{name: resnet20, norm: group, base: {tmp_path / 'base'}}}"
    sections = {**SECTIONS, "model": model, "methods": "[{name: hra, rank: 2, targets: ['**.conv2']}]"}
    for name in ("plain", "less"):
        path = write(tmp_path, name, **sections)
        train(load_train(path, [f"train.checkpoint_gradients={'true' if name == 'less' else 'false'}"]))
    plain, less = (lines_of(tmp_path / name, "eval/loss") for name in ("plain", "less"))
    assert less == pytest.approx(plain, rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of what its compiler imports
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_model_trains_the_same(tmp_path: Path) -> None:
    for name in ("plain", "compiled"):
        path = write(tmp_path, name, **SECTIONS)
        train(load_train(path, [f"train.compile={'true' if name == 'compiled' else 'false'}"]))
    plain, compiled = (lines_of(tmp_path / name, "eval/loss") for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-3)
    states = [{path.name for path in (tmp_path / name / "checkpoints").iterdir()} for name in ("plain", "compiled")]
    assert states[0] == states[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(load_train(write(tmp_path, "run"), ["train.epochs=1", "run.trackers=[tensorboard]"]))
    (folder,) = (tmp_path / "run" / "trackers").iterdir()
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    told = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [value for _, value in told] == pytest.approx(lines_of(tmp_path / "run", "train/loss"))
    assert [step for step, _ in told] == [5, 10, 15, 20, 22]
    assert "eval/accuracy" in events.Tags()["scalars"]
