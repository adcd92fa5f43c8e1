"""`ortho bench whiten`: the whitening layer against the published one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ortho_cli.cli.bench_bases import numbers
from ortho_cli.cli.options import JsonOption

__all__ = ["bench_whiten"]


def bench_whiten(
    widths: Annotated[str, typer.Option("--widths", metavar="N,...", help="Channels whitened together.")] = "64,256",
    groups: Annotated[str, typer.Option("--groups", metavar="N,...", help="How many times these, in a layer.")] = "1,4",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures.")] = 32,
    side: Annotated[int, typer.Option("--side", min=1, help="Side of a picture in pixels.")] = 16,
    condition: Annotated[float, typer.Option("--condition", min=1, help="Of the channels' covariance.")] = 1e3,
    ridge: Annotated[float, typer.Option("--ridge", min=1e-12, help="Added to its eigenvalues.")] = 1e-3,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Each form runs this often, shuffled.")] = 5,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option("--device", help="Where to train, e.g. cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """The whitening layer, forward and backward, in time and error, against the published Pade and Lyapunov form.

    Example: ortho bench whiten --widths 64 --groups 1,2,4
    """
    sizes = [numbers("--widths", widths), numbers("--groups", groups)]
    from ortho_cli.cli.show import console_out, print_json, table
    from ortho_cli.methods.whiten_benchmark import measure_whiten

    settings: dict[str, Any] = {
        "batch": batch, "side": side, "condition": condition, "ridge": ridge, "rounds": rounds, "threads": threads,
        "device": device,
    }  # fmt: skip
    found = list(measure_whiten(*sizes, **settings))
    if as_json:
        print_json({"command": "bench whiten", **settings, "details": [each.as_dict() for each in found]})
        return
    rows = [
        (
            each.width,
            each.groups,
            each.name,
            f"{each.median * 1e3:.1f}",
            f"{each.ratio:.2f}",
            "-" if each.error is None else f"{each.error:.1e}",
        )
        for each in found
    ]
    table(console_out(), ["width", "groups", "layer", "median ms", "x published", "error of D"], rows)
