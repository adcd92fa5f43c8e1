"""PEFT loads what extract writes: the fine-tuned model's outputs from the base and the adapter."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import read, relative_error
from safetensors.torch import save_file
from torch import Tensor, nn
from tuned_models import shifted, turned

from ortho_cli.surgery.extract import extract
from ortho_cli.surgery.merge import merge

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's own imports warn about packages it looks for
    peft = pytest.importorskip("peft")


class Small(nn.Module):
    """A convolution with stride and padding, then two Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 16, 3, stride=2, padding=1)
        self.block = nn.ModuleDict({"to_q": nn.Linear(16, 24), "out": nn.Linear(24, 12)})

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.conv(images).relu().mean((2, 3))
        result: Tensor = self.block["out"](self.block["to_q"](pooled).relu())
        return result


LAYERS = ["conv", "block.to_q", "block.out"]


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def tuned_copy(model: Small, change: Any) -> Small:
    other = copy.deepcopy(model)
    other.load_state_dict(change(dict(model.state_dict()), 4, layers=LAYERS))
    return other


def written(model: Small, path: Path) -> Path:
    save_file(model.state_dict(), path)
    return path


@pytest.mark.parametrize(("kind", "change"), [("hra", turned), ("lora", shifted)])
def test_peft_gives_the_tuned_model(small: Small, tmp_path: Path, kind: str, change: Any) -> None:
    tuned = tuned_copy(small, change)
    images = torch.randn(5, 6, 8, 8)
    with torch.no_grad():
        wanted, before = tuned(images), small(images)
        assert relative_error(before, wanted) > 0.05
        paths = [written(small, tmp_path / "base.safetensors"), written(tuned, tmp_path / "tuned.safetensors")]
        report = extract(*paths, tmp_path / "found", kind=kind, rank=4)
        assert report.layers == 3
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(small), tmp_path / "found").eval()
        assert relative_error(loaded(images), wanted) < 1e-5
        merged = loaded.merge_and_unload()
        assert relative_error(merged(images), wanted) < 1e-5


def test_peft_gives_a_merged_rotation_its_residual(small: Small, tmp_path: Path) -> None:
    """PEFT wraps the base behind the rotation; both of the parts then are the tuned model."""
    tuned = tuned_copy(small, lambda state, rank, layers: shifted(turned(state, rank, layers=layers), 2, layers=layers))
    paths = [written(small, tmp_path / "base.safetensors"), written(tuned, tmp_path / "tuned.safetensors")]
    extract(*paths, tmp_path / "found", kind="both", rank=16)  # all that the narrowest layer has
    images = torch.randn(5, 6, 8, 8)
    with torch.no_grad():
        rotated = peft.PeftModel.from_pretrained(copy.deepcopy(small), tmp_path / "found" / "rotation")
        loaded = peft.PeftModel.from_pretrained(rotated.merge_and_unload(), tmp_path / "found" / "residual").eval()
        assert relative_error(loaded(images), tuned(images)) < 1e-5
    parts = [tmp_path / "found" / "rotation", tmp_path / "found" / "residual"]
    merge(paths[0], parts, tmp_path / "again.safetensors")
    again, wanted = read(tmp_path / "again.safetensors"), tuned.state_dict()
    assert max(relative_error(again[f"{name}.weight"], wanted[f"{name}.weight"]) for name in LAYERS) < 1e-6
