"""Learning rates by layer: an adapter of a text encoder, say, learns more slowly than that of the network it serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ortho_cli.checkpoints.globs import compile_glob
from ortho_cli.errors import TargetError

__all__ = ["rate_groups"]


def rate_groups(
    layers: Mapping[str, Sequence[nn.Parameter]], rate: float | None, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Optimizer groups of the parameters that want a learning rate of their own.

    Args:
        layers: what each layer trains, by its name.
        rate: of layers that no pattern matches; None: the optimizer's, without a group.
        rates: glob over names -> rate; the last that matches wins.

    Raises:
        TargetError: a pattern that matches no layer.

    >>> first, second = nn.Parameter(nn.Linear(1, 1).weight), nn.Parameter(nn.Linear(1, 1).weight)
    >>> groups = rate_groups({"unet.to_q": [first], "text_encoder.q_proj": [second]}, None, {"text_encoder.**": 1e-5})
    >>> [(group["lr"], group["params"][0] is second) for group in groups]
    [(1e-05, True)]
    """
    own = dict.fromkeys(layers, rate)
    for pattern, chosen in rates.items():
        glob = compile_glob(pattern)
        matched = [name for name in layers if glob.fullmatch(name)]
        if not matched:
            raise TargetError(
                f"rates: {pattern!r} matches none of the {len(layers)} adapted layers",
                hint=f"they are such as {', '.join(list(layers)[:2])}",
            )
        own |= dict.fromkeys(matched, chosen)
    wanted = sorted({value for value in own.values() if value is not None}, reverse=True)
    return [
        {"params": [each for name in layers if own[name] == value for each in layers[name]], "lr": value}
        for value in wanted
    ]
