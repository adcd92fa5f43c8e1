"""Orthogonality-informed adaptive low-rank training, `ortho.oialr`: freeze bases that have settled, train small cores.

During training the orthogonal basis `U V^T` of a weight settles long before what mixes it does. A layer whose basis has
settled becomes `U M VT` with U and VT frozen; only the core M trains on, and its rank is cut at later checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import CheckpointError, UsageError, check_choice

from .basis_layers import BasisLayer
from .oialr_layer import SettlingLayer, from_first
from .oialr_moments import MOMENTS
from .oialr_ranks import CUTS, active_layers, cut_ranks
from .oialr_select import basis_candidates, refused_layers
from .projected_attention import open_attention

__all__ = ["OIALR", "oialr"]

WHENS, ORDERS = ("stable", "step"), ("back", "all")


class OIALR:
    """The layers of a model that settle, and when they are checked; `oialr` has the arguments.

    Attributes:
        layers: in model order.
        opened: attention modules that were opened, by name.
        refused: layers that "auto" left dense for what they are, and why.
        steps: done.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        targets: str | Sequence[str] = "auto",
        when: str = "stable",
        every: int = 200,
        threshold: float = 0.95,
        patience: int = 2,
        start_after: int = 0,
        delay: int = 1000,
        cut: str = "relative",
        beta: float = 0.1,
        keep_first: bool = False,
        keep_last: bool = True,
        order: str = "back",
        share: float = 0.1,
        moments: str = "rotate",
    ) -> None:
        for name, value, choices in (
            ("when", when, WHENS), ("cut", cut, CUTS), ("order", order, ORDERS), ("moments", moments, MOMENTS),
        ):  # fmt: skip
            check_choice(name, value, choices)
        if every < 1 or patience < 1 or min(start_after, delay) < 0:
            raise UsageError("every and patience are at least 1, start_after and delay at least 0")
        self.model, self.optimizer = model, optimizer
        self.when, self.every, self.threshold, self.patience = when, every, threshold, patience
        self.cut, self.beta, self.order, self.share, self.moments = cut, beta, order, share, moments
        self._first = (delay or every) if when == "step" else (start_after or every)
        self.opened = open_attention(model)
        ends = {"keep_first": keep_first, "keep_last": keep_last}
        chosen, self.refused = basis_candidates(model, targets, **ends), refused_layers(model, targets, **ends)
        self.layers = [SettlingLayer(each) for each in chosen]
        if optimizer is not None and not self._held_by(optimizer):
            raise UsageError("the optimizer holds none of the model's weights", hint="make it of model.parameters()")
        self.trained_before = sum(each.numel() for each in model.parameters() if each.requires_grad)
        self.steps = 0
        if when == "step" and not delay:
            for layer in self.layers if optimizer is None else self._held_by(optimizer):
                layer.convert(model, optimizer, moments)
                layer.ranks.append((0, min(layer.form.rows, layer.form.cols)))

    def step(self) -> bool:
        """Count one training step, and check layers when it is time; call it after `optimizer.step()`.

        Returns:
            Whether parameters were replaced that a wrapper such as DDP still holds: it must then be made anew.
        """
        if self.optimizer is None:
            raise UsageError("step() needs the optimizer", hint="oialr(model, optimizer, ...)")
        self.steps += 1
        return self.check(self.optimizer, self.steps)

    def is_due(self, done: int) -> bool:
        """Whether layers are checked after so many steps."""
        return done >= self._first and (done - self._first) % self.every == 0

    def check(self, optimizer: torch.optim.Optimizer, done: int) -> bool:
        """After `done` steps, if it is time: measure the layers that this optimizer trains, convert and cut them.

        Returns:
            Whether parameters were replaced that a wrapper such as DDP still holds. Those of a model under
            `fully_shard` are sharded again already.

        Raises:
            NumericsError: a weight or a core that is not finite.
        """
        if not self.is_due(done):
            return False
        mine = self._held_by(optimizer)
        checks = (done - self._first) // self.every + 1
        active = self.layers[-active_layers(len(self.layers), checks, self.order, self.share) :]
        waiting = [layer for layer in mine if not layer.converted]
        if self.when == "stable":
            self._measure(waiting)
            settled = {id(layer) for layer in active if layer.streak >= self.patience}
            waiting = [layer for layer in waiting if id(layer) in settled]
        diagonals = {layer.name: layer.convert(self.model, optimizer, self.moments) for layer in waiting}
        cut = self._cut([layer for layer in mine if layer.converted and layer in active], diagonals, optimizer)
        for layer in {id(each): each for each in [*waiting, *cut]}.values():
            assert layer.rank is not None
            layer.ranks.append((done, layer.rank))
        return any(not layer.sharded for layer in [*waiting, *cut])

    def _held_by(self, optimizer: torch.optim.Optimizer) -> list[SettlingLayer]:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [layer for layer in self.layers if id(layer.trained) in held]

    def _measure(self, layers: list[SettlingLayer]) -> None:
        if not layers:
            return
        measured = torch.stack([layer.measure() for layer in layers])
        from_first(measured)
        for layer, value in zip(layers, measured.tolist(), strict=True):
            layer.note(value, self.threshold)

    def _cut(
        self, layers: list[SettlingLayer], diagonals: dict[str, Tensor | None], optimizer: torch.optim.Optimizer
    ) -> list[SettlingLayer]:
        """Cut ranks, and say whose; a core that keeps its rank keeps its basis: turning it changes no product."""
        found = {layer.name: layer.decomposed(diagonals.get(layer.name)) for layer in layers}
        ranks = cut_ranks({name: each.spectrum for name, each in found.items()}, self.cut, self.beta)
        fewer = [layer for layer in layers if ranks[layer.name] != layer.rank]
        for layer in fewer:
            layer.cut(self.model, found[layer.name], ranks[layer.name], optimizer, self.moments)
        return fewer

    @property
    def converted(self) -> dict[str, BasisLayer]:
        """The layers whose basis is frozen, by name."""
        return {layer.name: layer.module for layer in self.layers if isinstance(layer.module, BasisLayer)}

    @property
    def highest(self) -> tuple[float, str] | None:
        """The highest stability measured, and the layer it was of."""
        seen = [(layer.highest, layer.name) for layer in self.layers if layer.highest > float("-inf")]
        return max(seen, default=None)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights: JSON, and tensors under "tensors"."""
        states = {layer.name: layer.state() for layer in self.layers}
        tensors = {f"basis.{name}": each.pop("basis") for name, each in states.items()}
        kept = {name: basis for name, basis in tensors.items() if basis is not None}
        return {"steps": self.steps, "layers": states, "tensors": kept}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put `state` back, and with it the shapes; weights and the optimizer's moments come later.

        Raises:
            CheckpointError: other layers.
        """
        names = [layer.name for layer in self.layers]
        if sorted(state["layers"]) != sorted(names):
            differ = sorted(set(state["layers"]) ^ set(names))
            raise CheckpointError(
                f"the checkpoint has other layers under oialr: {', '.join(differ[:3])}",
                hint="resume with the recipe it was trained with",
            )
        self.steps = state["steps"]
        for layer in self.layers:
            basis = state["tensors"].get(f"basis.{layer.name}")
            layer.load_state({**state["layers"][layer.name], "basis": basis}, self.model)


