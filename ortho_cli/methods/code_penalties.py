"""Penalties on how a generator's code moves what it makes: the Hessian penalty, and OroJaR's orthogonal Jacobian.

The mathematics is `linalg/curvature.py`. Both are of a GAN's generator phase, on the outputs of chosen layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from ortho_cli.checkpoints.targets import select
from ortho_cli.errors import TargetError
from ortho_cli.linalg.curvature import hessian_penalty, orthogonal_jacobian_penalty
from ortho_cli.linalg.precision import at_least_float32

from .inject import named_layers
from .method import Context, Method

if TYPE_CHECKING:
    from ortho_cli.recipe.methods_gan import Hessian, OroJaR

__all__ = ["HessianMethod", "OroJaRMethod", "largest_of_processes"]


def largest_of_processes(values: Tensor) -> Tensor:
    """The largest of each value over the processes that train together, once the mean over them is taken.

    A process that has it gives it `world / holders` times, the others give 0: the mean of values and gradients, which
    is what becomes of a loss, is then that of one process with all samples.

    >>> import torch
    >>> largest_of_processes(torch.tensor([3.0, 1.0])).tolist()
    [3.0, 1.0]
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    most = values.detach().clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    holds = (values.detach() == most).to(values.dtype)
    holders = holds.clone()
    dist.all_reduce(holders)
    return values * holds * dist.get_world_size() / holders


class _CodePenalty(Method):
    """What both have: the layers, whose outputs are caught while the generator runs."""

    def __init__(self, config: Hessian | OroJaR) -> None:
        super().__init__(config)
        self.layers: list[str] = []  # by name: another method may put others there

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Choose the layers.

        Raises:
            TargetError: a model without a generator, or a pattern that matches nothing in it.
        """
        if not hasattr(model, "generator"):
            raise TargetError(f"{self.name} is of a generator, and the task {context.task} has none", hint="remove it")
        chosen = self.chosen(model)
        names = {name for layers in chosen.values() for name in layers}
        self.layers = [name for name, _ in model.named_modules() if name in names]

    def chosen(self, model: nn.Module) -> dict[str, list[str]]:
        """The layers of the generator that each pattern of the recipe means."""
        shapes = {name: shape for name, shape in named_layers(model).items() if name.startswith("generator.")}
        return {p: list(select([p], shapes, "plain", self.config.exclude).layers) for p in self.config.targets}

    def penalty(self, model: nn.Module, batch: dict[str, Tensor], outputs: Any, phase: str) -> Tensor | None:
        """The weighted penalty around the codes of this step."""
        if phase != "generator" or not self.config.penalty:
            return None
        code: Tensor = outputs["noise"]
        signs: Tensor = outputs["signs"](self.config.directions)
        estimate = hessian_penalty if self.name == "hessian" else orthogonal_jacobian_penalty
        value = estimate(self._run(model), code, signs, self.config.step, largest_of_processes)
        return float(self.config.penalty) * value

    def _run(self, model: nn.Module) -> Any:
        generator: Any = model.get_submodule("generator")

        def run(code: Tensor) -> list[Tensor]:
            caught: list[Tensor] = []

            def catch(layer: nn.Module, inputs: Any, output: Tensor) -> None:
                caught.append(at_least_float32(output, "output"))

            hooks = [model.get_submodule(name).register_forward_hook(catch) for name in self.layers]
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
