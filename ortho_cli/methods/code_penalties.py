"""Penalties on how a generator's code moves what it makes: the Hessian penalty, and OroJaR's orthogonal Jacobian.

The mathematics is `linalg/curvature.py`. Both are of a GAN's generator phase, on the outputs of chosen layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ortho_cli.checkpoints.targets import select
from ortho_cli.errors import TargetError
from ortho_cli.linalg.curvature import hessian_penalty, orthogonal_jacobian_penalty

from .inject import named_layers
from .method import Context, Method

if TYPE_CHECKING:
    from ortho_cli.recipe.methods_gan import Hessian, OroJaR

__all__ = ["HessianMethod", "OroJaRMethod"]


class _CodePenalty(Method):
    """What both have: the layers, whose outputs are caught while the generator runs."""

    def __init__(self, config: Hessian | OroJaR) -> None:
        super().__init__(config)
        self.layers: list[nn.Module] = []

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Choose the layers.

        Raises:
            TargetError: a model without a generator, or a pattern that matches nothing in it.
        """
        if not hasattr(model, "generator"):
            raise TargetError(f"{self.name} is of a generator, and the task {context.task} has none", hint="remove it")
        chosen = self.chosen(model)
        names = {name for layers in chosen.values() for name in layers}
        self.layers = [module for name, module in model.named_modules() if name in names]

    def chosen(self, model: nn.Module) -> dict[str, list[str]]:
        """The layers of the generator that each pattern of the recipe means."""
        shapes = {name: shape for name, shape in named_layers(model).items() if name.startswith("generator.")}
        return {p: list(select([p], shapes, "plain", self.config.exclude).layers) for p in self.config.targets}

    def penalty(self, model: nn.Module, batch: dict[str, Tensor], outputs: Any, phase: str) -> Tensor | None:
        """The weighted penalty around the codes of this step."""
        if phase != "generator" or not self.config.penalty:
            return None
        code: Tensor = outputs["noise"]
        drawn = torch.randint(0, 2, (self.config.directions, *code.shape), device=code.device)
        estimate = hessian_penalty if self.name == "hessian" else orthogonal_jacobian_penalty
        value: Tensor = self.config.penalty * estimate(self._run(model), code, 2.0 * drawn - 1, self.config.step)
        return value

    def _run(self, model: nn.Module) -> Any:
        generator: Any = model.get_submodule("generator")

        def run(code: Tensor) -> list[Tensor]:
            caught: list[Tensor] = []
            hooks = [each.register_forward_hook(lambda *given: caught.append(given[2].float())) for each in self.layers]
            try:
                generator(code)
            finally:
                for hook in hooks:
                    hook.remove()
            return caught

        return run


class HessianMethod(_CodePenalty):
    """The recipe's `hessian`."""

    name = "hessian"


class OroJaRMethod(_CodePenalty):
    """The recipe's `orojar`."""

    name = "orojar"
