"""Variation predictability: can a small classifier tell from two pictures which coordinate of the code changed?

The protocol is the released one of Zhu et al. (arXiv:2007.10785): it sees the difference of the two pictures and learns
from a tenth of the pairs alone, since what people find easy to tell takes few examples. The release reports the best of
all epochs on the very pairs it reports on; here the learning rate falls to zero and the last state is looked at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EPOCHS", "TRAIN_SHARE", "Predictability", "variation_classifier", "variation_predictability"]

TRAIN_SHARE, EPOCHS, BATCH, RATE, WIDTH = 0.1, 200, 32, 0.01, 64  # the release's
PART = 256  # pairs at a time that are judged

Differences = Callable[[Tensor], Tensor]
"""Numbers of pairs ``(B,)`` to the differences of their pictures ``(B, C, H, W)``."""


@dataclass(frozen=True)
class Predictability:
    """What a classifier found.

    Attributes:
        score: the share of unseen pairs whose coordinate it tells.
        by_coordinate: the same of each coordinate's unseen pairs; None where it has none.
        seen: the share of the pairs it learnt from.
        trained: pairs it learnt from.
        tested: pairs it was judged by.
    """

    score: float
    by_coordinate: tuple[float | None, ...]
    seen: float
    trained: int
    tested: int


def variation_predictability(
    differences: Differences,
    changed: Tensor,
    latents: int,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Predictability:
    """Train the classifier on a tenth of some pairs, and judge it by the rest.

    Args:
        differences: made twice for no pair; those to learn from are kept, the others looked at once.
        changed: ``(n,)`` which coordinate of each pair, n at least 2.
        latents: coordinates.
        epochs: over the pairs to learn from.
        seed: of the split, the start and the order; torch's random state is put back.
        say: takes a line of progress.
    """
    count = max(1, round(TRAIN_SHARE * len(changed)))
    if len(changed) < 2:
        raise ValueError(f"pairs to learn from and pairs to judge by: two at least, found {len(changed)}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(changed), generator=generator)
    train, test = order[:count], order[count:]
    seen = torch.cat([differences(part) for part in torch.split(train, PART)])
    device = seen.device
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        model = variation_classifier(seen.shape[1], latents).to(device)
        labels = changed[train].to(device)
        optimizer = torch.optim.Adam(model.parameters(), RATE)
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * -(-count // BATCH))
        for epoch in range(epochs):
            for rows in torch.split(torch.randperm(count, generator=generator).to(device), BATCH):
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(model(seen[rows]), labels[rows]))
                optimizer.step()
                falling.step()
            say(f"VP score: epoch {epoch + 1} of {epochs} over {count:,} pairs")
    model.eval()
    with torch.no_grad():
        known = _is_right(model, seen, labels)
        right = torch.cat(
            [_is_right(model, differences(part), changed[part].to(device)) for part in torch.split(test, PART)]
        )
    of_each = (right[changed[test] == each] for each in range(latents))
    by = tuple(float(each.mean()) if len(each) else None for each in of_each)
    return Predictability(float(right.mean()), by, float(known.mean()), count, len(test))


def _is_right(model: nn.Module, seen: Tensor, labels: Tensor) -> Tensor:
    """1 for each pair whose coordinate is told, else 0; float64 on the CPU."""
    return torch.cat([model(part).argmax(1) for part in torch.split(seen, PART)]).eq(labels).double().cpu()


def variation_classifier(channels: int, latents: int, width: int = WIDTH) -> nn.Sequential:
    """The release's network: four convolutions, a pooled mean, a linear layer; for pictures of any size."""

    def block(before: int, after: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
        return [convolution, nn.BatchNorm2d(after), nn.ReLU()]

    return nn.Sequential(
        *block(channels, width, 7, 2), *block(width, width), nn.MaxPool2d(3, 2, 1), *block(width, 2 * width),
        *block(2 * width, 4 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, latents),
    )  # fmt: skip
