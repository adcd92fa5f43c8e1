"""What the tests of surgery do to adapters: give them values that matter, change a file, read it all."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def read(path: Path) -> Tensors:
    """Every tensor of a safetensors file, or of all those below a folder, through the reference reader."""
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    found: Tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, framework="pt") as opened:
        return dict(opened.metadata() or {})


def rewrite(path: Path, tensors: Tensors) -> Path:
    """Replace the tensors of a safetensors file, keeping its metadata."""
    save_file(tensors, path, metadata=metadata(path))
    return path


def train(folder: Path, amount: float = 0.3, seed: int = 0) -> Path:
    """Move every number of an adapter folder (its subfolders too), as training would; returns the folder."""
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(folder.rglob("adapter_model.safetensors")):
        moved = {
            name: tensor + amount * tensor.std() * torch.randn(tensor.shape, generator=generator)
            for name, tensor in read(path).items()
        }
        rewrite(path, moved)
    return folder


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """``||found - wanted|| / ||wanted||`` in float64."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())
