"""Factorising the 160 linear layers of Stable Diffusion 1.5's attention blocks, beside `torch.linalg.svd` of each.

    python tests/benchmarks/factorize.py [--rounds 3] [--scale 0.25] [--rank 32] [--every 1]

Weights are Gaussian: with no decay in their spectra, where an approximation has the least to hold on to. In every
round each way takes all layers, in shuffled order; times are medians, as ratios to the decomposition in the same
rounds, errors the total over the layers against the smallest possible.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ortho_cli.checkpoints.layer_pool import LayerPool, default_workers
from ortho_cli.linalg.ranks import LayerSize, scaled_rank
from ortho_cli.linalg.spectral import frobenius_norm, spectral_factors

SHAPES = Path(__file__).parent.parent / "data" / "sd15_unet_diffusers_shapes.json"
SVD = "torch.linalg.svd, layer by layer"


def attention_weights(every: int) -> dict[str, Tensor]:
    """Random weights at the shapes of the q, k, v, out and feed-forward layers; every n-th of each shape."""
    shapes = json.loads(SHAPES.read_text())
    generator = torch.Generator().manual_seed(0)
    seen: dict[tuple[int, ...], int] = {}
    weights = {}
    for name, shape in shapes.items():
        if "attentions" in name and name.endswith(".weight") and len(shape) == 2:
            place = seen[tuple(shape)] = seen.get(tuple(shape), -1) + 1
            if place % every == 0:
                weights[name] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=0.25)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--every", type=int, default=1, help="take one layer of so many of each shape")
    parser.add_argument("--gram", action="store_true", help="time the exact Gram route too")
    options = parser.parse_args()
    weights = attention_weights(options.every)
    print(f"{len(weights)} layers, {sum(map(Tensor.numel, weights.values())):,} weights, {options.rounds} rounds")
    bytes_of = {name: 8 * weight.nbytes for name, weight in weights.items()}

    def decompose() -> dict[str, Tensor]:
        return {name: torch.linalg.svd(weight, full_matrices=False).S for name, weight in weights.items()}

    def factor(rank: Callable[[Tensor], int], method: str, workers: int) -> Callable[[], dict[str, Tensor]]:
        def one(name: str) -> Tensor:
            weight = weights[name]
            return spectral_factors(weight, rank(weight), method=method).error

        def run() -> dict[str, Tensor]:
            if workers == 1:
                return {name: one(name) for name in weights}
            return dict(zip(weights, LayerPool(one, workers=workers).map(bytes_of), strict=True))

        return run

    rules: dict[str, Callable[[Tensor], int]] = {
        f"scale {options.scale}": lambda weight: scaled_rank(LayerSize(*weight.shape), options.scale),
        f"rank {options.rank}": lambda weight: options.rank,
    }
    ways: dict[str, Callable[[], dict[str, Tensor]]] = {SVD: decompose}
    for label, rule in rules.items():
        for workers in sorted({1, default_workers()}):
            ways[f"{label}, auto, {workers} at a time"] = factor(rule, "auto", workers)
            if options.gram:
                ways[f"{label}, gram, {workers} at a time"] = factor(rule, "gram", workers)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    results: dict[str, dict[str, Tensor]] = {}
    order = random.Random(0)
    for _ in range(options.rounds):
        for way in order.sample(list(ways), len(ways)):
            start = time.perf_counter()
            results[way] = ways[way]()
            seconds[way].append(time.perf_counter() - start)
    spectra = results.pop(SVD)
    base = statistics.median(seconds[SVD])
    print(f"{SVD:40} {base:7.2f} s")
    for way, errors in results.items():
        rule = rules[way.split(",")[0]]
        total = sum(float(error) ** 2 * float(frobenius_norm(weights[name])) ** 2 for name, error in errors.items())
        least = sum(float(spectra[name][rule(weight) :].double().square().sum()) for name, weight in weights.items())
        middle = statistics.median(seconds[way])
        print(f"{way:40} {middle:7.2f} s  {base / middle:5.1f} x faster  squared error {total / least - 1:+.3%}")


if __name__ == "__main__":
    main()
