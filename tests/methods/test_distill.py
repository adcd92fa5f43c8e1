"""Distillation: the papers' formulas, teachers of every kind, and a teacher that is neither trained nor saved."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from ortho_cli.errors import RecipeError, TargetError
from ortho_cli.methods.distill import DistillMethod, attention_distance, distillation_loss
from ortho_cli.methods.method import Context
from ortho_cli.models.resnet_cifar import CifarResNet
from ortho_cli.recipe.methods import Distill


def config(**settings: Any) -> Distill:
    return Distill.model_validate({"name": "distill", "teacher": "x", "model": {"name": "resnet32"}, **settings})


def test_the_loss_is_that_of_the_papers_code() -> None:
    """`KL(log_softmax(y / T), softmax(t / T))`, a mean over elements, times `T^2 2 alpha`, plus `(1 - alpha) CE`."""
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(6, 10), torch.randn(6, 10), torch.arange(6)
    for alpha, temperature in ((0.9, 4.0), (0.5, 1.0)):
        kl = F.kl_div(F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1), reduction="none")
        expected = kl.mean() * temperature**2 * 2 * alpha + F.cross_entropy(student, labels) * (1 - alpha)
        method = DistillMethod(config(alpha=alpha, temperature=temperature))
        method.prepare(nn.Identity(), Context(0, 1, "classify", None, lambda section, says=teacher: Fixed(says)))
        batch = {"image": torch.zeros(6, 1), "label": labels}
        term = method.penalty(nn.Identity(), batch, student, "train")
        assert term is not None
        assert (F.cross_entropy(student, labels) + term).item() == pytest.approx(expected.item(), rel=1e-5)


class Fixed(nn.Module):
    """A teacher that always says the same."""

    def __init__(self, says: torch.Tensor) -> None:
        super().__init__()
        self.says = nn.Parameter(says)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.says


def test_attention_maps_are_the_papers() -> None:
    torch.manual_seed(0)
    features, teacher = torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4)

    def attention(x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))

    expected = (attention(features) - attention(teacher)).pow(2).mean()
    assert attention_distance(features, teacher).item() == pytest.approx(expected.item(), rel=1e-6)


def test_an_equal_teacher_pulls_nowhere() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    distillation_loss(logits, logits.detach(), 3.0).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max().item() < 1e-6


def student() -> CifarResNet:
    torch.manual_seed(1)
    return CifarResNet(20, 10, 1)


def prepared(model: nn.Module, **settings: Any) -> DistillMethod:
    method = DistillMethod(config(**settings))
    method.prepare(model, Context(0, 1, "classify", None, lambda section: CifarResNet(32, 10, 1)))
    return method


def test_the_teacher_is_neither_trained_nor_saved() -> None:
    model = student()
    keys = set(model.state_dict())
    method = prepared(model, attention=("layer1", "layer3"), beta=10.0)
    assert method.teacher is not None
    assert set(model.state_dict()) == keys
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    batch = {"image": torch.randn(4, 1, 8, 8), "label": torch.arange(4)}
    term = method.penalty(model, batch, model(batch["image"]), "train")
    assert term is not None
    term.backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    assert model.conv1.weight.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())
    assert not method.teacher.training
    assert method.notes == ["the teacher is a CifarResNet of 463,866 parameters"]


def test_the_teacher_runs_in_the_students_arithmetic() -> None:
    """The loop's autocast is around the student's forward pass and not around penalties."""
    model, images = student(), torch.randn(4, 1, 8, 8)
    batch = {"image": images, "label": torch.arange(4)}
    method = prepared(model)
    found: list[torch.dtype] = []
    model_of(method).register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = model(images)
        term = method.penalty(model, batch, outputs, "train")
        assert term is not None
        assert term.dtype == torch.float32
    assert found == [torch.bfloat16, torch.float32]


def test_attention_is_weighted_as_three_maps_are() -> None:
    model, images = student().eval(), torch.randn(4, 1, 8, 8)
    batch = {"image": images, "label": torch.arange(4)}
    for names in (("layer1",), ("layer1", "layer2", "layer3")):
        method = prepared(model, alpha=0.0, beta=7.0, attention=names)
        term = method.penalty(model, batch, model(images), "train")
        maps = [
            attention_distance(features_of(model, images, name), features_of(model_of(method), images, name)).item()
            for name in names
        ]
        assert term is not None
        assert term.item() == pytest.approx(7.0 * 3 / len(names) * sum(maps), rel=1e-4)


def model_of(method: DistillMethod) -> nn.Module:
    assert method.teacher is not None
    return method.teacher


def features_of(model: nn.Module, images: torch.Tensor, name: str) -> torch.Tensor:
    found: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, output: found.append(output))
    model(images)
    handle.remove()
    return found[0].detach()


def test_what_cannot_be_taught() -> None:
    with pytest.raises(TargetError, match="the student has no module 'layer9'"):
        prepared(student(), attention=("layer9",))
    method = DistillMethod(config(attention=("layer1",)))
    with pytest.raises(TargetError, match="the teacher has no module 'layer1'"):
        method.prepare(student(), Context(0, 1, "classify", None, lambda section: nn.Linear(2, 2)))
    method = prepared(student())
    batch = {"image": torch.randn(4, 1, 8, 8), "label": torch.arange(4), "mix": torch.tensor(0.5)}
    with pytest.raises(RecipeError, match="mixup"):
        method.penalty(nn.Identity(), batch, torch.zeros(4, 10), "train")
    del batch["mix"]
    with pytest.raises(TargetError, match=r"outputs of shape \(4, 10\), not \(4, 7\)"):
        method.penalty(nn.Identity(), batch, torch.zeros(4, 7), "train")
    with pytest.raises(ValidationError, match="nothing to learn"):
        Distill(name="distill", teacher="x", alpha=0.0)


def test_a_teacher_that_is_no_run_must_say_what_it_is(tmp_path: Path) -> None:
    method = DistillMethod(Distill(name="distill", teacher=str(tmp_path / "weights.safetensors")))
    with pytest.raises(RecipeError, match="is no run of ortho"):
        method.prepare(student(), Context(0, 1, "classify", None, lambda section: nn.Identity()))
    seen: list[Any] = []

    def build(section: Any) -> nn.Module:
        seen.append(section)
        return CifarResNet(32, 10, 1)

    DistillMethod(config(teacher="w.safetensors")).prepare(student(), Context(0, 1, "classify", None, build))
    assert (seen[0].name, seen[0].base) == ("resnet32", "w.safetensors")


def test_examples_in_the_documentation_run() -> None:
    found = doctest.testmod(importlib.import_module("ortho_cli.methods.distill"))
    assert found.failed == 0
    assert found.attempted > 0
