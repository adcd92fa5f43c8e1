"""Checkpoints that hold factors: `X.U (rows, r)` and `X.VT (r, cols)` stand where `X.weight` was.

What the two multiply out to (a Linear, a convolution of which shape) no header can say. It stands in a table: in a
folder in `ortho_config.json`, in a single file in the metadata field `ortho.method`; so nobody has to give ranks or
shapes again. Groups of a convolution are stacked, as `Matricization.stack` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ortho_cli.errors import CheckpointError, OrthoError

from .checkpoint import Checkpoint
from .header import printable
from .tensors import FLOAT_DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from ortho_cli.linalg.matricize import Matricization

__all__ = [
    "CONFIG_NAME", "METHOD", "FactoredLayer", "factored_config", "factored_layers", "read_factors",
    "whole_shapes",
]  # fmt: skip

CONFIG_NAME = "ortho_config.json"
METHOD = "factorized"
MAX_GROUPS = 2**20


@dataclass(frozen=True)
class FactoredLayer:
    """One layer of a factored checkpoint.

    Attributes:
        name: the layer's, as the checkpoint names it.
        view: how its weight is a matrix.
        u: `(groups rows, r)`.
        vt: `(groups r, cols)`.
    """

    name: str
    view: Matricization
    u: TensorInfo
    vt: TensorInfo

    @property
    def rank(self) -> int:
        """Components (of each group)."""
        return self.u.shape[1]


def factored_config(layers: Mapping[str, tuple[Matricization, int]], **extra: object) -> dict[str, Any]:
    """Say what the factors of some layers are; `factored_layers` reads it.

    Args:
        layers: name -> how its weight is a matrix, and its rank.
        extra: what else to record.
    """
    table = {}
    for name, (view, rank) in sorted(layers.items()):
        table[name] = {"kind": view.kind, "shape": list(view.shape), "rank": rank}
        if view.groups > 1:
            table[name]["groups"] = view.groups
        if view.row_axes is not None:
            table[name]["row_axes"] = view.row_axes
    return {"name": METHOD, **extra, "layers": table}


def factored_layers(checkpoint: Checkpoint) -> dict[str, FactoredLayer]:
    """Find the factored layers of a checkpoint by the table that was written with it; none where there is no table.

    Raises:
        CheckpointError: the table is missing from a checkpoint that says it has factors, or does not fit them.
    """
    table = {
        f"{component}.{name}" if component else name: entry
        for component, layers in _tables(checkpoint).items()
        for name, entry in layers.items()
    }
    return {name: _layer(checkpoint, name, entry) for name, entry in table.items()}


def whole_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, as if the factors were multiplied out."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    for name, layer in factored_layers(checkpoint).items():
        del shapes[f"{name}.U"], shapes[f"{name}.VT"]
        shapes[f"{name}.weight"] = layer.view.shape
    return shapes


def read_factors(layer: FactoredLayer) -> tuple[Tensor, Tensor]:
    """`U` and `VT` as they are stored, in memory of their own."""
    from .reading import TensorReader

    with TensorReader() as reader:
        return reader.read_copy(layer.u), reader.read_copy(layer.vt)


def _tables(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """Component ("" for a checkpoint that is no pipeline) -> its table."""
    from .dialects.contents import ortho_method
    from .store import read_json

    tables: dict[str, Mapping[str, Any]] = {}
    for file in checkpoint.files:
        if file.component in tables:
            continue
        where = file.path.parent / CONFIG_NAME
        if file.relative and where.is_file():
            content: Mapping[str, Any] = read_json(where)
        else:
            where, content = file.path, ortho_method(file.metadata, str(file.path))
        if content.get("name") != METHOD:
            continue
        layers = content.get("layers")
        if not isinstance(layers, Mapping):
            raise CheckpointError(
                f"{printable(file.path.name)} holds factors, but no table says what layers they are",
                hint=f"its {CONFIG_NAME} belongs beside it; open the whole folder",
                where=str(where),
            )
        tables[file.component] = layers
    return tables


def _layer(checkpoint: Checkpoint, name: str, entry: object) -> FactoredLayer:
    """One entry of the table, checked against the tensors it speaks of."""
    from ortho_cli.linalg.matricize import KINDS, Matricization

    where = str(checkpoint.root)
    u, vt = checkpoint.tensors.get(f"{name}.U"), checkpoint.tensors.get(f"{name}.VT")
    if u is None or vt is None:
        raise CheckpointError(f"the factors of {printable(name)!r} are listed but not there", where=where)
    values = entry if isinstance(entry, Mapping) else {}
    kind, shape, groups = values.get("kind"), values.get("shape"), values.get("groups", 1)
    row_axes = values.get("row_axes")
    sane = kind in KINDS and isinstance(shape, list) and type(groups) is int and 0 < groups <= MAX_GROUPS
    sane = sane and (row_axes is None or type(row_axes) is int)
    if not sane or not all(type(size) is int and size > 0 for size in shape or ()):
        raise CheckpointError(
            f"the table says {printable(json.dumps(entry)[:80])} of {printable(name)!r}: expected its kind and shape",
            where=where,
        )
    try:
        view = Matricization(str(kind), tuple(shape or ()), groups, row_axes)
    except OrthoError as error:
        raise CheckpointError(f"layer {printable(name)!r}: {error.message}", where=where) from error
    rank = u.shape[1] if len(u.shape) == 2 else 0
    if (u.shape, vt.shape) != ((groups * view.rows, rank), (groups * rank, view.cols)) or rank < 1:
        raise CheckpointError(
            f"factors of shapes {u.shape} and {vt.shape} are not those of {printable(name)!r}, a {kind} {view.shape}",
            where=where,
        )
    if u.dtype not in FLOAT_DTYPES or vt.dtype != u.dtype:
        raise CheckpointError(f"factors of {printable(name)!r} are {u.dtype} and {vt.dtype}", where=where)
    return FactoredLayer(name, view, u, vt)
