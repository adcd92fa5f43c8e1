"""What several adapters do to the layers of one model, gathered by canonical name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ortho_cli.checkpoints.adapters import Adapter
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.errors import TargetError, UsageError

from .adapter_factors import NamedLayer
from .convert_adapter import named_layers, refuse_leftovers

if TYPE_CHECKING:
    from torch import Tensor

    from ortho_cli.linalg.rotation import LowRankRotation

__all__ = ["Gathered", "Part", "gather"]

SUMS = ("lora", "loha", "lokr")


@dataclass(frozen=True)
class Part:
    """What one adapter does to one layer."""

    adapter: Adapter
    layer: NamedLayer

    @property
    def adds(self) -> bool:
        """A low-rank sum; else a rotation."""
        return self.layer.layer.kind in SUMS

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's, as far as it is known; 0 for a side that may be any."""
        if self.layer.weight is not None:
            return tuple(self.layer.weight.shape)
        return tuple(int(size or 0) for size in self.adapter.operator(self.layer.name).shape)

    def rotation(self) -> LowRankRotation | None:
        """The rotation, None for a sum.

        Raises:
            TargetError: soft reflections.
        """
        from ortho_cli.linalg.householder import Householder

        operator = None if self.adds else self.adapter.operator(self.layer.name, "float64")
        return operator.rotation() if isinstance(operator, Householder) else None

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """`B` and `A` of a sum, scale included; None for a rotation.

        Raises:
            TargetError: factors of full rank.
        """
        import torch

        if not self.adds:
            return None
        operator = self.adapter.operator(self.layer.name, "float64")
        rows, columns = (int(size or 0) for size in operator.shape)
        return operator.as_low_rank(torch.zeros((), dtype=torch.float64).expand(rows, columns))


@dataclass(frozen=True)
class Gathered:
    """Canonical layer -> what each adapter does to it, None where one leaves it as it is."""

    adapters: Sequence[Adapter]
    layers: Mapping[str, Sequence[Part | None]]

    @property
    def parts(self) -> list[Part]:
        """Everything that any adapter does."""
        return [part for parts in self.layers.values() for part in parts if part is not None]

    @property
    def rotates(self) -> bool:
        """Whether any part is a rotation."""
        return any(not part.adds for part in self.parts)

    @property
    def rotating(self) -> tuple[int, ...]:
        """The adapters that rotate any layer, by index."""
        columns = zip(*self.layers.values(), strict=True)
        return tuple(
            index for index, column in enumerate(columns) if any(part is not None and not part.adds for part in column)
        )

    @property
    def adds(self) -> bool:
        """Whether any part is a sum."""
        return any(part.adds for part in self.parts)

    def bytes_of(self, layer: str) -> int:
        """What combining a layer holds in memory, about: every factor, a joint basis and the result, in float64."""
        numbers = sum(info.numel for part in self.layers[layer] if part for info in part.layer.layer.tensors.values())
        return 4 * 8 * numbers

    def first(self, layer: str) -> Part:
        """One part of a layer, to ask for what all share: one that tells a convolution, where there is one."""
        parts = [part for part in self.layers[layer] if part is not None]
        return next((part for part in parts if part.layer.layer.kind == "lora"), parts[0])


def gather(
    adapters: Sequence[Adapter], base: Checkpoint | None, note: Callable[[str], None], *, force_base: bool = False
) -> Gathered:
    """Line adapters up by layer.

    Args:
        adapters: of any readable dialects.
        base: resolves their names and shapes, where it is given.
        note: receives what the report should say.
        force_base: accept adapters that are bound to another base.

    Raises:
        TargetError: a kind that has no low-rank form, or adapters that share no layer.
        UsageError: a base is needed to tell a layer's shape.
        CheckpointError: an adapter that does not fit the base, or brings whole tensors.
    """
    found: dict[str, list[Part | None]] = {}
    firsts = []
    for index, adapter in enumerate(adapters):
        refuse_leftovers(adapter, "a combined adapter")
        layers = named_layers(adapter, base, note, force_base=force_base)
        firsts.append(layers[0].canonical if layers else "none")
        for layer in layers:
            _check_kind(layer, adapter)
            found.setdefault(layer.canonical, [None] * len(adapters))[index] = Part(adapter, layer)
    if not any(sum(part is not None for part in parts) > 1 for parts in found.values()):
        shown = ", ".join(f"{adapter.path.name} has {name}" for adapter, name in zip(adapters, firsts, strict=True))
        raise TargetError(
            f"the adapters share no layer: {shown}",
            hint="were they trained on one model? compare: ortho inspect ADAPTER --layers",
        )
    gathered = Gathered(adapters, found)
    for name in found:
        part = gathered.first(name)
        if part.adds and part.layer.weight is None and part.layer.layer.kind != "lora":
            raise UsageError(
                f"layer {name} ({part.layer.layer.kind}) does not say whether it sits on a Linear or a convolution",
                hint="add --base BASE",
            )
    return gathered


def _check_kind(layer: NamedLayer, adapter: Adapter) -> None:
    reason = None
    if layer.layer.options.get("dora"):
        reason = "DoRA, which sets lengths anew after every change"
    elif layer.layer.options.get("transposed"):
        reason = "on a transposed weight (fan_in_fan_out)"
    elif layer.layer.kind not in ("hra", *SUMS):
        reason = f"{layer.layer.kind}, a rotation of full rank"
    if reason is not None:
        raise TargetError(
            f"layer {layer.name} of {adapter.path.name} is {reason}: it has no low-rank form to combine",
            hint="fold one adapter after the other: ortho merge BASE A B -o OUT",
        )
