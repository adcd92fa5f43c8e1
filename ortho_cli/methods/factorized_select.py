"""Which layers of a model are factored, and of which rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from ortho_cli.checkpoints.targets import select
from ortho_cli.errors import TargetError, UsageError
from ortho_cli.linalg.matricize import Matricization
from ortho_cli.linalg.ranks import LayerSize, scale_for_parameters, scaled_rank
from ortho_cli.linalg.tensor import fold_dims, tensor_parameters, tensor_ranks

from .factorized_base import matricization
from .inject import named_layers

__all__ = ["Candidate", "candidates", "layer_ranks", "select_candidates", "tensor_scale"]

SCALE_STEP = 1e-6  # finer than any step of a rank: dimensions have fewer than a million entries


@dataclass(frozen=True)
class Candidate:
    """A layer that could be factored."""

    name: str
    module: nn.Module
    form: Matricization

    @property
    def weight(self) -> Tensor:
        """As the layer keeps it."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight

    def size(self, *, square: bool = False) -> LayerSize:
        """What a rank costs in it."""
        form = self.form
        convolution = form.kind in ("conv", "transposed")
        return LayerSize(form.rows, form.cols, convolution=convolution, batch=form.groups, square=square)


def candidates(model: nn.Module) -> tuple[list[Candidate], dict[str, str]]:
    """Every layer that could be factored, in model order, and why others that multiply by a weight could not.

    >>> found, refused = candidates(nn.Sequential(nn.Linear(4, 4), nn.Bilinear(2, 2, 2)))
    >>> [each.name for each in found], refused
    (['0'], {'1': 'a Bilinear, which is neither linear, convolution nor embedding'})
    """
    shared = Counter(id(m._parameters["weight"]) for m in model.modules() if m._parameters.get("weight") is not None)
    found, refused = [], {}
    modules = dict(model.named_modules())
    for name in named_layers(model):
        if not name:
            continue
        try:
            form = matricization(modules[name])
        except TargetError as error:
            refused[name] = error.message
            continue
        if shared[id(modules[name]._parameters["weight"])] > 1:
            refused[name] = "tied to another layer by a common weight, which its factors would part"
        else:
            found.append(Candidate(name, modules[name], form))
    return found, refused


def select_candidates(
    model: nn.Module, targets: str | Sequence[str] = "auto", exclude: Sequence[str] = ()
) -> list[Candidate]:
    """Choose layers by patterns.

    Args:
        model: any module.
        targets: globs over layer names, or "auto": linear layers and convolutions, but the first convolution and the
            output head (the last of them all).
        exclude: patterns of layers to leave out.

    Raises:
        TargetError: nothing to factor, a pattern that matches nothing, or a layer that cannot be factored.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    >>> [each.name for each in select_candidates(model)]
    ['1']
    """
    found, refused = candidates(model)
    layers = named_layers(model)
    if targets == "auto" or list(targets) == ["auto"]:
        found = [each for each in found if each.form.kind != "embedding"]
        stem = next((each for each in found if each.form.kind in ("conv", "transposed")), None)
        out = set(select(exclude, layers, layers.layout).layers) if exclude else set()
        head = _head(model, [*(each.name for each in found), *refused])
        chosen = [each for each in found if each is not stem and each.name != head and each.name not in out]
        if not chosen:
            raise TargetError(
                f"nothing to factor in a {type(model).__name__}: of its {len(found)} layers the first convolution and "
                "the output head stay dense, and the rest is excluded",
                hint="name the layers in targets",
            )
        return chosen
    patterns = [targets] if isinstance(targets, str) else list(targets)
    names = set(select(patterns, layers, layers.layout, exclude).layers)
    for name in layers:
        if name in names and name in refused:
            raise TargetError(f"layer {name!r} is {refused[name]}", hint=f"leave it out: exclude {name}")
    return [each for each in found if each.name in names]


def _head(model: nn.Module, names: Collection[str]) -> str | None:
    """The last in model order of some layers, embeddings left out: where it is tied, no other takes its place."""
    modules = reversed(list(model.named_modules()))
    return next((name for name, module in modules if name in names and not isinstance(module, nn.Embedding)), None)


def layer_ranks(
    model: nn.Module,
    layers: Sequence[Candidate],
    *,
    rank: int | None = None,
    rank_scale: float | None = None,
    target_ratio: float | None = None,
    square: bool = False,
    compat: str | None = None,
) -> list[int | None]:
    """The rank of each layer by one of three rules; None where it had better stay dense.

    Args:
        model: that the layers are of.
        layers: chosen.
        rank: the same for all.
        rank_scale: a share of the full rank, by the paper's rounding; above 1 overcomplete.
        target_ratio: all of the model's parameters after, over before.
        square: with a third factor.
        compat: "paper" searches a target ratio as its code does.

    Raises:
        UsageError: not exactly one rule, or a ratio out of reach.
    """
    rules = {"rank": rank, "rank_scale": rank_scale, "target_ratio": target_ratio}
    given = [name for name, value in rules.items() if value is not None]
    if len(given) != 1:
        raise UsageError(
            f"exactly one of rank, rank_scale and target_ratio decides the ranks, found {' and '.join(given) or 'none'}"
        )
    sizes = [each.size(square=square) for each in layers]
    if rank is not None:
        return [rank] * len(sizes)
    if rank_scale is not None:
        return [scaled_rank(size, rank_scale) for size in sizes]
    assert target_ratio is not None
    others = sum(parameter.numel() for parameter in model.parameters()) - sum(size.dense for size in sizes)
    return list(scale_for_parameters(sizes, others, target_ratio, "bisection" if compat == "paper" else None).ranks)


def tensor_scale(
    model: nn.Module,
    layers: Sequence[Candidate],
    kind: str,
    *,
    rank_scale: float | None = None,
    target_ratio: float | None = None,
) -> float:
    """The scale of all ranks of tensor forms: the one given, or the one nearest to a share of all parameters.

    Raises:
        UsageError: not exactly one of the two, or a ratio out of reach.
    """
    if (rank_scale is None) == (target_ratio is None):
        raise UsageError(f"exactly one of rank_scale and target_ratio decides the ranks of a {kind}")
    if rank_scale is not None:
        return rank_scale
    assert target_ratio is not None
    total = sum(parameter.numel() for parameter in model.parameters())
    others = total - sum(each.weight.numel() for each in layers)

    def ratio(scale: float) -> float:
        return (others + sum(_tensor_size(each, kind, scale) for each in layers)) / total

    low, high = 0.0, 1.0
    if not ratio(low) <= target_ratio <= ratio(high):
        raise UsageError(
            f"target ratio {target_ratio} cannot be reached by a {kind}: {ratio(low):.4f} to {ratio(high):.4f} can"
        )
    while high - low > SCALE_STEP:
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) <= target_ratio else (low, middle)
    return min(low, high, key=lambda scale: abs(ratio(scale) - target_ratio))


def _tensor_size(layer: Candidate, kind: str, scale: float) -> int:
    out, width, *taps = layer.form.shape
    dims = fold_dims(out * width)
    depthwise = width * prod(taps) if prod(taps) > 1 else 0
    return tensor_parameters(kind, dims, tensor_ranks(kind, dims, scale)) + depthwise
