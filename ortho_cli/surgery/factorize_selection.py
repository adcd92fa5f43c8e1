"""Which layers of a checkpoint are factored, as which matrix, and why the others are left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ortho_cli.checkpoints import targets
from ortho_cli.checkpoints.factored import factored_layers
from ortho_cli.checkpoints.globs import compile_glob
from ortho_cli.checkpoints.layouts import canonical_shape, to_canonical
from ortho_cli.checkpoints.matrices import has_conv1d, layer_view
from ortho_cli.checkpoints.presets import PRESETS, preset_scope
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.checkpoints.tensors import FLOAT_DTYPES, TensorInfo
from ortho_cli.errors import NumericsError, TargetError

from .hra_repo import has_hra

if TYPE_CHECKING:
    from torch import Tensor

    from ortho_cli.linalg.matricize import Matricization
    from ortho_cli.linalg.ranks import LayerSize

__all__ = ["FactorLayer", "Selected", "check_finite", "check_plain", "select_layers"]

MIN_SIDE = 64  # of a matrix by default: below, factors save next to nothing and lose much
PIXEL_CHANNELS = 4  # a convolution that reads no more reads pictures or latents
# Output heads of image models; only at the top level, for `fc` and `linear` are ordinary names further down.
TOP_HEADS = ("fc", "head", "linear", "heads.head", "head.fc")
# Architectures of transformers that lend their embedding to the output head.
TYING = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")


@dataclass(frozen=True)
class FactorLayer:
    """One layer to factor: its native and canonical names, where its weight lies, and how that is a matrix."""

    name: str
    canonical: str
    info: TensorInfo
    view: Matricization
    size: LayerSize

    def lora_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of up and down of a LoRA, as its Linear or convolution has them."""
        kernel = canonical_shape(f"{self.canonical}.weight", self.info.shape)[2:]
        down = (rank, self.info.shape[1], *kernel) if kernel else (rank, self.size.cols)
        return (self.size.rows, rank, *[1] * len(kernel)), down


@dataclass
class Selected:
    """The layers to factor; of those a pattern means, or that are large, the ones left whole, with reasons."""

    layers: list[FactorLayer]
    counts: dict[str, int]
    whole: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def select_layers(
    checkpoint: Checkpoint, patterns: Sequence[str] | None, exclude: Sequence[str], *, flat: bool = False
) -> Selected:
    """Choose the layers to factor.

    Args:
        checkpoint: one that holds neither factors nor a Householder adapter.
        patterns: globs or presets; None: every Linear and convolution with both sides of its matrix at least
            `MIN_SIDE`, but embeddings, the first convolution and the output head; of Stable Diffusion the UNet's.
        exclude: patterns of layers to leave out.
        flat: see a convolution as `(out, in kh kw)`, which is the form of a LoRA.

    Raises:
        TargetError: a pattern that matches nothing, nothing that can be factored, or factors or an adapter in it.
    """
    check_plain(checkpoint)
    shapes = checkpoint.layers()
    chosen, counts, notes = _chosen(checkpoint, shapes, patterns, exclude)
    selected = Selected([], counts, notes=notes)
    shared, conv1d = _shared(checkpoint), has_conv1d(checkpoint)
    for name in chosen:
        info, shape = checkpoint.weight(name), shapes[name]
        reason = _obstacle(checkpoint, name, info, shared)
        if reason is not None:
            selected.whole[name] = reason
            continue
        view = layer_view(name, _flattened(shape) if flat else shape, conv1d=conv1d)
        selected.layers.append(_layer(checkpoint, name, info, view))
    if not selected.layers:
        first, reason = next(iter(selected.whole.items()), ("", "no Linear or convolution is large enough"))
        raise TargetError(
            f"no layer of {checkpoint.root.name} can be factored: {first}{': ' if first else ''}{reason}",
            hint="name layers with --targets; list them with: ortho inspect CHECKPOINT --layers",
        )
    return selected


def check_finite(matrix: Tensor, layer: FactorLayer) -> None:
    """Refuse a weight with values that are not finite.

    Raises:
        NumericsError: with the layer's name.
    """
    import torch

    if not bool(torch.isfinite(torch.stack(torch.aminmax(matrix))).all()):
        raise NumericsError(
            f"layer {layer.name}: the weight holds values that are not finite",
            hint="the training that wrote it diverged: take an earlier save, or leave the layer out with --exclude",
            where=str(layer.info.path),
        )


