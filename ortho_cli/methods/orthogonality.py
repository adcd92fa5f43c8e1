r"""How far reflections are from orthogonal to each other: the penalty of HRA, and what a run logs of it.

Orthogonality trades capacity for regularity: lambda between 0 (free reflections) and infinity (Gram-Schmidt).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor, nn

from ortho_cli.errors import TargetError
from ortho_cli.linalg.planes import plane_angles

from .adapter_layer import whole
from .hra_layer import HRALayer

__all__ = ["ANGLE_RESOLUTION", "orthogonality_penalty", "reflection_details", "reflection_summary", "vectors_penalty"]

# Eigenvalues of V^T V below this are rounding of the float32 vectors: a pair that turns by less than 2e-6 rad.
ANGLE_RESOLUTION = 1e-12


def orthogonality_penalty(model: nn.Module, form: str = "squared") -> Tensor:
    r"""Measure how far the reflections of a model's HRA adapters are from orthogonal, as a penalty to add to a loss.

    :math:`\sum_{layers} \|I - V^\top V\|_F^2`, `V` the vectors at unit length; zero where all reflections commute. The
    paired start has `r` a layer, and no gradient there: only the task parts the pairs.

    Args:
        model: with HRA adapters; those of the Gram-Schmidt variant are orthogonal by construction, and count nothing.
        form: "squared", the paper's, or "norm", the unsquared norm of its code.

    Returns:
        0-dimensional float32, differentiable; multiply it by lambda (the paper: 1e-6 to 1e-3).

    Raises:
        TargetError: the model has no HRA adapter.

    Cost: `O(d r^2)` a layer; layers of equal shape are taken together.
    Reference: HRA, arXiv:2405.17484, eq. (6); the norm as in its trainers.

    >>> import ortho_cli as ortho
    >>> model = ortho.add_adapter(nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 16)), rank=4, targets=["0", "1"])
    >>> _ = [nn.init.normal_(layer.vectors, generator=torch.Generator().manual_seed(0)) for layer in model]
    >>> optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    >>> start = ortho.orthogonality_penalty(model).item()
    >>> for _ in range(50):
    ...     loss = ortho.orthogonality_penalty(model)
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
    >>> loss.item() < 0.01 * start
    True
    """
    layers = [module for module in model.modules() if isinstance(module, HRALayer)]
    if not layers:
        raise TargetError("the model has no HRA adapter", hint="put one in: ortho.add_adapter(model, rank, targets)")
    chains = [layer.vectors for layer in layers if not layer.form.span]
    return vectors_penalty(chains, form) if chains else torch.zeros((), device=layers[0].vectors.device)


def vectors_penalty(vectors: Sequence[Tensor], form: str = "squared") -> Tensor:
    """The same for bare vectors, each `(d, r)`, at least one.

    >>> vectors_penalty([torch.tensor([[1.0, 1.0], [0.0, 0.0]])]).item()
    2.0
    """
    if form not in ("squared", "norm"):
        raise ValueError(f"form is 'squared' or 'norm', found {form!r}")
    buckets: dict[tuple[object, ...], list[Tensor]] = {}
    for each in map(whole, vectors):
        buckets.setdefault((tuple(each.shape), each.dtype, each.device), []).append(each)
    total: Tensor | None = None
    with torch.autocast(vectors[0].device.type, enabled=False):
        for members in buckets.values():
            wide = torch.stack(members).to(torch.promote_types(members[0].dtype, torch.float32))
            unit = wide / torch.linalg.vector_norm(wide, dim=1, keepdim=True)
            gap = unit.mT @ unit - torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
            norms = torch.linalg.vector_norm(gap, dim=(1, 2))
            value = (norms if form == "norm" else gap.square()).sum()
            total = value if total is None else total + value.to(total.device)
    assert total is not None, "the penalty of no vectors"
    return total


@torch.no_grad()
def reflection_details(layer: HRALayer) -> dict[str, float]:
    """How far one layer's reflections are from orthogonal, `||I - V^T V||_F`, and the mean angle they turn by.

    Angles are those of the planes that `rank` reflections can turn, in radians, unturned ones counted as 0; computed
    from the Gram, `O(r^3)` in float64. Soft reflections are no rotation and have no angle.
    """
    chain = layer.chain().double()
    unit = chain / torch.linalg.vector_norm(chain, dim=0)
    gram = (unit.T @ unit).cpu()
    eye = torch.eye(gram.shape[0], dtype=gram.dtype)
    found = {"defect": 0.0 if layer.form.span else float(torch.linalg.matrix_norm(gram - eye))}
    if layer.form.eps:
        return found
    factor = torch.linalg.solve_triangular(eye / 2 + gram.triu(1), eye, upper=True)
    values, basis = torch.linalg.eigh(gram)
    kept = values > ANGLE_RESOLUTION
    upper = values[kept].sqrt()[:, None] * basis[:, kept].T  # V = Z upper with Z orthonormal
    core = torch.eye(int(kept.sum()), dtype=gram.dtype) - upper @ factor @ upper.T
    planes = (gram.shape[0] + 1) // 2
    return found | {"angle": float(plane_angles(core[None]).clamp(max=pi).sum()) / planes}


def reflection_summary(layers: Sequence[HRALayer]) -> dict[str, float]:
    """What a run logs: the mean and the largest defect, and the mean angle, of the layers."""
    found = [reflection_details(layer) for layer in layers]
    defects, angles = ([each[key] for each in found if key in each] for key in ("defect", "angle"))
    summary = {"defect_mean": sum(defects) / len(defects), "defect_max": max(defects)}
    return summary | ({"angle_mean": sum(angles) / len(angles)} if angles else {})
