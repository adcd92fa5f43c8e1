"""timm's classifiers: its counts where it can be imported, and what is said where it cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from timm_library import needs_timm

from ortho_cli.errors import RecipeError, UsageError
from ortho_cli.methods.oialr_select import basis_candidates
from ortho_cli.models.timm_image import build
from ortho_cli.recipe.models import Timm


def section(architecture: str, **more: object) -> Timm:
    return Timm.model_validate({"name": "timm", "architecture": architecture, **more})


@needs_timm
def test_resnetrs101_is_the_papers() -> None:
    with torch.device("meta"):
        model = build(section("resnetrs101", drop_rate=0.25), 1000, 3, 160)
    assert sum(parameter.numel() for parameter in model.parameters()) == 63_618_696
    assert model.drop_rate == 0.25
    assert len(basis_candidates(model)) == 173  # all but the classifier, as the paper's code has it
    assert "fc" not in [layer.name for layer in basis_candidates(model)]


@needs_timm
def test_classes_and_channels_are_the_datas() -> None:
    model = build(section("resnet10t"), 7, 1, 32)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


@needs_timm
def test_an_architecture_that_timm_does_not_have() -> None:
    with pytest.raises(RecipeError, match="timm has no 'resnetrs10'") as caught:
        build(section("resnetrs10"), 10, 3, 32)
    assert caught.value.hint == "did you mean 'resnetrs101'? all: timm.list_models()"


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError"])  # the second: a torchvision of another torch
def test_without_timm_the_install_command_is_named(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm.py").write_text(f"raise {error}('operator torchvision::nms does not exist')", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(UsageError, match="model timm needs the timm library: operator torchvision::nms") as caught:
        build(section("resnetrs101"), 1000, 3, 160)
    assert str(caught.value.hint).startswith("pip install timm torchvision")
    assert caught.value.exit_code == 2