def _layer(checkpoint: Checkpoint, name: str, info: TensorInfo, view: Matricization) -> FactorLayer:
    from ortho_cli.linalg.ranks import LayerSize

    size = LayerSize(view.rows, view.cols, convolution=view.kind == "conv")
    return FactorLayer(name, to_canonical(name, checkpoint.layout), info, view, size)


def check_plain(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that holds factors or a Householder adapter beside its weights.

    Raises:
        TargetError: with how to take them in.
    """
    name = checkpoint.root.name
    if factored_layers(checkpoint):
        raise TargetError(
            f"{name} holds factors already", hint=f"multiply them out first: ortho convert {name} --to dense -o DENSE"
        )
    if has_hra(checkpoint):
        raise TargetError(f"{name} holds a Householder adapter", hint=f"fold it in first: ortho merge {name} -o MERGED")


def _chosen(
    checkpoint: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
    patterns: Sequence[str] | None,
    exclude: Sequence[str],
) -> tuple[list[str], dict[str, int], list[str]]:
    """Names, how many each pattern chose, and what the default left out."""
    if patterns:
        selection = targets.select(patterns, shapes, checkpoint.layout, exclude)
        return list(selection.layers), dict(selection.counts), []
    kept = set(targets.select(["**"], shapes, checkpoint.layout, exclude).layers)
    scope = [name for name in preset_scope(shapes, checkpoint.layout) if name in kept]
    unlike = [compile_glob(pattern) for pattern in PRESETS["all-linear"].exclude]
    reasons: Counter[str] = Counter()
    chosen = []
    for name in scope:
        canonical, shape = to_canonical(name, checkpoint.layout), shapes[name]
        view = layer_view(name, shape) if len(shape) <= 5 else None
        if name in TOP_HEADS or any(glob.fullmatch(canonical) for glob in unlike):
            reasons["embeddings and output heads"] += 1
        elif view is None or min(view.rows, view.cols) < MIN_SIDE:
            reasons[f"with a side below {MIN_SIDE}"] += 1
        elif len(shape) > 2 and shape[1] <= PIXEL_CHANNELS:
            reasons["first convolutions"] += 1
        else:
            chosen.append(name)
    outside = len(shapes) - len(preset_scope(shapes, checkpoint.layout))
    if outside:
        reasons["outside the UNet"] += outside
    left = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return chosen, {"default": len(chosen)}, [f"layers left out by default: {left}"] if left else []


def _flattened(shape: tuple[int, ...]) -> tuple[int, ...]:
    from math import prod

    return (shape[0], prod(shape[1:]))


def _shared(checkpoint: Checkpoint) -> dict[tuple[object, int, int], list[str]]:
    """Byte range -> the tensors that lie there: tied weights of a pickle."""
    places: dict[tuple[object, int, int], list[str]] = {}
    for name, info in checkpoint.tensors.items():
        places.setdefault((info.path, info.offset, info.nbytes), []).append(name)
    return places


def _obstacle(
    checkpoint: Checkpoint, name: str, info: TensorInfo, shared: Mapping[tuple[object, int, int], Sequence[str]]
) -> str | None:
    """Why a chosen layer is left whole, if so."""
    if info.dtype not in FLOAT_DTYPES:
        return f"is stored as {info.dtype}; only float weights are factored"
    if len(info.shape) > 5 or not info.numel:
        return f"has shape {'x'.join(map(str, info.shape))}"
    others = [other for other in shared[info.path, info.offset, info.nbytes] if other != info.name]
    if others:
        return f"shares its weight with {others[0]} (tied)"
    return "is tied to the output head" if _ties(checkpoint, name, info) else None


def _ties(checkpoint: Checkpoint, name: str, info: TensorInfo) -> bool:
    """Whether this is the embedding that transformers lends to a head which the file therefore lacks."""
    config = checkpoint.config
    architectures = config.get("architectures")
    tying = isinstance(architectures, list) and any(str(found).endswith(TYING) for found in architectures)
    if not tying or config.get("tie_word_embeddings", True) is not True or config.get("vocab_size") != info.shape[0]:
        return False
    same = [other for other in checkpoint.tensors.values() if other.shape == info.shape and other.name != info.name]
    return len(info.shape) == 2 and not same
