"""Multiply the factors of a checkpoint out again: `X.U` and `X.VT` become `X.weight`, everything else is copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ortho_cli.checkpoints.factored import CONFIG_NAME, FactoredLayer, factored_layers, read_factors
from ortho_cli.checkpoints.reading import tensor_bytes
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.checkpoints.tensors import DTYPE_BITS, TensorInfo
from ortho_cli.checkpoints.writer import Piece, computed, copied
from ortho_cli.errors import CheckpointError, NumericsError

from .fit import input_files
from .mirror import mirror
from .plan import Plan, provenance

__all__ = ["plan_dense"]


def plan_dense(checkpoint: Checkpoint, output: Path) -> Plan:
    """Plan the dense form of a factored checkpoint: what its layers compute, under the names they had.

    Raises:
        CheckpointError: the checkpoint holds no factors.
    """
    factored = factored_layers(checkpoint)
    if not factored:
        raise CheckpointError(f"{checkpoint.root.name} holds no factors", hint="ortho inspect shows what it holds")
    by_tensor = {info.name: layer for layer in factored.values() for info in (layer.u, layer.vt)}

    def transform(name: str, info: TensorInfo) -> Sequence[Piece]:
        layer = by_tensor.get(name)
        if layer is None:
            return [copied(info, name)]
        weight = computed(f"{layer.name}.weight", info.dtype, layer.view.shape, _Product(layer))
        return [weight] if name == layer.u.name else []

    metadata = provenance("convert", [checkpoint.source.rstrip("/")], {"to": "dense"})
    written = mirror(checkpoint, output, transform, metadata)
    copies = [(path, relative) for path, relative in written.copies if Path(relative).name != CONFIG_NAME]
    plan = Plan("convert", input_files(checkpoint), output, written.files, copies=copies, texts=written.texts)
    plan.details = [_detail(layer) for layer in factored.values()]
    plan.layers, plan.parameters = len(factored), sum(detail["parameters"] for detail in plan.details)
    plan.working_bytes = max(_working_bytes(layer) for layer in factored.values())
    plan.totals = {"from": "factors", "to": "dense"}
    plan.notes = [*checkpoint.notes, *written.notes]
    return plan


@dataclass(frozen=True)
class _Product:
    """The bytes of one weight, multiplied out in at least float32."""

    layer: FactoredLayer

    def __call__(self) -> Iterator[Any]:
        import torch

        view = self.layer.view
        stored, vt = read_factors(self.layer)
        u, vt = view.unstack(*(part.to(torch.promote_types(part.dtype, torch.float32)) for part in (stored, vt)))
        weight = view.to_weight(u @ vt).to(stored.dtype)
        if not bool(torch.isfinite(weight).all()):
            raise NumericsError(
                f"layer {self.layer.name} is not finite as {self.layer.u.dtype}", where=str(self.layer.u.path)
            )
        yield tensor_bytes(weight)


def _working_bytes(layer: FactoredLayer) -> int:
    return layer.view.parameters * (2 * 4 + DTYPE_BITS[layer.u.dtype] // 8) + 6 * (layer.u.numel + layer.vt.numel)


def _detail(layer: FactoredLayer) -> dict[str, Any]:
    return {
        "name": layer.name, "shape": list(layer.view.shape), "dtype": layer.u.dtype, "kind": layer.view.kind,
        "rank": layer.rank, "parameters": layer.view.parameters,
    }  # fmt: skip
