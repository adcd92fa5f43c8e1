"""Which layers of a checkpoint take reflections, how many each, and why others cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ortho_cli.checkpoints import layouts, targets
from ortho_cli.checkpoints.matrices import CONV1D_NAMES, LOOKUPS, has_conv1d
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.checkpoints.tensors import FLOAT_DTYPES
from ortho_cli.errors import TargetError, UsageError

__all__ = ["HraLayer", "check_repo_layers", "select_layers"]

DEFAULT_RANK = 8
REPO_PRESET = "sd15-control"  # what the HRA authors' code adapts, and their strict loader wants


@dataclass(frozen=True)
class HraLayer:
    """One layer to adapt: its native name, its canonical one, the width that is rotated, and its reflections."""

    native: str
    canonical: str
    shape: tuple[int, ...]
    width: int
    rank: int


def select_layers(
    checkpoint: Checkpoint,
    rank: int | Sequence[int | str],
    patterns: Sequence[str] | None,
    exclude: Sequence[str],
    *,
    gram_schmidt: bool,
) -> tuple[list[HraLayer], dict[str, int]]:
    """The layers that patterns choose, each able to take its rank; and how many each pattern chose.

    Raises:
        TargetError: a pattern matches nothing, or a layer cannot take reflections, or not this many.
        UsageError: no patterns, and no preset for this kind of model.
    """
    shapes, layout = checkpoint.layers(), checkpoint.layout
    if not patterns:
        preset = targets.default_preset(shapes, layout)
        if preset is None:
            raise UsageError(
                f"no default targets are known for {checkpoint.root.name} ({layout})",
                hint=f"give --targets, a pattern or one of: {', '.join(targets.PRESETS)}",
            )
        patterns = [preset]
    selection = targets.select(patterns, shapes, layout, exclude)
    values = [rank] if isinstance(rank, int) else list(rank)
    if all("=" in str(value) for value in values):
        values.insert(0, DEFAULT_RANK)
    ranks = targets.per_layer(
        [str(value) for value in values], {name: shapes[name] for name in selection.layers}, layout
    )
    conv1d = has_conv1d(checkpoint)
    layers = []
    for name in selection.layers:
        _check_layer(checkpoint, name, shapes[name], conv1d)
        width = prod(shapes[name][1:])
        _check_rank(name, ranks[name], width, gram_schmidt)
        layers.append(HraLayer(name, layouts.to_canonical(name, layout), shapes[name], width, ranks[name]))
    return layers, dict(selection.counts)


def _check_layer(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], conv1d: bool) -> None:
    dtype, last = checkpoint.weight(name).dtype, name.rpartition(".")[2]
    if dtype not in FLOAT_DTYPES:
        raise TargetError(f"layer {name} is stored as {dtype}; only float weights can be adapted")
    kind = None
    if conv1d and last in CONV1D_NAMES:
        kind = "a transformers Conv1D, which keeps its weight transposed"
    elif last in LOOKUPS:
        kind = "an embedding"
    elif len(shape) not in (2, 4) or (len(shape) == 4 and shape[2] != shape[3]):
        kind = f"of shape {'x'.join(map(str, shape))}"
    if kind is not None:
        raise TargetError(
            f"layer {name} is {kind}; HRA sits on Linear layers and square 2-D convolutions",
            hint=f"leave it out: --exclude {name}",
        )


def _check_rank(name: str, rank: int, width: int, gram_schmidt: bool) -> None:
    if rank < 1:
        raise TargetError(f"rank {rank} at layer {name}: there is no such number of reflections", hint="use --rank 8")
    if not gram_schmidt and rank % 2:
        raise TargetError(
            f"rank {rank} is odd: an odd number of reflections has determinant -1 and can never start as the identity",
            hint=f"use --rank {rank + 1}",
        )
    # The Gram-Schmidt variant is stored with its frozen start: twice the columns.
    limit = width // 2 if gram_schmidt else width - width % 2
    if rank > limit:
        raise TargetError(
            f"rank {rank} does not fit layer {name}, which is {width} wide",
            hint=f"use --rank {limit} or less, --rank '{name}={limit}', or leave it out: --exclude {name}",
        )


def check_repo_layers(layers: Sequence[HraLayer], checkpoint: Checkpoint) -> None:
    """Refuse a selection that the HRA authors' strict loader does not know.

    Raises:
        TargetError: other layers than theirs, several ranks, or an odd one.
    """
    wanted = set(targets.select([REPO_PRESET], checkpoint.layers(), checkpoint.layout).layers)
    if {layer.native for layer in layers} != wanted:
        raise TargetError(
            f"--layout hra-repo needs the {len(wanted)} layers of {REPO_PRESET}, found {len(layers)} layers",
            hint="leave --targets and --exclude out, or --layout",
        )
    ranks = sorted({layer.rank for layer in layers})
    if len(ranks) > 1 or ranks[0] % 2:
        raise TargetError(f"--layout hra-repo needs one even rank for all layers, found {', '.join(map(str, ranks))}")
