"""The recipe's `track_conditioning`: how well conditioned the covariance of chosen layers is, while any run trains.

Hooks on the layers sum what passes in the steps to be measured; the numbers are `linalg/conditioning.py`'s, over all
parts of the batch and all processes.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ortho_cli.checkpoints.targets import select
from ortho_cli.errors import TargetError
from ortho_cli.linalg.conditioning import Conditioning, conditioning

from .inject import named_layers
from .method import Context, Method
from .whiten import BATCH_NORM, norm_widths
from .whitening import Whitening, grouped, sum_over_processes

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from ortho_cli.recipe.methods import TrackConditioning

__all__ = ["MEASURED_AT", "TrackConditioningMethod"]

CHANNELS_SECOND = (
    Whitening, BATCH_NORM, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.modules.conv._ConvNd,
)  # fmt: skip
NORMALISING = (Whitening, BATCH_NORM, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)


MEASURED_AT = "measured_at"


class _Sums(NamedTuple):
    """Of rows of samples, in float64: how many, their sum, their products; and how exact the samples were."""

    samples: Tensor
    total: Tensor
    products: Tensor
    rounding: float

    def covariance(self) -> Tensor:
        """The biased covariance `(groups, n, n)`, over all processes."""
        samples, total, products = map(sum_over_processes, (self.samples, self.total, self.products))
        mean = total / samples
        return products / samples - mean[..., :, None] * mean[..., None, :]


class TrackConditioningMethod(Method):
    """The recipe's `track_conditioning`."""

    name = "track_conditioning"

    def __init__(self, config: TrackConditioning) -> None:
        super().__init__(config)
        self.layers: list[str] = []
        self._sums: dict[str, _Sums] = {}
        self._found: dict[str, Conditioning] = {}
        self._measured_at = 0
        self._hooks: list[RemovableHandle] = []
        self._trains = False
        self._last_phase = ""
        self._step = 0  # under way, or to come

    def chosen(self, model: nn.Module) -> dict[str, list[str]]:
        """The layers that each pattern of the recipe means."""
        targets, layers = self.config.targets, named_layers(model)
        if targets == "auto":
            whitened = [name for name, module in model.named_modules() if isinstance(module, Whitening)]
            return {"auto": whitened or list(norm_widths(model))[:1]}
        widths = {name: (module.features,) for name, module in model.named_modules() if isinstance(module, Whitening)}
        known = {name: shape for name, shape in {**layers, **norm_widths(model), **widths}.items() if name}
        return {each: list(select([each], known, layers.layout, self.config.exclude).layers) for each in targets}

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Choose layers, by name: what stands there may become another layer.

        Raises:
            TargetError: a pattern that matches nothing, or no layers.
        """
        self._trains, self._last_phase = context.build is not None, context.phases[-1]
        self.layers = list(dict.fromkeys(name for names in self.chosen(model).values() for name in names))
        if not self.layers:
            raise TargetError(
                f"a {type(model).__name__} has no norms whose input could be tracked",
                hint="name layers: targets: [PATTERN]",
            )

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """None of its own; asked once all methods have had their way with the model, so the time to hook in."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for name in self.layers if self._trains else ():
            module = model.get_submodule(name)
            self._hooks.append(module.register_forward_hook(self._observer(name, module)))
        return []

    def _observer(self, name: str, module: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
        takes_input = {"input": True, "output": False}.get(self.config.of, isinstance(module, NORMALISING))
        second = isinstance(module, CHANNELS_SECOND)
        groups = module.groups if isinstance(module, Whitening) else 1

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        @torch.no_grad()
        def observe(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            values = inputs[0] if takes_input else output
            assert isinstance(values, Tensor), f"{name} passes no plain tensor"
            rows = grouped(values if second else values.movedim(-1, 1), groups).double()
            samples, total, products = rows.new_tensor(rows.shape[-1]), rows.sum(-1), rows @ rows.mT
            earlier = self._sums.get(name)
            if earlier is not None:  # another part of the batch, or another use of the layer
                samples, total = samples + earlier.samples, total + earlier.total
                products = products + earlier.products
            self._sums[name] = _Sums(samples, total, products, torch.finfo(values.dtype).eps)

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if torch.is_grad_enabled() and self._is_due():  # evaluation, which has none, comes between steps
                observe(module, inputs, output)

        return hook

    def _is_due(self) -> bool:
        done = self._step + 1
        return done == 1 or done % int(self.config.every) == 0

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, phase: str) -> bool:
        """Turn the sums into numbers, if it was time."""
        for name, sums in self._sums.items():
            module = model.get_submodule(name)
            ridge = self.config.ridge
            if ridge is None:
                ridge = module.ridge if isinstance(module, Whitening) else 0.0
            self._found[name] = conditioning(sums.covariance(), ridge, rounding=sums.rounding)
        if self._sums:
            self._measured_at = step + 1
        self._sums.clear()
        self._step = step + (phase == self._last_phase)
        return False

    def scalars(self) -> dict[str, float]:
        """Of every layer, what was measured last, and at which step that was: other lines of the log repeat it."""
        if not self._found:
            return {}
        values = {
            f"{name}/{key}": value for name, found in self._found.items() for key, value in found._asdict().items()
        }
        return {MEASURED_AT: float(self._measured_at), **values}

    def state(self) -> dict[str, Any]:
        """What was measured last, None for what is not finite, and where the run stands."""
        found = {name: [value if isfinite(value) else None for value in each] for name, each in self._found.items()}
        return {"step": self._step, MEASURED_AT: self._measured_at, "found": found}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put it back."""
        self._step, self._measured_at = state["step"], state[MEASURED_AT]
        self._found = {
            name: Conditioning(*(inf if value is None else value for value in each))
            for name, each in state["found"].items()
        }
