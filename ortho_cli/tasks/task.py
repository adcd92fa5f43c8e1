"""What is trained: a task gives the loop its data, model, loss and metrics, and knows no method and no optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .batching import Samples, eval_parts, load_batches, shuffled, train_parts
from .image_specs import Split

if TYPE_CHECKING:
    from ortho_cli.checkpoints.checkpoint import Checkpoint
    from ortho_cli.recipe.data import Data
    from ortho_cli.recipe.tasks import Task as TaskConfig

__all__ = ["Batch", "Losses", "Reduce", "Task"]

EVAL_SEED = 0

Batch = dict[str, Tensor]
Losses = tuple[Tensor, Any, dict[str, Tensor]]
"""The loss (a scalar with a graph), the model's outputs for the methods, and named scalars for the log."""
Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


class Task(ABC):
    """Base of all tasks. Data is opened when it is first asked for, so that a dry run needs none.

    Args:
        task: the recipe's `task` section.
        data: the recipe's `data` section.
        seed: of the run; with the epoch it decides order and augmentation.
    """

    phases: tuple[str, ...] = ("train",)
    """Each has an optimizer of its own."""
    judged: str = ""
    """The part of the model whose weights are averaged and then judged; empty: all of it."""
    splits: tuple[str, ...] = ("val", "train")
    """Parts of the data by which a state can be judged."""
    metrics: tuple[str, ...] = ()
    """Names that `evaluate` may give; empty: not known beforehand."""

    def __init__(self, task: TaskConfig, data: Data, *, seed: int) -> None:
        self.config = task
        self.data = data
        self.seed = seed

    @abstractmethod
    def build_model(self, config: Any) -> nn.Module:
        """The model of a recipe's `model` section, for this task's inputs and outputs; also on the meta device."""

    @abstractmethod
    def dataset(self, split: Split) -> Samples:
        """A split, as samples by (epoch, place) and as batches of them."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, phase: str) -> Losses:
        """The loss of one batch on this process, a mean over its samples."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], reduce: Reduce | None = None) -> dict[str, float]:
        """Metrics over batches that together hold each sample once; the model's mode is put back."""

    def take_over(self, model: nn.Module, checkpoint: Checkpoint) -> None:  # noqa: B027 - few do
        """Fill what this task added to a model from the base that the rest of it was filled from, if that has it."""

    def gather(self, model: nn.Module) -> list[str]:
        """Make of the untouched base, on its device, what training needs and the data lacks; one process is asked.

        Returns:
            What was made, in sentences.
        """
        return []

    def phase_module(self, model: nn.Module, phase: str) -> nn.Module:
        """The part of the model that a phase trains; here all of it."""
        return model

    def keep(self, folder: Path) -> None:  # noqa: B027 - few do
        """Write into a run's folder what the task learnt from its data, such as a vocabulary, as the run begins."""

    def recall(self, folder: Path) -> None:  # noqa: B027 - few do
        """Take up what `keep` wrote, before anything is asked of the task."""

    def log_items(self, path: Path) -> None:  # noqa: B027 - few do
        """Where the coming evaluation notes every single sample, and finds those that it has done already."""

    def samples(self, model: nn.Module, generator: torch.Generator, folder: Path) -> None:  # noqa: B027 - few do
        """Write what the model makes into a folder, to look at; drawn from the generator alone."""

    def example(self, batch: int) -> Batch | None:
        """A batch of the right shapes without data, also on the meta device; None where only data tells them."""
        return None

    def size(self, split: Split) -> int:
        """Samples in a split."""
        return len(self.dataset(split))

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches (over all processes) in the training split."""
        return len(train_parts(self.size("train"), self.data.batch))

    def batches(
        self, split: Split, epoch: int, *, batch: int, rank: int = 0, world: int = 1, skip: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        """One rank's batches of an epoch.

        Args:
            split: `train` is shuffled anew each epoch and drops an incomplete batch; `eval` is whole, in one order for
                all runs (a random one, so that its first batches are like the rest).
            epoch: of training; decides order and augmentation.
            batch: samples a batch, over all processes.
            rank: of this process.
            world: number of processes.
            skip: batches already seen, when a run is resumed.
            workers: processes that load ahead.

        Raises:
            RecipeError: no data, or a batch that does not fit the split or the processes.
        """
        samples = self.dataset(split)
        if split == "train":
            order, parts = shuffled(len(samples), self.seed, epoch), train_parts(len(samples), batch, rank, world)
        else:
            order, parts = shuffled(len(samples), EVAL_SEED, 0), eval_parts(len(samples), batch, rank, world)
        return load_batches(samples, order, parts[skip:], epoch, workers)
