"""The HRA authors' own checkpoint form, and checkpoints that hold a Householder adapter in any naming.

`X.weight` becomes `X.fixed_linear.weight`, with the reflections beside it as `X.hra_u`. The authors' trainer loads
strictly: exactly 1,308 names, `control_model.*` and `logvar` among them, no EMA.
"""

from __future__ import annotations

from dataclasses import replace

from ortho_cli.checkpoints import layouts
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.checkpoints.writer import Piece
from ortho_cli.errors import CheckpointError

from .ldm_buffers import CONTROL_SHAPES, control_tensors, ldm_only_pieces

__all__ = [
    "control_pieces", "foreign_names", "has_hra", "hra_layers", "is_sd15_ldm", "plain_names", "without_reflections",
]  # fmt: skip


def hra_layers(checkpoint: Checkpoint) -> list[str]:
    """Native names of the layers that hold reflections."""
    return [name.removesuffix(".hra_u") for name in checkpoint.tensors if name.endswith(".hra_u")]


def has_hra(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds a Householder adapter inside, beside the weights it acts on."""
    names = checkpoint.tensors
    return any(f"{x}.fixed_linear.weight" in names or f"{x}.weight" in names for x in hra_layers(checkpoint))


def without_reflections(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint seen without the Householder adapter that it holds: plain names for the same bytes, none is read.

    Raises:
        CheckpointError: reflections without a weight.
    """
    plain = plain_names(checkpoint)
    kept = {name: plain.get(name, name) for name in checkpoint.tensors if not name.endswith(".hra_u")}
    files = tuple(
        replace(file, tensors=tuple(kept[name] for name in file.tensors if name in kept)) for file in checkpoint.files
    )
    tensors = {called: replace(checkpoint.tensors[name], name=called) for name, called in kept.items()}
    return replace(checkpoint, files=files, tensors=tensors)


def plain_names(checkpoint: Checkpoint) -> dict[str, str]:
    """`X.fixed_linear.weight` -> `X.weight` for the layers that hold reflections; the likes elsewhere are not ours.

    Raises:
        CheckpointError: reflections without a weight.
    """
    names, layers = checkpoint.tensors, hra_layers(checkpoint)
    for layer in layers:
        if f"{layer}.fixed_linear.weight" not in names and f"{layer}.weight" not in names:
            raise CheckpointError(f"layer {layer!r} has vectors (hra_u) but no weight", where=str(checkpoint.root))
    prefixes = {f"{layer}.fixed_linear": layer for layer in layers}
    split = {name: name.rpartition(".") for name in names}
    return {name: f"{prefixes[module]}.{kind}" for name, (module, _, kind) in split.items() if module in prefixes}


def is_sd15_ldm(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint follows the original naming of Stable Diffusion 1.5."""
    return checkpoint.layout == "sd15-ldm"


def control_pieces(checkpoint: Checkpoint, seed: int) -> list[Piece]:
    """Everything the authors' strict loader wants and an SD1.5 file lacks.

    Raises:
        CheckpointError: weights are missing that cannot be made up (a file without its text encoder, say).
    """
    have = set(checkpoint.tensors)
    missing = sorted(name for name in _shared_names() if name not in have)
    if missing:
        raise CheckpointError(
            f"{checkpoint.root.name} lacks {len(missing)} tensors the authors' loader wants, first {missing[0]}",
            hint="use a complete v1-5 file, or leave out --layout hra-repo",
        )
    wanted = [name for name in layouts.LDM_ONLY if not name.startswith("model_ema.") and name not in have]
    return ldm_only_pieces(wanted) + [piece for piece in control_tensors(seed) if piece.name not in have]


def foreign_names(checkpoint: Checkpoint) -> list[str]:
    """Names of an SD1.5 file that the authors' strict loader would refuse."""
    known = {*_shared_names(), *layouts.LDM_ONLY, *CONTROL_SHAPES, "logvar"}
    return [name for name in checkpoint.tensors if name not in known or name.startswith("model_ema.")]


def _shared_names() -> list[str]:
    return [layouts.from_canonical(name, "sd15-ldm") or name for name in layouts.sd15_tensors()]
