"""Tasks small enough to be worked out by hand: a linear fit in uneven batches, and two networks with opposed losses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.tasks.batching import Samples
from ortho_cli.tasks.image_specs import Split
from ortho_cli.tasks.task import Batch, Losses, Reduce, Task

__all__ = ["OpposedTask", "UnevenTask"]

SIZE, WIDTH = 14, 3


def points() -> Batch:
    """Fourteen points of three coordinates, and what to make of them."""
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(SIZE, width, generator=generator) for name, width in (("input", WIDTH), ("target", 1))}


class UnevenTask(Task):
    """A linear fit by batches in fixed order, the last of an epoch smaller than the others."""

    def build_model(self, config: Any) -> nn.Module:
        return nn.Linear(WIDTH, 1)

    def dataset(self, split: Split) -> Samples:
        raise NotImplementedError

    def size(self, split: Split) -> int:
        return SIZE

    @property
    def steps_per_epoch(self) -> int:
        return -(-SIZE // self.data.batch)

    def batches(
        self, split: Split, epoch: int, *, batch: int, rank: int = 0, world: int = 1, skip: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        for start in list(range(0, SIZE, batch))[skip:]:
            stop = min(SIZE, start + batch)
            edges = [start + (stop - start) * part // world for part in (rank, rank + 1)]
            yield {name: value[edges[0] : edges[1]] for name, value in points().items()}

    def loss(self, model: nn.Module, batch: Batch, phase: str) -> Losses:
        outputs = model(batch["input"])
        return (outputs - batch["target"]).square().mean(), outputs, {"scale": outputs.detach().abs().mean()}

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], reduce: Reduce | None = None) -> dict[str, float]:
        return {"accuracy": sum(float(model(batch["input"]).square().sum()) for batch in batches)}

    def samples(self, model: nn.Module, generator: torch.Generator, folder: Path) -> None:
        drawn = torch.randn(2, WIDTH, generator=generator)
        (folder / "sample.txt").write_text(f"{model.training} {model(drawn).flatten().tolist()}")


class Opposed(nn.Module):
    """A maker of points and a critic of them; what is trained is chosen by the phase."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.critic = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, inputs: Tensor, phase: str) -> Tensor:
        made = self.maker(inputs)
        verdict: Tensor = self.critic(made.detach() if phase == "critic" else made)
        return verdict - self.critic(inputs) if phase == "critic" else -verdict


class OpposedTask(UnevenTask):
    """Critic and maker in turn, each with an optimizer of its own."""

    phases = ("critic", "maker")

    def build_model(self, config: Any) -> nn.Module:
        return Opposed()

    def phase_module(self, model: nn.Module, phase: str) -> nn.Module:
        return getattr(model, phase)  # type: ignore[no-any-return]

    def loss(self, model: nn.Module, batch: Batch, phase: str) -> Losses:
        outputs = model(batch["input"], phase)
        return outputs.mean(), outputs, {}

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], reduce: Reduce | None = None) -> dict[str, float]:
        return {"accuracy": 0.0}

    def samples(self, model: nn.Module, generator: torch.Generator, folder: Path) -> None:
        raise NotImplementedError
