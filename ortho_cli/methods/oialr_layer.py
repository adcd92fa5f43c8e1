"""One layer under OIALR: its basis is measured until it has settled, then frozen; its core is cut."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg.polar import polar_factor
from ortho_cli.linalg.subspace import factor_stability, flatten

from .adapter_layer import is_sharded, whole
from .basis_layers import BasisLayer, basis_layer, decompose
from .factorized_base import matricization
from .factorized_select import Candidate
from .inject import replace_modules
from .oialr_moments import Projection, carry_moments, image_for, project
from .oialr_ranks import Spectrum
from .oialr_sharded import shard_like, unsharded
from .sharded import as_sharded

__all__ = ["SettlingLayer", "from_first"]


def from_first(*tensors: Tensor) -> None:
    """Give every process the first one's values, so that no rounding of a decomposition can part them.

    Costs nothing where there is one process.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


class Decomposed(NamedTuple):
    """A core by its singular values and vectors, `left (r, r)` and `right (r, r)`; None where it is diagonal."""

    spectrum: Spectrum
    left: Tensor | None = None
    right: Tensor | None = None


class SettlingLayer:
    """A layer of a model, as it is now: dense, or with a frozen basis and a core.

    Args:
        chosen: the dense layer and how its weight is a matrix.

    Attributes:
        module: what stands in the model.
        stability: of the last check; None before the second.
        highest: the highest seen.
        streak: checks in a row with at least the threshold.
        lost: energy that cuts have taken away.
        ranks: of the core, (step, rank) wherever it changed; the first when the layer converted.
        follow: told, as `Method.follow` says, of what trains in the weight's place.
    """

    def __init__(self, chosen: Candidate) -> None:
        self.name, self.form, self.module = chosen.name, chosen.form, chosen.module
        self.stability: float | None = None
        self.highest = float("-inf")
        self.streak = 0
        self.lost = 0.0
        self.ranks: list[tuple[int, int]] = []
        self.follow: Callable[[str, str, Callable[[Tensor], Tensor]], None] | None = None
        self._basis: Tensor | None = None  # the polar factor at the last check

    @property
    def converted(self) -> bool:
        """Whether the basis is frozen."""
        return isinstance(self.module, BasisLayer)

    @property
    def rank(self) -> int | None:
        """Of the core; None while there is none."""
        return self.module.rank if isinstance(self.module, BasisLayer) else None

    @property
    def trained(self) -> nn.Parameter:
        """What trains: the weight, or the core."""
        found = self.module.M if isinstance(self.module, BasisLayer) else self.module._parameters["weight"]
        assert found is not None
        return found

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part only, so that all must ask together."""
        return is_sharded(self.trained)

    @torch.no_grad()
    def measure(self) -> Tensor:
        """The stability since the last check, a float64 scalar; NaN at the first. The basis now is kept.

        Of a grouped convolution it is the mean over groups, each of which has a basis of its own to freeze.

        Raises:
            NumericsError: a value that is not finite.
        """
        weight = flatten(whole(self.trained).detach())
        if not bool(torch.isfinite(weight).all()):
            raise NumericsError(f"layer {self.name} has values that are not finite")
        now = [polar_factor(each).factor for each in weight.chunk(self.form.groups)]
        before, self._basis = self._basis, as_sharded(torch.cat(now), self.trained)
        value = float("nan")
        if before is not None:
            value = fmean(map(factor_stability, whole(before).chunk(self.form.groups), now))
        return torch.tensor(value, dtype=torch.float64, device=weight.device)

    def note(self, stability: float, threshold: float) -> None:
        """Take a measured stability in."""
        if stability != stability:
            return
        self.stability, self.highest = stability, max(self.highest, stability)
        self.streak = self.streak + 1 if stability >= threshold else 0

    @torch.no_grad()
    def convert(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, moments: str) -> Tensor | None:
        """Freeze the basis and train the core, at full rank: the model computes the same.

        Args:
            model: wherever the layer stands in it, its new form does.
            optimizer: holds the weight, and the core afterwards; None: is not made yet.
            moments: as `carry_moments`.

        Returns:
            The singular values, the diagonal of the core; None on the meta device.

        Raises:
            TargetError: a hook or a forward that the layer was given since it was chosen, and its new form would lack.
        """
        try:
            matricization(self.module)
        except TargetError as error:
            raise TargetError(f"layer {self.name!r} is {error.message}", hint="leave it out of targets") from error
        old = self.trained
        if old.is_meta:
            self._replace(model, basis_layer(self.module))
            return None
        u, values, vt = decompose(self.form.to_matrix(whole(old)), f"layer {self.name}")
        from_first(u, values, vt)
        layer = basis_layer(unsharded(self.module) if self.sharded else self.module)
        layer.set_parts(u, values, vt)

        def image(moment: Tensor, squared: bool) -> Tensor:
            return project(u, self.form.to_matrix(moment), vt, squared=squared)

        self._hand_over(model, layer, old, optimizer, image, moments)
        return values

    def _hand_over(
        self,
        model: nn.Module,
        layer: BasisLayer,
        old: nn.Parameter,
        optimizer: torch.optim.Optimizer | None,
        image: Projection,
        moments: str,
    ) -> None:
        """Let a layer stand in the model, and its core train in place of `old`; sharded alike."""
        shard_like(layer, old)
        if self.follow is not None:
            kind = "M" if self.converted else "weight"
            self.follow(f"{self.name}.{kind}", f"{self.name}.M", lambda value: image_for(layer.M, value, image))
        if optimizer is not None:
            carry_moments(optimizer, old, layer.M, image, moments)
            bias = self.module._parameters.get("bias")
            if bias is not None and layer.bias is not None and layer.bias is not bias:
                carry_moments(optimizer, bias, layer.bias, lambda moment, squared: moment)
        if layer is not self.module:
            self._replace(model, layer)

    def _replace(self, model: nn.Module, layer: BasisLayer) -> None:
        replace_modules(model, {id(self.module): layer})
        self.module, self._basis = layer, None

    def decomposed(self, diagonal: Tensor | None = None) -> Decomposed:
        """The core by its singular values; without a decomposition where it is known to be `diagonal`."""
        assert isinstance(self.module, BasisLayer)
        if diagonal is not None:
            return Decomposed(Spectrum(diagonal, self.form.rows, self.form.cols, self.lost))
        core = whole(self.module.M).view(-1, self.module.rank, self.module.rank)
        left, values, right = decompose(core if self.form.groups > 1 else core[0], f"layer {self.name}")
        from_first(left, values, right)
        return Decomposed(Spectrum(values, self.form.rows, self.form.cols, self.lost), left, right)

    @torch.no_grad()
    def cut(
        self, model: nn.Module, core: Decomposed, rank: int, optimizer: torch.optim.Optimizer, moments: str
    ) -> None:
        """Turn the basis into the core's own, and keep its leading part.

        Args:
            model: wherever the layer stands in it, its new form does.
            core: as it is.
            rank: to keep.
            optimizer: that holds the core.
            moments: as `carry_moments`.
        """
        layer, values, left, right = self.module, core.spectrum.values, core.left, core.right
        assert isinstance(layer, BasisLayer)
        if left is None or right is None:
            left = right = torch.eye(values.shape[-1], dtype=values.dtype, device=values.device)
        left, right = left[..., :rank], right[..., :rank, :]
        u, vt = (part.to(values.dtype) for part in layer.form.unstack(whole(layer.U), whole(layer.VT)))
        old, shape = layer.M, (*values.shape, values.shape[-1])

        def image(moment: Tensor, squared: bool) -> Tensor:
            return project(left, moment.reshape(shape), right, squared=squared)

        cut = basis_layer(unsharded(layer), rank) if self.sharded else layer
        cut.set_parts(u @ left, values[..., :rank], right @ vt)
        self.lost += float(values[..., rank:].double().square().sum())
        self._hand_over(model, cut, old, optimizer, image, moments)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, for JSON; and `basis`, a whole tensor or None: every process must ask."""
        highest = None if self.highest == float("-inf") else self.highest
        return {
            "rank": self.rank, "streak": self.streak, "stability": self.stability, "highest": highest,
            "lost": self.lost, "ranks": [list(each) for each in self.ranks],
            "basis": None if self._basis is None else whole(self._basis),
        }  # fmt: skip

    def load_state(self, state: dict[str, Any], model: nn.Module) -> None:
        """Put it back, and the shapes of what stands in the model; the weights come later."""
        if state["rank"] is not None:
            if not isinstance(self.module, BasisLayer):
                self._replace(model, basis_layer(self.module))
            assert isinstance(self.module, BasisLayer)
            self.module.set_rank(state["rank"])
        self.streak, self.stability, self.lost = state["streak"], state["stability"], state["lost"]
        self.ranks = [(step, rank) for step, rank in state["ranks"]]
        self.highest = float("-inf") if state["highest"] is None else state["highest"]
        basis = state["basis"]
        self._basis = None if basis is None else basis.to(self.trained.device)
