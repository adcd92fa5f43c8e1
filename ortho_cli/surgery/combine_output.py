"""The files of a combined adapter: reflections of rotations, factors of sums, and both on a base as one LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING

from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.errors import TargetError

from .adapter_factors import kernel_of, lora_shapes, low_rank_blocks
from .adapter_folder import AdapterFiles, Factor, hra_folder, lora_folder
from .combine_layers import Combined
from .combine_parts import Gathered, Part

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["adapter_files", "settled"]


def adapter_files(
    form: str, gathered: Gathered, combined: Mapping[str, Combined], base: Checkpoint | None, metadata: dict[str, str]
) -> AdapterFiles:
    """A PEFT folder of the combined layers: `hra`, or `lora` at scale 1."""
    if form == "hra":
        vectors = {name: _reflections(found) for name, found in combined.items()}
        _check_widths(vectors)
        return hra_folder(vectors, base, metadata)
    factors = {name: _factors(gathered.first(name), found) for name, found in combined.items()}
    return lora_folder(factors, base, metadata)


def _check_widths(vectors: Mapping[str, Factor]) -> None:
    """Refuse ranks that a narrow layer cannot be padded to.

    Raises:
        TargetError: with the rank that fits.
    """
    largest = max(vectors, key=lambda name: vectors[name].shape[1])
    narrowest = min(vectors, key=lambda name: vectors[name].shape[0])
    rank, width = vectors[largest].shape[1], vectors[narrowest].shape[0]
    if rank > width:
        raise TargetError(
            f"{rank} reflections at {largest} do not fit {narrowest}, which is {width} wide: PEFT has one rank for all",
            hint=f"use --rank {width - width % 2} or less",
        )


def settled(found: Combined, form: str) -> Combined:
    """A layer as it waits to be written: float32, and no more than the form needs."""
    if form == "hra":
        assert found.rotation is not None
        found.vectors, found.rotation = found.rotation.reflections().float(), None
    if found.factors is not None:
        found.factors = found.factors[0].float(), found.factors[1].float()
    return found


def _reflections(found: Combined) -> Factor:
    import torch

    assert found.vectors is not None
    vectors = found.vectors
    if not vectors.shape[1]:  # nothing turns: one pair that cancels
        vectors = torch.eye(vectors.shape[0], 1).expand(-1, 2)
    return Factor(tuple(vectors.shape), lambda: vectors)


class _Pair:
    """B and A of one layer, made together when the first is asked for, and let go when both were given."""

    def __init__(self, make: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self.make = make
        self.left: dict[int, Tensor] = {}

    def take(self, index: int) -> Tensor:
        if index not in self.left:
            self.left = dict(enumerate(self.make()))
        return self.left.pop(index)


def _factors(part: Part, found: Combined) -> tuple[Factor, Factor]:
    """B and A of one layer; those of a rotation are made from the base's weight when the plan runs."""
    rows, columns = part.shape[0], prod(part.shape[1:])
    up, down = lora_shapes(rows, columns, max(1, found.rank), kernel_of(part.layer))
    pair = _Pair(lambda: _product(part.layer.weight, found, rows, columns))
    return Factor(up, lambda: pair.take(0).reshape(up)), Factor(down, lambda: pair.take(1).reshape(down))


def _product(weight: TensorInfo | None, found: Combined, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    import torch

    if not found.rank:  # PEFT has no rank 0
        return torch.zeros(rows, 1), torch.zeros(1, columns)
    pairs = [] if found.factors is None else [found.factors]
    if found.rotation is not None and found.rotation.rank:
        assert weight is not None
        blocks = list(low_rank_blocks(found.rotation.to(torch.float64), weight, columns))
        pairs.insert(0, (torch.cat([up for up, _ in blocks]), blocks[0][1]))
    return torch.cat([up for up, _ in pairs], dim=1), torch.cat([down for _, down in pairs])
