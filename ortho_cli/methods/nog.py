"""NOG in training: chosen layers follow the nearest orthogonal matrix of their gradient, or of the optimizer's update.

`nog_` is one line for anyone's loop; `NOGMethod` is the same in a recipe. The mathematics is `linalg/nog.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg.nog import nearest_orthogonal

from .adapter_layer import whole
from .matrix_parameters import MatrixMethod
from .sharded import as_sharded
from .weight_decay import decoupled

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import NOG

__all__ = ["NOGMethod", "nog_"]


def nog_(weight: Tensor, *, method: str = "auto") -> bool:
    """Make a weight's gradient the nearest orthogonal one, in place: as long in every direction that it has.

    Call it after `loss.backward()` and before `optimizer.step()`. Momentum and coupled weight decay then add to an
    orthogonal gradient; the learning rate alone says how far a step goes.

    Args:
        weight: two or more dimensions, with a gradient; any plain float type and strides. It may be sharded (DTensor):
            then all processes must call.
        method: how the polar factor is found, as :func:`~ortho_cli.linalg.nog.nearest_orthogonal` takes it.

    Returns:
        True; False where the gradient holds a value that is not finite, and was left as it is.

    Raises:
        TargetError: no gradient, or fewer than two dimensions.
        UsageError: no such method.

    Cost: with `k = min(m, n)` about `4 m n k + 11 k^3` flops; milliseconds for a thin matrix of a million entries.
    Reference: arXiv:2207.02119, section 4.

    >>> import ortho_cli as ortho
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> optimizer, images = torch.optim.SGD(model.parameters(), lr=0.02), torch.randn(4, 3, 8, 8)
    >>> for _ in range(3):
    ...     loss = model(images).square().mean()
    ...     optimizer.zero_grad(); loss.backward()
    ...     done = ortho.nog_(model[0].weight)
    ...     optimizer.step()
    >>> done, torch.linalg.svdvals(model[0].weight.grad.flatten(1)).round(decimals=4).unique().tolist()
    (True, [1.0])
    """
    if weight.grad is None:
        raise TargetError(
            f"a weight of shape {tuple(weight.shape)} has no gradient", hint="call loss.backward() before"
        )
    return _orthogonalise_(weight.grad, 1.0, method)


@torch.no_grad()
def _orthogonalise_(tensor: Tensor, length: float, method: str) -> bool:
    """Make a tensor as long as `length` in every direction that it has; False, and as it is, if it is not finite."""
    try:
        nearest = nearest_orthogonal(whole(tensor), method=method)
    except NumericsError:
        return False
    tensor.copy_(as_sharded(length * nearest, tensor))
    return True


class NOGMethod(MatrixMethod):
    """The recipe's `nog`."""

    # Before momentum, gradients are changed where all methods change theirs. After momentum, what is made orthogonal is
    # the optimizer's own update: hooks around its step, behind clipping and all methods, let it step from zero, so that
    # the update is read without the rounding of a difference between two weights.

    name = "nog"

    def __init__(self, config: NOG) -> None:
        super().__init__(config)
        self._skipped = 0
        self._hooks: list[RemovableHandle] = []

    def after_backward(self, model: nn.Module, optimizer: torch.optim.Optimizer, phase: str) -> None:
        """Make gradients orthogonal, or see to it that the coming update is."""
        stepped = self._stepped(optimizer)
        if self.config.order == "before":
            for parameter, _ in stepped:
                self._skipped += not nog_(parameter, method=self.config.polar)
            return
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)  # what accelerate wraps
        beside = decoupled(optimizer)
        before: list[Tensor] = []

        @torch.no_grad()
        def lift(*_: Any) -> None:
            for parameter, group in stepped:
                before.append(parameter.detach().clone())
                if group["weight_decay"] and not beside and parameter.grad is not None:
                    parameter.grad.add_(before[-1], alpha=group["weight_decay"])  # of a zero there would be none
                parameter.zero_()

        @torch.no_grad()
        def put_back(*_: Any) -> None:
            for (parameter, group), old in zip(stepped, before, strict=True):
                rate = float(group["lr"])
                self._skipped += not _orthogonalise_(parameter, rate, self.config.polar)
                parameter.add_(old, alpha=1 - rate * group["weight_decay"] if beside else 1.0)

        self._hooks = [inner.register_step_pre_hook(lift), inner.register_step_post_hook(put_back)]

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, phase: str) -> bool:
        """The hooks were for one step; a gradient scaler may have left it out."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        return False

    def scalars(self) -> dict[str, float]:
        """How many layers, and how many of their gradients were not finite so far."""
        return {"layers": float(len(self.matrices)), "skipped": float(self._skipped)}

    def state(self) -> dict[str, Any]:
        """What was counted."""
        return {"skipped": self._skipped}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put it back."""
        self._skipped = state["skipped"]
