"""Adapters as training would leave them: every vector and factor moved a little, the same every time."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

__all__ = ["nudged"]

ADAPTED = (".hra_u", ".lora_A.weight", ".lora_B.weight")


def nudged(path: Path, amount: float = 0.3) -> Path:
    """Move the adapter in a file, or in every file of a folder; returns the path."""
    generator = torch.Generator().manual_seed(0)
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        for name, tensor in tensors.items():
            if name.endswith(ADAPTED):
                noise = torch.randn(tensor.shape, generator=generator)
                tensors[name] = tensor + amount * max(float(tensor.std()), 0.1) * noise
        save_file(tensors, file, metadata)
    return path
