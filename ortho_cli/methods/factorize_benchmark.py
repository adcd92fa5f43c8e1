"""Time factorising the 160 linear layers in Stable Diffusion 1.5's attention blocks, beside torch's decomposition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ortho_cli.checkpoints.layer_pool import LayerPool, default_workers
from ortho_cli.linalg.ranks import LayerSize, scaled_rank
from ortho_cli.linalg.spectral import frobenius_norm, spectral_factors

from .side_by_side import Timing, shuffled_rounds

__all__ = ["SVD", "FactorizeTiming", "attention_shapes", "measure_factorize"]

SVD = "torch.linalg.svd, layer by layer"
TEXT_WIDTH = 768
BLOCKS = ((320, 5), (640, 5), (1280, 6))  # width, how many
FLOAT = 4


@dataclass
class FactorizeTiming(Timing):
    """Seconds of every round; `speedup` of medians over the decomposition, `excess` squared error over the least."""

    speedup: float = 1.0
    excess: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return super().as_dict() | {"speedup": self.speedup, "excess": self.excess}


def attention_shapes(every: int = 1) -> list[tuple[int, int]]:
    """Shapes `(out, in)` of the layers; every n-th of each shape.

    >>> len(attention_shapes()), sum(out * width for out, width in attention_shapes())
    (160, 242196480)
    """
    found: list[tuple[int, int]] = []
    for width, blocks in BLOCKS:
        square = [(width, width)] * (6 * blocks)  # both attentions' q and out, the first's k and v
        across = [(width, TEXT_WIDTH)] * (2 * blocks)
        outward, inward = [(8 * width, width)] * blocks, [(width, 4 * width)] * blocks
        found += square[::every] + across[::every] + outward[::every] + inward[::every]
    return found


def measure_factorize(
    *, rounds: int = 3, rank_scale: float = 0.25, rank: int = 32, every: int = 8
) -> list[FactorizeTiming]:
    """Time all layers at a share of the full rank and at one rank, as `ortho factorize` does it, in shuffled rounds.

    Weights are Gaussian: with no decay in their spectra, where an approximation has the least to hold on to.

    Args:
        rounds: how often.
        rank_scale: share of the full rank.
        rank: the same for all layers.
        every: take one layer of so many of each shape; 1 takes minutes a round.

    Returns:
        The decomposition first.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = attention_shapes(every)
    weights = {
        str(index): torch.randn(shape, generator=generator) / shape[1] ** 0.5 for index, shape in enumerate(shapes)
    }
    rules: dict[str, Callable[[Tensor], int]] = {
        f"ortho, rank scale {rank_scale:g}": lambda weight: scaled_rank(LayerSize(*weight.shape), rank_scale),
        f"ortho, rank {rank}": lambda weight: rank,
    }
    results: dict[str, dict[str, Tensor]] = {}

    def decompose() -> None:
        results[SVD] = {key: torch.linalg.svd(weight, full_matrices=False).S for key, weight in weights.items()}

    def factor(way: str) -> Callable[[], None]:
        def one(key: str) -> Tensor:
            return spectral_factors(weights[key], rules[way](weights[key])).error

        def run() -> None:
            pool = LayerPool(one, workers=default_workers())
            costs = {key: 2 * FLOAT * weight.numel() for key, weight in weights.items()}
            results[way] = dict(zip(weights, pool.map(costs), strict=True))

        return run

    forms: dict[str, Callable[[], object]] = {SVD: decompose, **{way: factor(way) for way in rules}}
    timed = shuffled_rounds(forms, rounds, "cpu")
    base = timed[SVD].median
    found = [FactorizeTiming(SVD, timed[SVD].seconds)]
    for way, rule in rules.items():
        reached = sum(float(e) ** 2 * float(frobenius_norm(weights[k])) ** 2 for k, e in results[way].items())
        least = sum(float(results[SVD][k][rule(w) :].double().square().sum()) for k, w in weights.items())
        timing = timed[way]
        found.append(FactorizeTiming(way, timing.seconds, base / timing.median, reached / least - 1))
    return found
