"""Parameters of a model that are matrices, by the names of their layers, and what methods that act on them share.

A layer's only parameter of two and more dimensions answers to the layer's name, whatever it is called: a convolution's
weight, the raw filter of an orthogonal one, the original behind a parametrization, a generator's subspace. Where a
module has several, each answers to `module.parameter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ortho_cli.checkpoints.targets import select
from ortho_cli.errors import TargetError

from .method import Context, Method

__all__ = ["MatrixMethod", "MatrixParameter", "matrix_parameters"]

MATRIX = 2  # dimensions at least
INSIDE = ".parametrizations."  # where torch keeps what a parametrized attribute is computed from


@dataclass(frozen=True)
class MatrixParameter:
    """A parameter by where it is kept: what is kept there may be sharded or moved later."""

    name: str
    owner: nn.Module
    attribute: str

    @property
    def parameter(self) -> nn.Parameter | None:
        """As it is now; None where another method has taken it away."""
        return self.owner._parameters.get(self.attribute)

    @property
    def trains(self) -> bool:
        """Whether it is there and learns."""
        return self.parameter is not None and self.parameter.requires_grad


def matrix_parameters(model: nn.Module) -> dict[str, MatrixParameter]:
    """Every parameter of two and more dimensions, in model order, a shared one once; frozen ones too.

    >>> list(matrix_parameters(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LSTM(8, 2))))
    ['0', '2.weight_ih_l0', '2.weight_hh_l0']
    >>> list(matrix_parameters(nn.Linear(2, 3)))
    ['weight']
    """
    found: dict[str, MatrixParameter] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = {key: each for key, each in module.named_parameters(recurse=False) if each.dim() >= MATRIX}
        layer = f".{path}".rpartition(INSIDE)[0].lstrip(".") if isinstance(module, ParametrizationList) else path
        for key, parameter in own.items():
            name = layer if layer and len(own) == 1 and layer not in found else f"{path}.{key}".lstrip(".")
            if id(parameter) not in seen and parameter.numel():
                found[name] = MatrixParameter(name, module, key)
            seen.add(id(parameter))
    return found


class MatrixMethod(Method):
    """What acts on the matrices of chosen layers, whichever of them this phase's optimizer steps."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.matrices: list[MatrixParameter] = []
        self.notes: list[str] = []
        self._lost: list[str] = []
        self._started = False

    def chosen(self, model: nn.Module) -> dict[str, list[str]]:
        """The layers that each pattern of the recipe means."""
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(matrix_parameters(model), ())
        return {p: list(select([p], shapes, "plain", self.config.exclude).layers) for p in self.config.targets}

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Choose the parameters; frozen ones are left out.

        Raises:
            TargetError: a pattern that matches nothing, or nothing that trains.
        """
        names = {name for layers in self.chosen(model).values() for name in layers}
        chosen = [each for name, each in matrix_parameters(model).items() if name in names]
        self.matrices = [each for each in chosen if each.trains]
        if not self.matrices:
            raise TargetError(
                f"{self.name} chose {len(chosen)} layers, none of which trains: {_first(chosen)}",
                hint=f"put {self.name} after the method that adds what trains, or choose other layers",
            )
        left = len(chosen) - len(self.matrices)
        frozen = f"; {left} left out, frozen" if left else ""
        self.notes.append(f"acts on {len(self.matrices)} layers: {_first(self.matrices)}{frozen}")

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """None of its own; asked once all methods have had their way with the model, so the place to look again.

        Raises:
            TargetError: before the first step: a later method froze or replaced every layer.
        """
        self._present(model)
        return []

    def closing_notes(self) -> list[str]:
        """Which of the chosen layers a later method took away."""
        if not self._lost:
            return []
        lost, all_of_them = len(self._lost), len(self.matrices)
        return [f"{lost} of {all_of_them} layers, first {self._lost[0]}, were frozen or replaced later"]

    def _present(self, model: nn.Module) -> list[nn.Parameter]:
        """The chosen parameters that are still the model's and train."""
        own = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        now = [each.parameter for each in self.matrices]
        self._lost = [each.name for each, found in zip(self.matrices, now, strict=True) if id(found) not in own]
        if len(self._lost) == len(self.matrices) and not self._started:  # oialr may replace all of them in the end
            raise TargetError(
                f"none of the {len(self.matrices)} layers that {self.name} chose trains any more",
                hint=f"put {self.name} after the method that freezes or replaces them",
            )
        return [found for found in now if found is not None and id(found) in own]

    def _stepped(self, optimizer: torch.optim.Optimizer) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        """The chosen parameters that an optimizer steps and that have a gradient, each with its group."""
        self._started = True
        groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
        now = [each.parameter for each in self.matrices]
        return [(p, groups[id(p)]) for p in now if p is not None and id(p) in groups and p.grad is not None]


def _first(chosen: Sequence[MatrixParameter], shown: int = 5) -> str:
    """A few names, and how many more."""
    more = f" and {len(chosen) - shown} more" if len(chosen) > shown else ""
    return ", ".join(each.name for each in chosen[:shown]) + more
