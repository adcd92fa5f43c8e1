"""How much each coordinate of a generator's code does to the picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["VALUES", "activeness"]

VALUES = (-2.0, 0.0, 2.0)  # to which a coordinate is set; the other columns are held
PART = 32  # codes at a time


def activeness(
    make: Callable[[Tensor], Tensor], codes: Tensor, latents: int, say: Callable[[str], None] = lambda line: None
) -> Tensor:
    """The variance of a picture over three values of one coordinate, a mean over pixels and codes.

    Args:
        make: codes ``(B, n)`` to pictures in [-1, 1].
        codes: ``(N, n)``, the same for every coordinate.
        latents: leading columns, which are the coordinates.
        say: takes a line of progress.

    Returns:
        ``(latents,)`` float64, not negative; 0 for a coordinate that does nothing.

    Cost: ``3 N latents`` pictures.
    Reference: the Hessian penalty's and OroJaR's figures, arXiv:2008.10599, arXiv:2108.07668.

    >>> activeness(lambda z: z[:, :, None, None].sum(1, keepdim=True), torch.zeros(5, 2), 1).tolist()
    [4.0]
    """
    found = torch.zeros(latents, dtype=torch.float64)
    for column in range(latents):
        for part in torch.split(codes, PART):
            moved = part.repeat(len(VALUES), 1)
            moved[:, column] = moved.new_tensor(VALUES).repeat_interleave(len(part))
            pictures = make(moved).double()
            found[column] += pictures.view(len(VALUES), len(part), -1).var(0).mean(1).sum().cpu()
        say(f"activeness: {column + 1} of {latents} coordinates")
    return found / len(codes)
