"""OLR in training: each chosen layer steps at the rate that best keeps its length, where that is below everyone's.

The mathematics is `linalg/olr.py`. It reads the gradient as the methods before it left it: after `nog`, the nearest
orthogonal one. Clipping comes later and shortens the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ortho_cli.linalg.olr import accepted_rate, olr

from .adapter_layer import whole
from .matrix_parameters import MatrixMethod

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import OLR

__all__ = ["OLRMethod"]


class OLRMethod(MatrixMethod):
    """The recipe's `olr`."""

    name = "olr"

    def __init__(self, config: OLR) -> None:
        super().__init__(config)
        self._accepted = 0
        self._steps = 0
        self._shares: dict[str, list[float]] = {}  # of the base rate, in the last step of each phase

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Each chosen parameter by itself, so that its rate is its own.

        Raises:
            TargetError: before the first step: a later method froze or replaced every layer.
        """
        return [{"params": [parameter]} for parameter in self._present(model)]

    @torch.no_grad()
    def after_backward(self, model: nn.Module, optimizer: torch.optim.Optimizer, phase: str) -> None:
        """Set the rate of this step; the schedule sets the base anew before the next."""
        stepped = self._stepped(optimizer)
        found = [olr(whole(p), whole(p.grad)) for p, _ in stepped if p.grad is not None]
        # One wait for the device, not one for each layer.
        optimal = torch.stack([each.to(found[0].device) for each in found]).tolist() if found else []
        shares = self._shares[phase] = []
        for (_, group), each in zip(stepped, optimal, strict=True):
            base = float(group["lr"])
            group["lr"], accepted = accepted_rate(each, base, self.config.floor)
            self._accepted, self._steps = self._accepted + accepted, self._steps + 1
            shares.append(group["lr"] / base if base else 1.0)

    def scalars(self) -> dict[str, float]:
        """The share of steps that took the optimal rate so far, and the last step's rates over the base."""
        if not self._steps:
            return {}
        told = {"accepted": self._accepted / self._steps}
        if shares := [share for each in self._shares.values() for share in each]:
            told |= {"rate_mean": sum(shares) / len(shares), "rate_min": min(shares)}
        return told

    def state(self) -> dict[str, Any]:
        """What was counted."""
        return {
            "accepted": self._accepted,
            "steps": self._steps,
            "shares": {phase: list(each) for phase, each in self._shares.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Put it back."""
        self._accepted, self._steps, self._shares = state["accepted"], state["steps"], dict(state["shares"])
