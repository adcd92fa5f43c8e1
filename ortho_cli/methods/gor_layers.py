"""Which weights of a model GOR regularises, by kind or by pattern; what it leaves alone is said with the reason.

`decoder-up` is the paper's choice for a diffusion UNet with a LoRA: the outer factors in its decoder, by the names that
diffusers, PEFT and kohya give them.
A pattern is a glob over module names as everywhere in ortho, or `re:EXPRESSION`, searched as the paper's script does.
One that chooses no convolution or linear layer is tried on the names of other parameters of two and more dimensions,
so that factors of adapters (`re:lora_(B|up)`) can be regularised wherever they are kept.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor, nn

from ortho_cli.checkpoints.globs import compile_glob
from ortho_cli.errors import TargetError, UsageError
from ortho_cli.linalg.group import count_groups, filter_rows, rows_to_weight

__all__ = ["AUTO", "DECODER_UP", "KINDS", "GroupedLayer", "default_targets", "select_layers"]

KINDS = ("conv", "linear", "all")
AUTO, DECODER_UP = "auto", "decoder-up"
DECODER_UP_PATTERN = r"re:up_blocks[._].*lora_(B|up)(\.|$)"
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
REGEX = "re:"
NAMES_SHOWN = 5  # in a note


@dataclass(frozen=True)
class GroupedLayer:
    """One weight: where it is kept (what is kept there may be sharded or moved later), and how it falls into groups."""

    name: str
    kind: str  # "conv", "linear" or "parameter"
    owner: nn.Module
    attribute: str
    shape: tuple[int, ...]
    transposed: int  # as filter_rows takes it
    count: int
    wanted: int

    @property
    def weight(self) -> Tensor:
        """The parameter as it is now."""
        found: Tensor = getattr(self.owner, self.attribute)
        return found

    def trains_in(self, own: Container[int]) -> bool:
        """Whether the weight is still there, one of these parameters (by `id`), and learns."""
        found = getattr(self.owner, self.attribute, None)
        return found is not None and id(found) in own and bool(found.requires_grad)

    @property
    def filters(self) -> int:
        """Output channels."""
        return _filters(self.shape, self.transposed)

    def rows(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as a matrix, one filter a row."""
        return filter_rows(weight, self.transposed)

    def unrows(self, rows: Tensor) -> Tensor:
        """The way back."""
        return rows_to_weight(rows, self.shape, self.transposed)


def select_layers(
    model: nn.Module, targets: str | Sequence[str] = "conv", groups: int = 32, min_filters: int = 4
) -> tuple[list[GroupedLayer], list[str], int]:
    """Choose the layers, count their groups, and say what was left out.

    Args:
        model: any module; frozen weights are left alone, a shared weight counts once.
        targets: "conv" (1-d to 3-d, transposed ones too), "linear" (transformers' Conv1D too), "all" (both), or
            patterns.
        groups: the most groups a layer has.
        min_filters: the fewest filters a group has.

    Returns:
        The layers in model order; notes: how many, what was skipped and why, whose groups are fewer than asked; and
        the number of layers skipped.

    Raises:
        TargetError: a kind or pattern that chooses nothing that could be regularised; with the nearest names.
        UsageError: a pattern that is no glob or no regular expression.

    >>> layers, notes, skipped = select_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)))
    >>> [layer.name for layer in layers], notes[1], skipped
    (['0'], '1 skipped, fewer than 4 filters: 1 (3)', 1)
    """
    candidates = list(_candidates(model, groups, min_filters))
    layers = [layer for layer in candidates if layer.kind != "parameter"]
    if isinstance(targets, str) and targets in KINDS:
        chosen = {targets: [layer for layer in layers if targets in (layer.kind, "all")]}
    else:
        patterns = [targets] if isinstance(targets, str) else list(targets)
        patterns = [DECODER_UP_PATTERN if pattern == DECODER_UP else pattern for pattern in patterns]
        chosen = {pattern: _matched(pattern, candidates) for pattern in patterns}
    for target, found in chosen.items():
        if all(_obstacle(layer, min_filters) for layer in found):
            _refuse(target, found, layers, candidates, min_filters)
    named = {id(layer) for found in chosen.values() for layer in found}
    usable: dict[int, GroupedLayer] = {}
    skipped: dict[str, list[str]] = {}
    for layer in candidates:
        if id(layer) not in named:
            continue
        obstacle = _obstacle(layer, min_filters)
        if obstacle is None:
            usable.setdefault(id(layer.weight), layer)
        else:
            skipped.setdefault(obstacle, []).append(_with_size(layer, obstacle))
    result = list(usable.values())
    return result, _notes(result, skipped), sum(map(len, skipped.values()))