def oialr(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> OIALR:
    """Train low rank as soon as bases have settled: call `.step()` after every `optimizer.step()`.

    Args:
        model: changed in place, attention of torch opened into layers at once, others when they settle. DDP's wrapper,
            if there is one, is made afterwards, and anew whenever `step()` returns True.
        optimizer: of the model's parameters: SGD, Adam and their kin; it goes on with the cores in the weights' place.
            What it knows of a weight begins anew where that has no image for a core, as Adafactor's rows and columns.
        **settings: `targets` "auto" or globs; `when` "stable": a layer converts when its measured stability was at
            least `threshold` at `patience` checks in a row, or "step": all convert after `delay` steps; checks come
            `every` so many steps, in "stable" from `start_after` on; `cut` "relative" (singular values below `beta`
            times the largest go, half of them at most), "energy" (relative error at most `beta`) or "budget" (share
            `beta` of entries trains); `keep_first`, `keep_last`: the network's first and last layer stay dense; `order`
            "back": each check looks at a further `share` of the layers from the back, or "all"; `moments` "rotate": the
            optimizer's state follows the basis, or "zero". Defaults are those of the recipe's `oialr`.

    Returns:
        The object to call `.step()` on; `.converted` has the layers by name.

    Raises:
        TargetError: no layer to work on, or a layer with a hook or a forward of its own, which a core would not have;
            `step()` too, where it was given one later.
        UsageError: a wrong setting, or an optimizer of other parameters.

    Cost: a check measures by one eigenproblem a layer, or cuts by the SVD of its core; a step below break-even is
        cheaper than the dense one.
    Reference: OIALR, arXiv:2401.08505.

    >>> import ortho_cli as ortho
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1))
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> low_rank = ortho.oialr(model, optimizer, every=5, threshold=0.9, beta=0.3)
    >>> inputs = torch.randn(64, 16)
    >>> for _ in range(40):
    ...     loss = (model(inputs) - inputs[:, :1]).square().mean()
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step(); _ = low_rank.step()
    >>> sorted(low_rank.converted), max(layer.rank for layer in low_rank.converted.values()) < 16
    (['0', '2'], True)
    """
    return OIALR(model, optimizer, **settings)
