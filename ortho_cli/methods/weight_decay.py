"""How an optimizer decays weights: through the gradient, or beside the gradient's step."""

from __future__ import annotations

import torch

__all__ = ["decoupled"]


def decoupled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer decays weights beside the gradient step (AdamW, Muon, NAG) and not through the gradient.

    >>> parameters = [torch.nn.Parameter(torch.zeros(1))]
    >>> decoupled(torch.optim.SGD(parameters)), decoupled(torch.optim.AdamW(parameters))
    (False, True)
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # what accelerate wraps
    groups = inner.param_groups
    if any(group.get("decoupled_weight_decay", False) for group in groups):
        return True
    # Of torch's own all others add decay to the gradient; those written out in ortho follow papers that do not.
    return isinstance(inner, torch.optim.Muon) or not type(inner).__module__.startswith("torch.optim")