def _candidates(model: nn.Module, groups: int, min_filters: int) -> Iterator[GroupedLayer]:
    """Every weight that is a matrix in some way: layers by their module's name, other parameters by their own."""

    def grouped(name: str, kind: str, owner: nn.Module, attribute: str, transposed: int) -> GroupedLayer:
        shape = tuple(getattr(owner, attribute).shape)
        count, wanted = count_groups(_filters(shape, transposed), groups, min_filters)
        return GroupedLayer(name, kind, owner, attribute, shape, transposed, count, wanted)

    for path, module in model.named_modules():
        if isinstance(module, CONVOLUTIONS):
            transposed = module.groups if isinstance(module, TRANSPOSED) else 0
            yield grouped(path, "conv", module, "weight", transposed)
        elif isinstance(module, nn.Linear):
            yield grouped(path, "linear", module, "weight", 0)
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers', told without importing it
            yield grouped(path, "linear", module, "weight", 1)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 2 and parameter.shape[0] > 0:
                    yield grouped(f"{path}.{name}" if path else name, "parameter", module, name, 0)


def default_targets(model: nn.Module) -> str:
    """What to regularise where nobody says: convolutions, or `decoder-up` where there is such a LoRA that trains.

    >>> default_targets(nn.Sequential(nn.Conv2d(3, 8, 3)))
    'conv'
    """
    matches = _matcher(DECODER_UP_PATTERN)
    trained = any(each.requires_grad and matches(name) for name, each in model.named_parameters())
    return DECODER_UP if trained else "conv"


def _filters(shape: tuple[int, ...], transposed: int) -> int:
    return shape[1] * transposed if transposed else shape[0]


def _matched(pattern: str, candidates: Sequence[GroupedLayer]) -> list[GroupedLayer]:
    """What a pattern means: layers, and only where it names none, other parameters."""
    matches = _matcher(pattern)
    found = [layer for layer in candidates if matches(layer.name)]
    return [layer for layer in found if layer.kind != "parameter"] or found


def _matcher(pattern: str) -> Callable[[str], object]:
    if not pattern.startswith(REGEX):
        return compile_glob(pattern).fullmatch
    try:
        return re.compile(pattern.removeprefix(REGEX)).search
    except re.error as error:
        raise UsageError(f"pattern {pattern!r} is no regular expression: {error}") from None


def _obstacle(layer: GroupedLayer, min_filters: int) -> str | None:
    """Why a layer cannot be regularised, if so."""
    if not isinstance(layer.weight, nn.Parameter):
        return "weight computed by a parametrization"
    if not layer.weight.requires_grad:
        return "frozen"
    return None if layer.count else f"fewer than {min_filters} filters"


def _refuse(
    target: str,
    found: Sequence[GroupedLayer],
    layers: Sequence[GroupedLayer],
    candidates: Sequence[GroupedLayer],
    min_filters: int,
) -> NoReturn:
    """A target that chooses nothing: what there is instead."""
    if found:
        reasons = sorted({str(_obstacle(layer, min_filters)) for layer in found})
        raise TargetError(
            f"{target!r} chose {len(found)} layers, none to regularise: {', '.join(reasons)} "
            f"({_shortened([layer.name for layer in found])})",
            hint="put gor after the method that adds what trains, or choose other layers",
        )
    if target in KINDS:
        kinds = ", ".join(f"{sum(x.kind == kind for x in layers)} {kind}" for kind in KINDS[:2])
        raise TargetError(f"targets {target!r}: the model has no such layer", hint=f"it has {kinds} layers")
    raise TargetError(
        f"pattern {target!r} matched 0 of {len(layers)} layers",
        hint=f"{_nearest(target, candidates)}names are those of named_modules(); "
        f"a regular expression starts with {REGEX!r}",
    )


def _nearest(pattern: str, candidates: Sequence[GroupedLayer]) -> str:
    words = sorted({word for layer in candidates for word in (layer.name, *layer.name.split(".")) if word})
    parts = [part for part in re.split(r"[^\w]+", pattern.removeprefix(REGEX)) if part and not part.isdigit()]
    near = [name for part in (pattern, *reversed(parts)) for name in difflib.get_close_matches(part, words, 3)]
    return f"nearest names: {', '.join(list(dict.fromkeys(near))[:3])}; " if near else ""


def _notes(layers: Sequence[GroupedLayer], skipped: dict[str, list[str]]) -> list[str]:
    """What a report should say: counts first, then everything that is not as asked."""
    notes = [f"{len(layers)} layers in {sum(layer.count for layer in layers):,} groups"]
    notes += [f"{len(names)} skipped, {reason}: {_shortened(names)}" for reason, names in skipped.items()]
    fewer = [f"{x.name} ({x.filters} filters: {x.count} for {x.wanted})" for x in layers if x.count != x.wanted]
    if fewer:
        notes.append(f"fewer groups than asked, to divide the filters evenly: {_shortened(fewer)}")
    return notes


def _with_size(layer: GroupedLayer, obstacle: str) -> str:
    return f"{layer.name} ({layer.filters})" if obstacle.startswith("fewer") else layer.name


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
