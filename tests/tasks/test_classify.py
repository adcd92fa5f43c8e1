"""The classification task: the loss it says, metrics exact however the split is shared, two ranks equal to one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from picture_sets import pixels, save_picture, section
from torch import Tensor, nn

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.models import MLP, ResNet
from ortho_cli.recipe.tasks import Classify
from ortho_cli.tasks.classify import ClassifyTask, mix_pairs


def task(seed: int = 0, *, smoothing: float = 0.0, mixup: float = 0.0, **data: Any) -> ClassifyTask:
    config = Classify.model_validate({"name": "classify", "label_smoothing": smoothing, "mixup": mixup})
    return ClassifyTask(config, section(data.pop("name", "digits"), **data), seed=seed)


def model() -> nn.Module:
    torch.manual_seed(0)
    return task().build_model(MLP.model_validate({"name": "mlp", "hidden": (16,)}))


def first(made: ClassifyTask, **how: Any) -> dict[str, Tensor]:
    return next(iter(made.batches("train", 0, batch=how.pop("batch", 8), **how)))


def test_a_task_knows_its_sizes_without_opening_data() -> None:
    known = task(name="cifar100", path="nowhere")
    assert (known.num_classes, known.in_channels, known.image_size) == (100, 3, 32)
    assert task(size=16).image_size == 16
    with torch.device("meta"):
        built = known.build_model(ResNet.model_validate({"name": "resnet20"}))
    assert built.get_parameter("fc.weight").shape == (100, 64)


def test_classes_of_a_folder_are_counted(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b", "c"):
            save_picture(tmp_path / split / name / "0.png", pixels(1, 3, 4)[0])
    assert task(name="image-folder", path=str(tmp_path)).num_classes == 3


def test_the_loss_is_cross_entropy() -> None:
    made, net = task(smoothing=0.1), model()
    batch = first(made)
    loss, logits, named = made.loss(net, batch, "train")
    torch.testing.assert_close(logits, net(batch["image"]))
    torch.testing.assert_close(loss, F.cross_entropy(net(batch["image"]), batch["label"], label_smoothing=0.1))
    assert float(named["accuracy"]) == float((logits.argmax(1) == batch["label"]).float().mean())
    assert loss.requires_grad and not named["accuracy"].requires_grad


def test_mixup_mixes_neighbours_and_their_losses() -> None:
    made, net = task(mixup=0.4), model()
    batch = first(made)
    mix, pair = batch["mix"], torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    assert 0 < float(mix) < 1
    mixed = mix * batch["image"] + (1 - mix) * batch["image"][pair]
    torch.testing.assert_close(mix_pairs(batch["image"], mix), mixed)
    logits = net(mixed)
    expected = mix * F.cross_entropy(logits, batch["label"]) + (1 - mix) * F.cross_entropy(logits, batch["label"][pair])
    torch.testing.assert_close(made.loss(net, batch, "train")[0], expected)
    assert "mix" not in next(iter(made.batches("eval", 0, batch=8)))


def test_mixup_follows_its_law_and_refuses_to_leave_one_alone() -> None:
    made = task(mixup=2.0)
    drawn = torch.stack([b["mix"] for epoch in range(3) for b in made.batches("train", epoch, batch=8)])
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(drawn.var()) == pytest.approx(0.05, abs=0.01)  # Beta(2, 2): 1 / 20
    with pytest.raises(RecipeError, match="2 samples on 2 processes leave one alone"):
        made.batches("train", 0, batch=2, world=2)


@pytest.mark.parametrize("mixup", [0.0, 0.2])
def test_resumed_batches_are_the_rest_of_the_epoch(mixup: float) -> None:
    made, again = task(mixup=mixup, augment=("crop", "flip")), task(mixup=mixup, augment=("crop", "flip"))
    whole = list(made.batches("train", 3, batch=64))
    rest = list(again.batches("train", 3, batch=64, skip=20))
    assert len(whole) == made.steps_per_epoch == 22
    assert len(rest) == 2
    for before, after in zip(whole[20:], rest, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(whole[0]["index"], next(iter(made.batches("train", 4, batch=64)))["index"])


@pytest.mark.parametrize("mixup", [0.0, 0.2])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_are_one_process(world: int, mixup: float) -> None:
    made, net = task(mixup=mixup, smoothing=0.1, augment=("crop", "flip", "cutout")), model()
    alone = first(made, batch=16)
    parts = [
        first(task(mixup=mixup, augment=("crop", "flip", "cutout")), batch=16, rank=r, world=world)
        for r in range(world)
    ]
    for name in ("image", "label", "index"):
        assert torch.equal(torch.cat([part[name] for part in parts]), alone[name])
    made.loss(net, alone, "train")[0].backward()
    expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    for part in parts:  # what DDP does: the mean of the ranks' gradients
        (made.loss(net, part, "train")[0] / world).backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], expected)


class Reduced:
    """Adds up what the ranks hand in, one rank after the other, as an all-reduce would."""

    def __init__(self, batches: list[Any], made: ClassifyTask, net: nn.Module) -> None:
        self.handed: list[Tensor] = []
        for one in batches:
            made.evaluate(net, one, self.collect)
        self.total = torch.stack(self.handed).sum(0)

    def collect(self, sums: Tensor) -> Tensor:
        self.handed.append(sums)
        return sums


def expected_metrics(net: nn.Module, made: ClassifyTask) -> dict[str, float]:
    whole = made.dataset("eval").fetch(0, torch.arange(made.size("eval")))
    with torch.no_grad():
        logits = net(whole["image"])
    top = logits.topk(5).indices == whole["label"][:, None]
    return {
        "loss": float(F.cross_entropy(logits, whole["label"])),
        "accuracy": float(top[:, 0].double().mean()),
        "accuracy_top5": float(top.any(1).double().mean()),
    }


@pytest.mark.parametrize("batch", [7, 64, 1000])
def test_metrics_are_means_over_the_split(batch: int) -> None:
    made, net = task(), model()
    net.train()
    found = made.evaluate(net, made.batches("eval", 0, batch=batch))
    assert found == pytest.approx(expected_metrics(net, made), rel=1e-6)
    assert net.training


@pytest.mark.parametrize("world", [2, 3, 5])
def test_metrics_are_exact_however_the_split_is_shared(world: int) -> None:
    made, net = task(), model()
    alone = made.evaluate(net, made.batches("eval", 0, batch=60))
    reduced = Reduced([made.batches("eval", 0, batch=60, rank=r, world=world) for r in range(world)], made, net)
    shared = made.evaluate(net, made.batches("eval", 0, batch=60), lambda _: reduced.total)
    assert shared["accuracy"] == alone["accuracy"] and shared["accuracy_top5"] == alone["accuracy_top5"]
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_a_rank_with_an_empty_part_takes_part() -> None:
    made, net = task(), model()
    empty = [{name: value[:0] for name, value in next(iter(made.batches("eval", 0, batch=2))).items()}]
    handed: list[Tensor] = []

    def collect(sums: Tensor) -> Tensor:
        handed.append(sums)
        return torch.ones_like(sums)

    made.evaluate(net, empty, collect)
    assert handed[0].tolist() == [0.0] * 7


def test_classes_left_out_are_judged_apart() -> None:
    made, net = task(classes=(0, 1, 2, 3, 4)), model()
    seen = torch.cat([batch["label"] for batch in made.batches("train", 0, batch=32)])
    assert set(seen.tolist()) == {0, 1, 2, 3, 4}
    whole = made.dataset("eval").fetch(0, torch.arange(made.size("eval")))
    with torch.no_grad():
        logits = net(whole["image"])
    hits, kept = logits.argmax(1) == whole["label"], whole["label"] < 5
    among = logits[~kept, 5:].argmax(1) + 5 == whole["label"][~kept]
    found = made.evaluate(net, made.batches("eval", 0, batch=50))
    assert found["accuracy"] == pytest.approx(float(hits[kept].double().mean()))
    assert found["accuracy_other_classes"] == pytest.approx(float(hits[~kept].double().mean()))
    assert found["accuracy_among_other_classes"] == pytest.approx(float(among.double().mean()))
    assert float(among.double().mean()) > float(hits[~kept].double().mean())  # not the same question
    assert not any("other_classes" in key for key in task().evaluate(net, task().batches("eval", 0, batch=50)))


def test_an_evaluation_of_nothing() -> None:
    with pytest.raises(ValueError, match="no batches"):
        task().evaluate(model(), [])
    others = [{"image": torch.zeros(1, 1, 8, 8), "label": torch.tensor([9])}]
    with pytest.raises(RecipeError, match=r"no evaluated sample is of the classes in data\.classes"):
        task(classes=(0,)).evaluate(model(), others)


def test_evaluation_starts_with_all_classes() -> None:
    labels = next(iter(task().batches("eval", 0, batch=60)))["label"]
    assert len(set(labels.tolist())) == 10


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # how torch starts workers, from Python 3.12 on
def test_workers_and_this_process_give_the_same_epoch() -> None:
    here, there = (list(task(augment=("crop",)).batches("train", 1, batch=256, workers=w)) for w in (0, 2))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(here, there, strict=True))


def test_it_learns() -> None:
    made, net = task(augment=("crop",)), model()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for epoch in range(15):
        for batch in made.batches("train", epoch, batch=64):
            optimizer.zero_grad()
            made.loss(net, batch, "train")[0].backward()
            optimizer.step()
    assert made.evaluate(net, made.batches("eval", 0, batch=64))["accuracy"] > 0.85
