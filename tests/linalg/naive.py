"""Dense float64 references: the definitions written out, at any cost."""

from __future__ import annotations

import torch
from torch import Tensor


def chain(vectors: Tensor, eps: float = 0.0) -> Tensor:
    """`H_1 ... H_r`, one dense reflection after the other."""
    wide = vectors.double()
    product = torch.eye(wide.shape[0], dtype=torch.float64)
    for column in wide.T:
        v = column / torch.sqrt(column @ column + eps)
        product = product @ (torch.eye(len(v), dtype=torch.float64) - 2 * torch.outer(v, v))
    return product


def golden(width: int, rank: int, phase: float) -> Tensor:
    """The vectors u(d, r, p) that the golden numbers of the geometry facts are stated for."""
    i = torch.arange(width, dtype=torch.float64)[:, None]
    j = torch.arange(rank, dtype=torch.float64)[None, :]
    half = torch.floor(j / 2)
    return torch.sin(0.7 * i + 1.3 * half + phase + 0.05 * i * half) + 0.25 * torch.cos(0.9 * i - 0.4 * j + phase)


def relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius error, relative to what is expected (absolute below 1)."""
    return float((found.double() - expected.double()).norm() / max(1.0, float(expected.double().norm())))
