"""`ortho bench polar`, `nog` and `stability`: decompositions, gradients made of them, and whole reports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ortho_cli.cli.options import JsonOption
from ortho_cli.errors import UsageError

__all__ = ["bench_nog", "bench_polar", "bench_stability", "numbers"]


def bench_polar(
    shapes: Annotated[
        str, typer.Option("--shapes", metavar="MxN,...", help="Of the weights.")
    ] = "768x768,2304x768,3072x768",
    condition: Annotated[float, typer.Option("--condition", min=1, help="Of the weights.")] = 1e3,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Each route runs this often, shuffled.")] = 5,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option("--device", help="Where the weights are, e.g. cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """The nearest orthogonal matrix on each route, in time and error, against a float32 SVD.

    Example: ortho bench polar --shapes 1024x1024 --condition 1e5
    """
    settings = {"condition": condition, "rounds": rounds, "threads": threads, "device": device}
    _show_polar("polar", shapes, settings, as_json)


def bench_nog(
    shapes: Annotated[
        str, typer.Option("--shapes", metavar="MxN,...", help="Of the gradients.")
    ] = "64x576,30x16384,6x524288,512x4608",
    condition: Annotated[float, typer.Option("--condition", min=1, help="Of the gradients.")] = 1e2,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Each form runs this often, shuffled.")] = 15,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option("--device", help="Where the gradients are, e.g. cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """The nearest orthogonal gradient of the paper's layers, in time and error, against a float32 SVD.

    Example: ortho bench nog --shapes 64x27,512x512
    """
    settings = {"condition": condition, "rounds": rounds, "threads": threads, "device": device}
    _show_polar("nog", shapes, settings, as_json)


def _show_polar(command: str, shapes: str, settings: dict[str, Any], as_json: bool) -> None:
    from ortho_cli.cli.show import console_out, print_json, table
    from ortho_cli.methods.polar_benchmark import NOG, ROUTES, measure_polar

    found = list(measure_polar(_shapes(shapes), forms=NOG if command == "nog" else ROUTES, **settings))
    if as_json:
        print_json({"command": f"bench {command}", **settings, "details": [each.as_dict() for each in found]})
        return
    rows = [
        (
            "x".join(map(str, each.shape)),
            each.name,
            f"{each.median * 1e3:.2f}",
            f"{each.speedup:.2f}",
            f"{each.error:.1e}",
        )
        for each in found
    ]
    table(console_out(), ["shape", "route", "median ms", "x faster", "error"], rows)


def bench_stability(
    checkpoints: Annotated[int, typer.Option("--checkpoints", min=2, help="In the series.")] = 20,
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="Of the transformer; 12 is ViT-B, in minutes.")] = 1,
    width: Annotated[int, typer.Option("--width", min=16, help="Of the transformer.")] = 768,
    condition: Annotated[float, typer.Option("--condition", min=1, help="Of the weights, about.")] = 100.0,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Each command runs this often, shuffled.")] = 1,
    folder: Annotated[Path | None, typer.Option("--folder", help="Where the series goes for a moment.")] = None,
    as_json: JsonOption = False,
) -> None:
    """A whole stability report of a ViT-B-shaped series, in time and memory, against two SVDs for each pair.

    Example: ortho bench stability --checkpoints 20 --blocks 2
    """
    from ortho_cli.cli.series_stopwatch import measure_series_commands
    from ortho_cli.cli.show import console_out, print_json, table

    found = measure_series_commands(
        checkpoints=checkpoints, blocks=blocks, width=width, condition=condition, rounds=rounds, folder=folder
    )
    if as_json:
        details = [timing.as_dict() for timing in found.timings]
        print_json(
            {
                "command": "bench stability",
                "details": details,
                "largest_difference": found.largest_difference,
                "unresolved": found.unresolved,
            }
        )
        return
    rows = [
        (timing.name, f"{timing.median:.2f}", f"{1 / timing.ratio:.2f}", f"{timing.peak_bytes / 2**20:.0f}")
        for timing in found.timings
    ]
    table(console_out(), ["command", "median s", "x faster", "peak MiB"], rows)
    told = [("largest difference of a value", f"{found.largest_difference:.1e}"), ("not compared", found.unresolved)]
    table(console_out(), None, told)


def numbers(option: str, text: str) -> list[int]:
    """The numbers of a list that commas separate."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise UsageError(f"{option} {text!r} is no list of positive numbers", hint=f"e.g. {option} 512,4096")
    return found


def _shapes(text: str) -> list[tuple[int, int]]:
    """The shapes of a list that commas separate."""
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part.strip()) for part in text.split(",")]
    if not all(found):
        raise UsageError(f"--shapes {text!r} is no list of shapes", hint="as in 768x768,3072x768")
    return [(int(match[1]), int(match[2])) for match in found if match]
