"""A small model of Linear layers, convolutions, norms and biases, and what fine-tuning makes of it."""

from __future__ import annotations

from pathlib import Path

import torch
from adapter_folders import Tensors
from safetensors.torch import save_file

from ortho_cli.linalg import Householder

SHAPES: dict[str, tuple[int, ...]] = {
    "block.to_q.weight": (24, 20), "block.to_q.bias": (24,), "block.to_k.weight": (12, 20),
    "block.out.weight": (20, 24), "block.norm.weight": (24,), "block.norm.bias": (24,), "conv.weight": (16, 6, 3, 3),
    "point.weight": (16, 12, 1, 1), "word_embeddings.weight": (30, 12),
}  # fmt: skip
LAYERS = [name.removesuffix(".weight") for name, shape in SHAPES.items() if len(shape) > 1 and "word" not in name]


def model(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def save(path: Path, tensors: Tensors) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def turned(tensors: Tensors, rank: int = 4, *, layers: list[str] | None = None) -> Tensors:
    """Every layer behind reflections of its own, in float64 until the end."""
    generator = torch.Generator().manual_seed(7)
    result = dict(tensors)
    for name in LAYERS if layers is None else layers:
        weight = tensors[f"{name}.weight"]
        matrix = weight.double().flatten(1)
        pairs = torch.randn(matrix.shape[1], rank // 2, generator=generator).repeat_interleave(2, dim=1)
        vectors = pairs + 0.3 * torch.randn(matrix.shape[1], rank, generator=generator)
        result[f"{name}.weight"] = Householder(vectors.double()).apply(matrix).reshape(weight.shape).to(weight.dtype)
    return result


def shifted(tensors: Tensors, rank: int = 4, *, layers: list[str] | None = None) -> Tensors:
    """Every layer plus a low-rank sum."""
    generator = torch.Generator().manual_seed(8)
    result = dict(tensors)
    for name in LAYERS if layers is None else layers:
        weight = tensors[f"{name}.weight"]
        rows, cols = weight.flatten(1).shape
        up, down = torch.randn(rows, rank, generator=generator), torch.randn(rank, cols, generator=generator)
        result[f"{name}.weight"] = weight + 0.1 * (up @ down).reshape(weight.shape)
    return result


def noisy(tensors: Tensors, amount: float = 0.05) -> Tensors:
    """Every tensor moved everywhere, as a full fine-tune does."""
    generator = torch.Generator().manual_seed(9)
    return {name: tensor + amount * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
