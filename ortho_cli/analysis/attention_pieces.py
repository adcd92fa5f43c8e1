"""Attention weights apart: the query, key and value of a fused projection, and the heads of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ortho_cli.checkpoints.matrices import CONV1D_NAMES
from ortho_cli.checkpoints.series_layers import SeriesLayer
from ortho_cli.errors import TargetError, UsageError

__all__ = ["AttentionPieces"]

FUSED = re.compile(r"(^|\.)(qkv|in_proj|c_attn|to_qkv|Wqkv|qkv_proj|attn_qkv)$")
PER_HEAD = re.compile(r"(^|\.)query_key_value$")  # one head's query, key and value, then the next head's
QUERY = re.compile(r"(^|\.)(q_proj|query|to_q|q_lin|q)$")
KEY_VALUE = re.compile(r"(^|\.)(k_proj|key|to_k|k_lin|k|v_proj|value|to_v|v_lin|v)$")
OUTPUT = re.compile(r"att\w*\.(?:output\.)?(proj|out_proj|o_proj|c_proj|dense|o|to_out\.0|out_lin)$", re.IGNORECASE)
QUERY_OF = {"k": "q", "v": "q", "key": "query", "value": "query"}


@dataclass(frozen=True)
class AttentionPieces:
    """How attention layers are split; what is no attention layer stays whole.

    Attributes:
        heads: how many heads; None: heads stay together.
        qkv: whether a fused projection becomes three; heads imply it.
        shapes: layer -> shape of its weight, of all layers, by which keys and values of fewer heads are known.
        conv1d: whether layers of GPT-2's names are stored as `(in, out)`.
    """

    heads: int | None = None
    qkv: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    conv1d: bool = False

    def __post_init__(self) -> None:
        if self.heads is not None and self.heads < 1:
            raise UsageError(f"--split-heads {self.heads}: attention has at least one head")

    def check(self, layers: Sequence[SeriesLayer]) -> None:
        """Refuse a split that splits nothing.

        Raises:
            TargetError: no layer is one of attention's.
        """
        asked = "--split-heads" if self.heads else "--split-qkv" if self.qkv else None
        if asked and not any(self._role(layer.name, layer.flat_shape) for layer in layers):
            raise TargetError(
                f"{asked}: none of {len(layers)} layers is known as attention",
                hint="known are names such as attn.qkv, self_attn.q_proj, attention.self.query, attn.in_proj",
            )

    def __call__(self, layer: SeriesLayer, matrix: Tensor) -> list[tuple[str, Tensor]]:
        """The matrices of a layer, by name: `X.q`, `X.k.head3`, `X.head0`; of what depends on `split` alone."""
        role = self._role(layer.name, layer.flat_shape)
        if role is None:
            return [(layer.name, matrix)]
        if self.conv1d and layer.name.endswith(CONV1D_NAMES):
            matrix = matrix.mT
        if role == "fused":
            parts = [
                (f"{layer.name}.{part}", rows) for part, rows in zip("qkv", self._thirds(layer, matrix), strict=True)
            ]
        else:
            parts = [(layer.name, matrix)]
        if self.heads is None:
            return parts
        return [
            (f"{name}.head{number}", piece)
            for name, rows in parts
            for number, piece in enumerate(self._by_head(layer, rows, role))
        ]

    def split(self, layer: SeriesLayer) -> list[object]:
        """All that the pieces of a layer depend on besides its name and weight."""
        return [self.heads, self.qkv, self.conv1d, self._query_width(layer.name)]

    def _role(self, name: str, shape: tuple[int, int]) -> str | None:
        """What a layer is to attention, as far as the split is concerned."""
        if self.heads is None and not self.qkv:
            return None
        if (FUSED.search(name) or PER_HEAD.search(name)) and max(shape) == 3 * min(shape):
            return "fused"
        if self.heads is None:
            return None
        if QUERY.search(name) or KEY_VALUE.search(name):
            return "rows"
        return "columns" if OUTPUT.search(name) else None

    def _thirds(self, layer: SeriesLayer, matrix: Tensor) -> Sequence[Tensor]:
        if PER_HEAD.search(layer.name) is None:
            return matrix.chunk(3)
        if self.heads is None:
            raise UsageError(
                f"layer {layer.name} stores query, key and value head by head", hint="say how many: --split-heads N"
            )
        apart = matrix.reshape(self.heads, 3, -1, matrix.shape[1])
        return [apart[:, part].flatten(0, 1) for part in range(3)]

    def _by_head(self, layer: SeriesLayer, matrix: Tensor, role: str) -> Sequence[Tensor]:
        heads = self.heads or 1
        along = matrix.mT if role == "columns" else matrix
        width = self._query_width(layer.name) if role == "rows" else None
        size, left = divmod(width or along.shape[0], heads)
        if left or not size or along.shape[0] % size:
            raise UsageError(f"layer {layer.name}: {along.shape[0]} rows do not go into {heads} heads")
        pieces: Sequence[Tensor] = along.split_with_sizes([size] * (along.shape[0] // size))
        return [piece.mT for piece in pieces] if role == "columns" else pieces

    def _query_width(self, name: str) -> int | None:
        """The rows of the query beside a key or value, which may have fewer heads."""
        last = name.rpartition(".")[2]
        for word, query in QUERY_OF.items():
            beside = re.sub(rf"(^|_){word}(_|$)", rf"\g<1>{query}\g<2>", last)
            if beside != last and (shape := self.shapes.get(name[: -len(last)] + beside)) is not None:
                return shape[0]
        return None
