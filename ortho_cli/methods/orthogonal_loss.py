"""The orthogonal loss in training: chosen weights pulled towards orthonormal rows, a treatment to compare NOG with.

The mathematics is `linalg/orthogonal_loss.py`; `gor` with one group is its squared form for many layers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ortho_cli.linalg.orthogonal_loss import soft_orthogonality

from .adapter_layer import whole
from .matrix_parameters import MatrixMethod
from .sharded import accumulate

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import OrthogonalLoss

__all__ = ["OrthogonalLossMethod"]


class OrthogonalLossMethod(MatrixMethod):
    """The recipe's `orthogonal_loss`."""

    # Added once a step and not through the loss, for the reasons that `gor` gives.

    name = "orthogonal_loss"

    def __init__(self, config: OrthogonalLoss) -> None:
        super().__init__(config)
        self._values: dict[str, Tensor | float] = {}  # by phase

    def after_backward(self, model: nn.Module, optimizer: torch.optim.Optimizer, phase: str) -> None:
        """Add the gradient for those layers that this phase's optimizer steps."""
        stepped = [parameter for parameter, _ in self._stepped(optimizer)]
        shared = self.config.penalty_form == "mean"  # over layers as well as over entries
        scale = self.config.penalty / (max(1, len(stepped)) if shared else 1)
        total: Tensor | float = 0.0
        for parameter in stepped:
            with torch.enable_grad():
                weight = whole(parameter).detach().requires_grad_()
                value = soft_orthogonality(weight, self.config.penalty_form)
            (gradient,) = torch.autograd.grad(value, weight)
            accumulate(parameter, scale * gradient)
            total = scale * value.detach() + total
        self._values[phase] = total

    def scalars(self) -> dict[str, float]:
        """The weighted penalty of the last step, and how many layers it covers."""
        if not self._values:
            return {}
        return {"penalty": sum(map(float, self._values.values())), "layers": float(len(self.matrices))}

    def state(self) -> dict[str, Any]:
        """The last values; nothing here trains."""
        return {"values": {phase: float(value) for phase, value in self._values.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put them back."""
        self._values = dict(state["values"])
