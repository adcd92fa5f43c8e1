"""The folders of an extracted adapter: a PEFT HRA, a PEFT LoRA, or both, the second bound to the base of the first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from ortho_cli.checkpoints.fingerprint import base_fingerprint
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.errors import TargetError

from .adapter_folder import AdapterFiles, Factor, hra_folder, lora_folder
from .extract_layers import Extracted
from .extract_pairs import LayerPair
from .plan import OutputFile

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RESIDUAL", "ROTATION", "Parts", "extracted_folders", "found_parts", "most_parts"]

ROTATION, RESIDUAL = "rotation", "residual"  # the folders of both kinds together


class Parts(NamedTuple):
    """What a layer brings to the adapter: its reflections, and up and down of its LoRA."""

    pair: LayerPair
    vectors: Factor | None = None
    factors: tuple[Factor, Factor] | None = None

    @property
    def parameters(self) -> int:
        """Numbers in them, before any padding."""
        return sum(prod(factor.shape) for factor in (self.vectors, *(self.factors or ())) if factor is not None)


def most_parts(pair: LayerPair, kind: str, rank: int) -> Parts:
    """The parts of a layer at its full rank, of which only the sizes are known."""

    def make() -> Tensor:
        raise AssertionError("an upper bound is never written")

    size = pair.layer.size
    up, down = pair.layer.lora_shapes(min(rank, size.rows, size.cols))
    vectors = None if kind == "lora" or pair.still else Factor((size.cols, rank), make)
    return Parts(pair, vectors, None if kind == "hra" else (Factor(up, make), Factor(down, make)))


def found_parts(pair: LayerPair, result: Extracted) -> Parts:
    """The parts of a layer as they were found; a rotation that turns nothing is none."""
    vectors, factors = None, None
    if result.vectors is not None and result.vectors.shape[1]:
        vectors = _made(result.vectors, tuple(result.vectors.shape))
    if result.factors is not None:
        shapes = pair.layer.lora_shapes(result.factors[1].shape[0])
        factors = (_made(result.factors[0], shapes[0]), _made(result.factors[1], shapes[1]))
    return Parts(pair, vectors, factors)


def extracted_folders(
    parts: Mapping[str, Parts], kind: str, base: Checkpoint, tuned: Checkpoint, metadata: dict[str, str]
) -> AdapterFiles:
    """Lay out the folder, or for both kinds its two.

    Args:
        parts: by native layer name.
        kind: of `extract_layers.KINDS`.
        base: whose names and fingerprint they carry. That of both folders is the base's own: they are merged in one
            go, and the residual is right behind that rotation only.
        tuned: by whose fingerprint the two parts know each other; `fit.check_residuals` reads it.
        metadata: of every file.

    Raises:
        TargetError: no rotation in any layer, layers too narrow for PEFT's one rank, or transformers' Conv1D beside
            other layers.
    """
    result = AdapterFiles()
    both = kind == "both"
    layers = [part.pair.weights.tuned.name.removesuffix(".weight") for part in parts.values()]
    pair = {"tuned": base_fingerprint(tuned, layers)} if both else {}
    if kind != "lora":
        turned = {name: part for name, part in parts.items() if part.vectors is not None}
        rank = _common_rank(turned)
        method: dict[str, Any] = {"name": "hra", "rank": rank, "apply_GS": False, **pair}
        vectors = {part.pair.layer.canonical: part.vectors for part in turned.values() if part.vectors is not None}
        written = hra_folder(vectors, base, _marked(metadata, method, base, turned))
        _add(result, written, ROTATION if both else "")
    if kind != "hra":
        method = {"name": "lora", **({"form": "residual", "base_bound": True} if both else {}), **pair}
        transposed = {part.pair.layer.view.kind == "conv1d" for part in parts.values()}
        if len(transposed) > 1:
            raise TargetError(
                "transformers' Conv1D layers and others do not go into one PEFT folder",
                hint="choose the one or the other kind with --targets",
            )
        factors = {part.pair.layer.canonical: part.factors for part in parts.values() if part.factors is not None}
        marked = _marked(metadata, method, base, parts)
        _add(result, lora_folder(factors, base, marked, transposed=transposed.pop()), RESIDUAL if both else "")
    return result


def _common_rank(turned: Mapping[str, Parts]) -> int:
    """The rank of all layers, as PEFT wants it.

    Raises:
        TargetError: there are none, or, where ranks followed from the values, one is too narrow.
    """
    shapes = {name: part.vectors.shape for name, part in turned.items() if part.vectors is not None}
    if not shapes:
        raise TargetError("no rotation explains any of the change", hint="take it as a sum: --kind lora")
    rank = max(shape[1] for shape in shapes.values())
    narrow = [name for name, shape in shapes.items() if shape[0] < rank]
    if narrow:
        raise TargetError(
            f"a layer needs {rank} reflections, and PEFT has one rank for all: {narrow[0]} is only "
            f"{shapes[narrow[0]][0]} wide",
            hint=f"leave it out (--exclude {narrow[0]}), lower --energy, or give --rank",
        )
    return rank


def _marked(
    metadata: dict[str, str], method: dict[str, Any], base: Checkpoint, layers: Mapping[str, Parts]
) -> dict[str, str]:
    return {
        **metadata,
        "ortho.method": json.dumps(method, sort_keys=True),
        "ortho.base_fingerprint": base_fingerprint(base, layers),
    }


def _add(result: AdapterFiles, written: AdapterFiles, folder: str) -> None:
    prefix = f"{folder}/" if folder else ""
    result.files += [OutputFile(f"{prefix}{file.relative}", file.pieces, file.metadata) for file in written.files]
    result.texts |= {f"{prefix}{name}": text for name, text in written.texts.items()}
    result.notes += written.notes


def _made(tensor: Tensor, shape: tuple[int, ...]) -> Factor:
    return Factor(shape, lambda: tensor.reshape(shape))
