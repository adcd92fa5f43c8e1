"""Which layers OIALR works on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ortho_cli.errors import TargetError

from .basis_layers import ROW_AXES
from .factorized_base import matricization
from .factorized_select import Candidate, candidates, select_candidates
from .inject import named_layers

__all__ = ["basis_candidates", "refused_layers"]

THIN = 10  # a matrix with a side so many times the other's has next to no basis to find


def basis_candidates(
    model: nn.Module, targets: str | Sequence[str] = "auto", *, keep_first: bool = False, keep_last: bool = True
) -> list[Candidate]:
    """Choose the layers whose basis may be frozen.

    Args:
        model: with its attention opened (`open_attention`).
        targets: globs over layer names, or "auto": linear layers and convolutions whose weight trains and is no thin
            matrix (a linear layer's short side is above a tenth of the long one's, a convolution has a tenth as many
            inputs as outputs at least).
        keep_first: leave out the network's first layer, whether or not it is eligible.
        keep_last: leave out its last, such as the output head; no other stays in its place.

    Returns:
        Layers in model order, convolutions as matrices `(out, in * taps)`.

    Raises:
        TargetError: none, a pattern that matches nothing, or a layer without such a form; with the reason.

    >>> model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 30), nn.Linear(30, 2))
    >>> [layer.name for layer in basis_candidates(model)], [layer.name for layer in basis_candidates(model, ["*"])]
    (['0', '1'], ['0', '1'])
    """
    if isinstance(model, nn.MultiheadAttention) or "" in named_layers(model):
        raise TargetError(
            f"a {type(model).__name__} as the whole model: its layers are replaced inside one",
            hint="wrap it in an nn.Sequential",
        )
    kept = _ends(model, keep_first, keep_last)
    if targets == "auto" or list(targets) == ["auto"]:
        found = [each for each in candidates(model)[0] if _obstacle(each.module) is None and not _is_thin(each.module)]
    else:
        found = select_candidates(model, targets)
        for each in found:
            reason = _obstacle(each.module)
            if reason is not None:
                raise TargetError(f"layer {each.name!r} {reason}", hint="leave it out of targets")
    chosen = [
        Candidate(each.name, each.module, matricization(each.module, ROW_AXES))
        for each in found if each.name not in kept
    ]  # fmt: skip
    if not chosen:
        raise TargetError(
            f"no layer of a {type(model).__name__} has a basis to freeze", hint="name layers in targets; see keep_last"
        )
    return chosen


def refused_layers(
    model: nn.Module, targets: str | Sequence[str] = "auto", *, keep_first: bool = False, keep_last: bool = True
) -> dict[str, str]:
    """The layers that "auto" would take but for what they are (weight-normed, tied, hooked): names, and the reasons."""
    if targets != "auto" and list(targets) != ["auto"]:
        return {}
    kept = _ends(model, keep_first, keep_last)
    return {
        name: reason for name, reason in candidates(model)[1].items()
        if name not in kept and not isinstance(model.get_submodule(name), nn.Embedding)
    }  # fmt: skip


def _ends(model: nn.Module, first: bool, last: bool) -> set[str]:
    """The network's first and last layer by name; looking up embeddings is no layer's work."""
    names = [name for name in named_layers(model) if not isinstance(model.get_submodule(name), nn.Embedding)]
    return {*(names[:1] if first else ()), *(names[-1:] if last else ())}


def _obstacle(layer: nn.Module) -> str | None:
    """Why a layer's basis cannot be frozen, if so."""
    weight = layer._parameters["weight"]
    assert weight is not None
    kind = matricization(layer).kind
    if kind in ("embedding", "transposed"):
        return f"is a {type(layer).__name__}, for which OIALR has no form with a core"
    if not weight.requires_grad:
        return "does not train: its basis has nothing to settle from"
    return None


def _is_thin(layer: nn.Module) -> bool:
    form = matricization(layer, ROW_AXES)
    if form.kind != "conv":
        return min(form.rows, form.cols) * THIN <= max(form.rows, form.cols)
    alone = form.groups > 1 and form.rows == 1  # each group a single row
    return alone or form.cols * THIN < form.shape[0]
