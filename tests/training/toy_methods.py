"""A method that writes down what it is told, and changes the shapes of a model in the middle of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.methods.method import Context, Method

__all__ = ["Halving"]


class Halving(Method):
    """Halves the hidden layer of an MLP after its second step, and hands on what the optimizer knew of the rest."""

    name = "gor"

    def prepare(self, model: nn.Module, context: Context) -> None:
        self.told: list[str] = [f"prepare {context.total_steps}"]

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        self.told.append("param_groups")
        return []

    def penalty(self, model: nn.Module, batch: dict[str, Tensor], outputs: Any, phase: str) -> Tensor:
        self.told.append(f"penalty {phase} {len(outputs)} {'image' in batch}")
        return outputs.new_zeros(())

    def after_backward(self, model: nn.Module, optimizer: torch.optim.Optimizer, phase: str) -> None:
        norm = torch.stack([value.grad.norm() for value in model.parameters() if value.grad is not None]).norm()
        self.told.append(f"after_backward {norm > 0.01}")

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, phase: str) -> bool:
        self.told.append(f"after_step {step}")
        if step != 1:
            return False
        first, last = (module for module in model.modules() if isinstance(module, nn.Linear))
        half = first.out_features // 2
        rows, columns = slice(half), (slice(None), slice(half))
        for layer, name, kept in ((first, "weight", rows), (first, "bias", rows), (last, "weight", columns)):
            old = getattr(layer, name)
            new = nn.Parameter(old.detach()[kept].clone())
            setattr(layer, name, new)
            moments = optimizer.state.pop(old)
            optimizer.state[new] = {key: value[kept] if value.dim() else value for key, value in moments.items()}
        first.out_features = last.in_features = half
        return True
