"""What every method of a recipe is: a few hooks that the training loop calls in recipe order, none of them a must."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Context", "Method"]


@dataclass(frozen=True)
class Context:
    """What `prepare` may know of the run."""

    seed: int
    total_steps: int
    task: str
    base: str | None
    build: Callable[[Any], nn.Module] | None = None
    """Makes another model for the task, such as a teacher, from a `model` section; None where nothing trains."""
    phases: tuple[str, ...] = ("train",)
    """Of each step, in order."""


class Method:
    """One line of a recipe's `methods`. The mathematics behind a hook is a plain function; a method only wires it."""

    name: str
    continues: bool = False
    """Whether it goes on with an adapter that the base holds, which brings its own settings along."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Operate on the model before the optimizer exists."""

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameters with settings of their own: `params`, and `lr` or `weight_decay`."""
        return []

    def penalty(self, model: nn.Module, batch: dict[str, Tensor], outputs: Any, phase: str) -> Tensor | None:
        """A term to add to the task's loss."""
        return None

    def after_backward(self, model: nn.Module, optimizer: torch.optim.Optimizer, phase: str) -> None:
        """Work on gradients: they are complete, averaged over processes, unscaled, and not yet clipped."""

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, phase: str) -> bool:
        """Work on weights; True if parameters were added, removed or resized."""
        return False

    def follow(self, carry: Callable[[str, str, Callable[[Tensor], Tensor]], None]) -> None:
        """Call `carry(old name, new name, image)` wherever a parameter takes another's place, for its average's sake.

        `image` makes of a tensor of the old one's shape what it becomes under the new one.
        """

    def export(self, model: nn.Module, path: Path) -> None:
        """Write what the run leaves behind."""

    def closing_notes(self) -> list[str]:
        """What the end of a run should say."""
        return []

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: JSON scalars, and tensors under "tensors"."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put `state` back, after `prepare`."""

    def scalars(self) -> dict[str, float]:
        """What to log beside the loss."""
        return {}
