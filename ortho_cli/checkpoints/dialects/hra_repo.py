"""The HRA authors' formats, and the raw vectors that `ortho` keeps beside a LoRA export.

A checkpoint holds `X.hra_u (in, r)` beside `X.fixed_linear.weight` (control), or beside `X.weight` (their DeBERTa);
subject-driven training has `<attention>.processor.to_{q,k,v,out}_hra.hra_u` and two integer buffers. None of them
records whether the vectors were trained with Gram-Schmidt.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ortho_cli.checkpoints.adapters import AdapterLayer
from ortho_cli.checkpoints.layouts import detect as detect_layout
from ortho_cli.checkpoints.layouts import to_canonical
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.errors import CheckpointError

from .contents import Contents, Dialect, ortho_method, unclaimed
from .kinds import check_layer
from .peft import PREFIX
from .peft_config import number

__all__ = ["DIALECT", "RAW_VECTORS", "VECTORS", "read_hra"]

RAW_VECTORS = "hra.safetensors"
_SUBJECT = re.compile(r"(?:unet\.)?(.+)\.processor\.(to_q|to_k|to_v|to_out)_hra\.hra_u")
_SUBJECT_BUFFERS = re.compile(r".+\.processor\.(cross_attention_dim|hidden_size)")


def read_hra(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], where: str) -> Contents:
    """Read every reflection chain of a checkpoint or of a file of vectors.

    Layer names are canonical where the checkpoint is an SD1.x one. The base's own tensors are no part of the adapter.

    Raises:
        CheckpointError: vectors without their weight, or in a file of vectors anything else.
    """
    method = ortho_method(metadata, where)
    side = method.get("side", "input")
    if side not in ("input", "output"):
        raise CheckpointError(f"ortho.method names the side {side!r}; there are input and output", where=where)
    options: dict[str, object] = {
        "side": side,
        "eps": number(method, "eps", 0.0, where, least=0.0),
        # `gram_schmidt` says how the vectors were made: with a frozen start they are stored as a plain chain of 2r.
        "gram_schmidt": bool(method.get("apply_GS")),
    }
    layout = detect_layout({name: info.shape for name, info in tensors.items()})
    contents = Contents()
    with_weight, without, rest = 0, [], []
    for name, info in tensors.items():
        subject = _SUBJECT.fullmatch(name)
        if not name.endswith(".hra_u"):
            rest.append(name)
            continue
        layer = name.removesuffix(".hra_u")
        if subject is not None:
            module = "to_out.0" if subject[2] == "to_out" else subject[2]
            canonical = to_canonical(f"{subject[1]}.{module}", "sd15-unet")
        else:
            canonical = to_canonical(layer.removeprefix(PREFIX), layout)
            if f"{layer}.fixed_linear.weight" in tensors or f"{layer}.weight" in tensors:
                with_weight += 1
            else:
                without.append(layer)
        contents.add_layer(canonical, check_layer(canonical, AdapterLayer("hra", {"vectors": info}, options)), where)
    if with_weight and without:
        raise CheckpointError(f"layer {without[0]!r} has vectors (hra_u) but no weight", where=where)
    strange = [] if with_weight else [name for name in rest if not _SUBJECT_BUFFERS.fullmatch(name)]
    if strange:
        raise unclaimed(strange, list(tensors), where)
    if not method:
        contents.notes.append(
            "the file does not say whether its vectors were trained with Gram-Schmidt; taken as plain"
        )
    return contents


_BASE_WEIGHT = re.compile(r"\.(fixed_linear\.)?weight$")


def _holds_vectors(names: Collection[str], config: Mapping[str, Any], metadata: Mapping[str, str]) -> bool:
    """Reflections in a checkpoint, not under PEFT's names."""
    return any(name.endswith(".hra_u") for name in names) and not any(name.startswith(PREFIX) for name in names)


def _only_vectors(names: Collection[str], config: Mapping[str, Any], metadata: Mapping[str, str]) -> bool:
    """Reflections alone, in a file that says how they act."""
    return (
        "ortho.method" in metadata
        and any(name.endswith(".hra_u") for name in names)
        and not any(_BASE_WEIGHT.search(name) for name in names)
    )


DIALECT = Dialect(
    _holds_vectors, lambda tensors, config, metadata, where: ("hra-repo", read_hra(tensors, metadata, where), {})
)
VECTORS = Dialect(
    _only_vectors, lambda tensors, config, metadata, where: ("ortho", read_hra(tensors, metadata, where), {})
)
