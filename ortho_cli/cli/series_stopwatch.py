"""Time `ortho analyze stability` on a series of a vision transformer's shape, beside the straightforward form."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path

from .stopwatch import ORTHO, START_UP, Timing, run_once, run_rounds

__all__ = ["OURS", "PLAIN", "SeriesTimings", "measure_series_commands", "vit_shapes"]

PLAIN, OURS = "two SVDs a pair, P^T P formed", "ortho analyze stability"
# Runs in a fresh interpreter, with all threads: what the paper's notebook does, column norms included.
SCRIPT = """
import json, sys
import torch
from safetensors.torch import load_file

def factor(weight):
    weight = weight.reshape(weight.shape[0], -1)
    u, _, vh = torch.linalg.svd(weight if weight.shape[0] >= weight.shape[1] else weight.T, full_matrices=False)
    return u @ vh

found = []
for before, now in zip(sys.argv[2:], sys.argv[3:]):
    first, second = load_file(before), load_file(now)
    for name in second:
        p, q = factor(first[name]), factor(second[name])
        similarity = p.T @ q / (p.norm(dim=0).max() * q.norm(dim=0).max())
        found.append([name, now, similarity.diagonal().mean().item()])
json.dump(found, open(sys.argv[1], "w"))
"""
START = "import torch; from ortho_cli.__main__ import main; main()"


@dataclass(frozen=True)
class SeriesTimings:
    """Timings of whole commands, the plain form first; the largest difference of a value, where weights have full rank.

    `unresolved` counts the values that were left out: of weights whose condition, by chance, is over 1e5.
    """

    timings: list[Timing]
    largest_difference: float
    unresolved: int


def vit_shapes(blocks: int, width: int = 768) -> dict[str, tuple[int, ...]]:
    """The matrices of a ViT with patches of 16, of so many blocks; 12 of width 768 make ViT-B/16's 50.

    >>> len(vit_shapes(12))
    50
    """
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (width, 3, 16, 16)}
    for block in range(blocks):
        parts = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width)}
        parts["mlp.fc2"] = (width, 4 * width)
        shapes |= {f"blocks.{block}.{name}.weight": shape for name, shape in parts.items()}
    return shapes | {"head.weight": (1000, width)}


def measure_series_commands(
    *,
    checkpoints: int,
    blocks: int,
    width: int = 768,
    condition: float = 100.0,
    rounds: int = 1,
    folder: Path | None = None,
) -> SeriesTimings:
    """Write a series of weights that move less and less, and time both ways to its stability.

    Args:
        checkpoints: how many.
        blocks: of the transformer; 12 is ViT-B, 350 MB a checkpoint.
        width: of the transformer.
        condition: of the weights, about: the precision that is needed depends on it.
        rounds: each command runs this often, shuffled.
        folder: where the series goes for a moment.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".ortho-bench-") as scratch:
        place = Path(scratch)
        files = _write_series(place / "series", checkpoints, vit_shapes(blocks, width), condition)
        plain, report = place / "plain.json", place / "report"
        commands = {
            PLAIN: [sys.executable, "-c", SCRIPT, str(plain), *map(str, files)],
            START_UP: [sys.executable, "-c", START, "analyze", "stability", *map(str, files[:2]), "--dry-run"],
            OURS: [
                *ORTHO, "analyze", "stability", str(place / "series"), "-o", str(report), "--no-cache", "-q",
                "--format", "csv",
            ],
        }  # fmt: skip
        timings = run_rounds(commands, rounds, [report])
        if not report.is_dir():  # another command ran after it
            run_once(commands[OURS])
        return SeriesTimings(timings, *_differences(plain, report / "stability.csv"))


def _write_series(folder: Path, count: int, shapes: dict[str, tuple[int, ...]], condition: float) -> list[Path]:
    """Weights of known condition; each step turns their inputs a little, and less as time goes on."""
    import torch
    from safetensors.torch import save_file

    from ortho_cli.methods.polar_benchmark import weight_of

    folder.mkdir()
    generator, files = torch.Generator().manual_seed(0), []
    weights = {name: weight_of((shape[0], prod(shape[1:])), condition).float() for name, shape in shapes.items()}
    for step in range(1, count + 1):
        files.append(folder / f"step-{step:04d}.safetensors")
        save_file({name: weight.reshape(shapes[name]) for name, weight in weights.items()}, files[-1])
        for name, weight in weights.items():
            width = weight.shape[1]
            noise = torch.randn(width, width, generator=generator)
            weights[name] = weight + weight @ noise * (0.3 / (1 + step) / width**0.5)
    return files


def _differences(plain: Path, table: Path) -> tuple[float, int]:
    """The largest difference of both ways, and how many values were not compared."""
    from ortho_cli.analysis.stability_report import read_changes

    values = json.loads(plain.read_text("utf-8"))
    expected = {(name.removesuffix(".weight"), int(Path(file).stem[5:])): value for name, file, value in values}
    found = read_changes(table)
    flawed = {(change.layer, change.step) for change in found if not change.is_resolved}
    compared = [x for x in found if not flawed & {(x.layer, x.step), (x.layer, x.reference_step or 0)}]
    largest = max(abs(x.stability - float(expected[x.layer, x.step])) for x in compared)
    return largest, len(found) - len(compared)
