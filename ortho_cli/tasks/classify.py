"""Pictures into classes: cross-entropy, with label smoothing and mixup; accuracy, exact over processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli import registry
from ortho_cli.errors import RecipeError

from .draws import seed_of
from .image_data import load_images
from .image_samples import ImageSamples
from .image_set import ImageSet
from .image_specs import SPECS, Split
from .task import Batch, Losses, Reduce, Task

if TYPE_CHECKING:
    from ortho_cli.recipe.data import Images
    from ortho_cli.recipe.tasks import Classify

__all__ = ["ClassifyTask", "mix_pairs"]

MIXUP_STREAM = 2  # of the random numbers; 0 and 1 are the augmentations'
TOP = 5  # top-5 accuracy is reported where there are more classes than that


class ClassifyTask(Task):
    """Train and judge a classifier of pictures.

    Where the recipe keeps some classes only, training sees no others, and `accuracy` and `loss` are over them. What a
    fine-tuning forgets of the others is told twice: `accuracy_other_classes` with all classes to choose from, and
    `accuracy_among_other_classes` with those others only, which asks what the features still tell apart (class- and
    task-incremental accuracy of van de Ven and Tolias 2019, arXiv:1904.07734).

    Args:
        task: label smoothing, and mixup's alpha.
        data: the pictures.
        seed: of the run.

    Raises:
        RecipeError: pictures that have no classes.
    """

    metrics = ("loss", "accuracy", "accuracy_top5", "accuracy_other_classes", "accuracy_among_other_classes")

    def __init__(self, task: Classify, data: Images, *, seed: int) -> None:
        super().__init__(task, data, seed=seed)
        self.config: Classify = task
        self.data: Images = data
        self.spec = SPECS[data.name]
        if not self.spec.has_classes:
            raise RecipeError(
                f"data {data.name} has no classes to tell", hint="it is for the task gan; ortho recipe check --data"
            )
        self.in_channels = self.spec.channels
        self.image_size = data.size or self.spec.size
        self._opened: dict[Split, ImageSet] = {}
        self._splits: dict[Split, ImageSamples] = {}
        self._kept = torch.tensor(data.classes) if data.classes is not None else None

    @property
    def num_classes(self) -> int:
        """Classes of the whole set; for a folder of one's own they are counted, which opens it."""
        return self.spec.num_classes or len(self.images("train").classes)

    def images(self, split: Split) -> ImageSet:
        """A split as it is stored.

        Raises:
            RecipeError: the data is not there, or not what the recipe says.
        """
        if split not in self._opened:
            self._opened[split] = load_images(self.data, split)
            if len(self._opened[split].classes) == 1:
                raise RecipeError("one class alone: there is nothing to tell", hint="one folder a class")
        return self._opened[split]

    def dataset(self, split: Split) -> ImageSamples:
        """A split as normalised pictures, augmented for training."""
        if split not in self._splits:
            augment = self.data.augment if split == "train" else ()
            self._splits[split] = ImageSamples(self.images(split), self.spec, self.image_size, augment, self.seed)
        return self._splits[split]

    def build_model(self, config: Any) -> nn.Module:
        """The model of a recipe's `model` section, for these pictures and classes."""
        model: nn.Module = registry.resolve("models", config.name)(
            config, self.num_classes, self.in_channels, self.image_size
        )
        return model

    def example(self, batch: int) -> Batch:
        """Black pictures, all of the first class."""
        shape = (batch, self.in_channels, self.image_size, self.image_size)
        return {"image": torch.zeros(shape), "label": torch.zeros(batch, dtype=torch.long)}

    def batches(
        self, split: Split, epoch: int, *, batch: int, rank: int = 0, world: int = 1, skip: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        """As `Task.batches`; with mixup, training batches carry `mix`, the weight of each picture against its pair's.

        Raises:
            RecipeError: mixup, and a process has an odd number of samples.
        """
        found = super().batches(split, epoch, batch=batch, rank=rank, world=world, skip=skip, workers=workers)
        if split == "eval" or not self.config.mixup:
            return found
        if batch // world % 2:
            raise RecipeError(
                f"mixup mixes pairs, and {batch} samples on {world} processes leave one alone",
                hint="change data.batch",
            )
        return self._with_weights(found, epoch, skip)

    def _with_weights(self, batches: Iterator[Batch], epoch: int, skip: int) -> Iterator[Batch]:
        """One weight from Beta(alpha, alpha) a batch, the same for every rank."""
        for number, batch in enumerate(batches, start=skip):
            draw = np.random.default_rng(seed_of(self.seed, epoch, MIXUP_STREAM, number))
            yield {**batch, "mix": torch.tensor(draw.beta(self.config.mixup, self.config.mixup), dtype=torch.float32)}

    def loss(self, model: nn.Module, batch: Batch, phase: str) -> Losses:
        """Cross-entropy; with mixup, of the mixed pictures against both labels.

        The accuracy beside it counts the picture's own label.
        """
        images, labels, mix = batch["image"], batch["label"], batch.get("mix")
        smoothing = self.config.label_smoothing
        logits = model(images if mix is None else mix_pairs(images, mix))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        if mix is not None:
            paired = labels.view(-1, 2).flip(1).flatten()
            loss = mix * loss + (1 - mix) * F.cross_entropy(logits.float(), paired, label_smoothing=smoothing)
        accuracy = (logits.detach().argmax(-1) == labels).float().mean()
        return loss, logits, {"accuracy": accuracy}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], reduce: Reduce | None = None) -> dict[str, float]:
        """Mean loss (without smoothing), accuracy, and top-5 accuracy where there are more than five classes.

        Sums over samples are added up over processes and divided once, so the result does not depend on how the split
        was shared out.
        """
        was_training = model.training
        model.eval()
        sums: Tensor | None = None
        for batch in batches:
            found = self._sums(model(batch["image"]).float(), batch["label"])
            sums = found if sums is None else sums + found
        model.train(was_training)
        if sums is None:
            raise ValueError("no batches to evaluate on")
        if reduce is not None:
            sums = reduce(sums)
        loss, right, right_top, count, right_others, right_among, others = sums.tolist()
        if not count:
            raise RecipeError("no evaluated sample is of the classes in data.classes", hint="raise train.limit_batches")
        metrics = {"loss": loss / count, "accuracy": right / count}
        if self.num_classes > TOP:
            metrics["accuracy_top5"] = right_top / count
        if others:
            metrics["accuracy_other_classes"] = right_others / others
            metrics["accuracy_among_other_classes"] = right_among / others
        return metrics

    def _sums(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sums over kept classes: loss, hits, top-5 hits, samples; over others: hits, hits among them, samples."""
        losses = F.cross_entropy(logits, labels, reduction="none")
        ranked = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices == labels[:, None]
        hits, top_hits = ranked[:, 0], ranked.any(-1)
        kept, among = torch.ones_like(hits), hits
        if self._kept is not None:
            classes = self._kept.to(labels.device)
            kept = torch.isin(labels, classes)
            among = logits.index_fill(-1, classes, -torch.inf).argmax(-1) == labels
        columns = (losses * kept, hits & kept, top_hits & kept, kept, hits & ~kept, among & ~kept, ~kept)
        return torch.stack([column.double().sum() for column in columns])


def mix_pairs(images: Tensor, mix: Tensor) -> Tensor:
    """Blend neighbours of a batch, first with second, third with fourth: `mix` of itself, the rest of the other.

    The order of a batch is random, so neighbours are random pairs; and they stay pairs when a batch is shared out.

    Args:
        images: `(B, ...)`, B even.
        mix: a scalar in [0, 1].

    Reference: Zhang et al. 2017, arXiv:1710.09412.

    >>> mix_pairs(torch.tensor([0.0, 4.0]), torch.tensor(0.25)).tolist()
    [3.0, 1.0]
    """
    return torch.lerp(images.view(-1, 2, *images.shape[1:]).flip(1).view(images.shape), images, mix)
