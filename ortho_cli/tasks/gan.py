"""Pictures from noise: a generator against a discriminator, in two phases with an optimizer each.

All noise belongs to a sample of an epoch, as augmentation does: a resumed run draws what an uninterrupted one draws,
and two processes draw together what one draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli import registry
from ortho_cli.linalg.frechet import frechet_distance

from .draws import normal, uniform
from .gan_augment import DRAWS
from .gan_losses import LOSSES
from .gan_pair import Adversaries
from .image_data import load_images
from .image_samples import ImageSamples
from .image_specs import SPECS, Split
from .picture_grid import save_grid
from .task import Batch, Losses, Reduce, Task

if TYPE_CHECKING:
    from ortho_cli.recipe.data import Images
    from ortho_cli.recipe.tasks import GAN

__all__ = ["GANTask"]

# Of the random numbers; 0 to 2 are the pictures', 7 and 8 those of what is generated.
NOISE_STREAM, DRAW_STREAM, MIX_STREAM, JUDGE_STREAM, SIGN_STREAM, UNIFORM_STREAM = 3, 4, 5, 6, 9, 10
JUDGE_SEED = 0  # all runs are judged by the same noise
GRID = 8  # side of the squares whose means are compared


class GANTask(Task):
    """Train a generator against a discriminator, and judge it by how its pictures' colours and places are distributed.

    `frechet_pixels` is the Frechet distance between real and generated pictures reduced to 8 x 8: no network's
    features are needed, it is exact over processes, and it tells a run that collapsed from one that did not. It is no
    FID: what is finer than an eighth of a picture it does not see.

    Args:
        task: loss, penalties and augmentation.
        data: the pictures; classes do not matter.
        seed: of the run.
    """

    phases = ("discriminator", "generator")
    metrics = ("frechet_pixels",)
    judged = "generator"

    def __init__(self, task: GAN, data: Images, *, seed: int) -> None:
        super().__init__(task, data, seed=seed)
        self.config: GAN = task
        self.data: Images = data
        spec = SPECS[data.name]
        half = (0.5,) * spec.channels
        self.spec = replace(spec, mean=half, std=half)  # pictures in [-1, 1], as generators end with tanh
        self.image_size = data.size or spec.size
        self._splits: dict[Split, ImageSamples] = {}
        self.noise_dim = 0  # known once there is a generator

    def build_model(self, config: Any) -> Adversaries:
        """Both networks of a recipe's `model` section."""
        generator, discriminator = registry.resolve("models", config.name)(config, self.spec.channels, self.image_size)
        self.noise_dim = generator.noise_dim
        return Adversaries(generator, discriminator, self.config.augment)

    def phase_module(self, model: nn.Module, phase: str) -> nn.Module:
        """The network of that name."""
        return model.get_submodule(phase)

    def dataset(self, split: Split) -> ImageSamples:
        """A split as pictures in [-1, 1], augmented for training."""
        if split not in self._splits:
            augmented = self.data.augment if split == "train" else ()
            images = load_images(self.data, split)
            self._splits[split] = ImageSamples(images, self.spec, self.image_size, augmented, self.seed)
        return self._splits[split]

    def example(self, batch: int) -> Batch:
        """Grey pictures, and everything that is drawn."""
        shapes = {
            "image": (batch, self.spec.channels, self.image_size, self.image_size), "noise": (batch, 2, self.noise_dim),
            **({"draws": (batch, 3, DRAWS)} if self.config.augment else {}),
            **({"mix": (batch, 1, 1, 1)} if self.config.gradient_penalty else {}),
            **({"r1": ()} if self.config.r1 else {}),
        }  # fmt: skip
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    def batches(
        self, split: Split, epoch: int, *, batch: int, rank: int = 0, world: int = 1, skip: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        """As `Task.batches`; training batches carry what `Adversaries` takes, `r1` in one of every `r1_every`."""
        found = super().batches(split, epoch, batch=batch, rank=rank, world=world, skip=skip, workers=workers)
        before = epoch * (self.size(split) // batch)
        for number, each in enumerate(found, start=before + skip):
            if split == "train":
                due = number % self.config.r1_every == 0
                yield {**each, **self._drawn(epoch, each["index"], regularized=due)}
            else:
                yield {**each, "noise": normal(JUDGE_SEED, 0, each["index"], self.noise_dim, JUDGE_STREAM)}

    def _drawn(self, epoch: int, index: Tensor, *, regularized: bool) -> Batch:
        """Everything random of some samples in an epoch."""
        places, size = index.numpy(), len(index)
        noise = normal(self.seed, epoch, index, 2 * self.noise_dim, NOISE_STREAM).view(size, 2, -1)
        drawn = {"noise": noise, "epoch": torch.tensor(epoch)}
        if self.config.augment:
            draws = uniform(self.seed, epoch, places, 3 * DRAWS, DRAW_STREAM)
            drawn["draws"] = torch.from_numpy(draws.astype(np.float32)).view(size, 3, DRAWS)
        if self.config.gradient_penalty:
            mix = uniform(self.seed, epoch, places, 1, MIX_STREAM)
            drawn["mix"] = torch.from_numpy(mix.astype(np.float32)).view(size, 1, 1, 1)
        if self.config.r1 and regularized:
            drawn["r1"] = torch.tensor(True)
        return drawn

    def loss(self, model: nn.Module, batch: Batch, phase: str) -> Losses:
        """The adversarial loss of a phase, of the discriminator with its penalties; beside it how sure it is.

        For penalties on the generator there are its `noise` and, by their number, random `signs` of each sample and
        `uniform` numbers.
        """
        found = model(phase, batch)
        adversarial = LOSSES[self.config.loss]
        if phase == "generator":
            drawn = {"signs": partial(self._signs, batch), "uniform": partial(self._uniform, batch, UNIFORM_STREAM)}
            outputs = {**found, "noise": batch["noise"][:, 1], **drawn}
            return adversarial.generator(found["fake"]), outputs, {}
        loss = adversarial.discriminator(found["real"], found["fake"])
        said = {name: found[name].detach().mean() for name in ("real", "fake")}
        for name, weight in (("r1", self.config.r1), ("gradient_penalty", self.config.gradient_penalty)):
            if name in found:
                loss = loss + weight * found[name]
                said[name] = found[name].detach()
        return loss, found, said

    def _signs(self, batch: Batch, count: int) -> Tensor:
        """Vectors of -1 and 1 around the noise, `(count, B, D)`; drawn as all else is, by sample and epoch."""
        drawn = self._uniform(batch, SIGN_STREAM, count * self.noise_dim) < 0.5
        return (1 - 2 * drawn.float()).view(-1, count, self.noise_dim).transpose(0, 1)

    def _uniform(self, batch: Batch, stream: int, columns: int) -> Tensor:
        """Numbers in [0, 1) of each sample in its epoch, `(B, columns)` float64."""
        drawn = uniform(self.seed, int(batch["epoch"]), batch["index"].cpu().numpy(), columns, stream)
        return torch.from_numpy(drawn).to(batch["noise"].device)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], reduce: Reduce | None = None) -> dict[str, float]:
        """The Frechet distance of reduced pictures; sums are added up over processes, and divided once."""
        was_training = model.training
        model.eval()
        sums: Tensor | None = None
        for batch in batches:
            made = model("sample", {"noise": batch["noise"]})["pictures"]
            found = torch.stack([_moments(pictures) for pictures in (batch["image"], made)])
            sums = found if sums is None else sums + found
        model.train(was_training)
        if sums is None:
            raise ValueError("no batches to evaluate on")
        real, made = (sums if reduce is None else reduce(sums)).cpu()
        return {"frechet_pixels": float(frechet_distance(*_gaussian(real), *_gaussian(made)))}

    @torch.no_grad()
    def samples(self, model: nn.Module, generator: torch.Generator, folder: Path) -> None:
        """`samples.png`: the same noise at every step, in a square."""
        drawn = torch.randn(self.config.samples, self.noise_dim, generator=generator)
        noise = drawn.to(next(model.parameters()).device)
        made = [model("sample", {"noise": part})["pictures"] for part in torch.split(noise, self.data.batch)]
        save_grid(torch.cat(made), folder / "samples.png")


def _moments(pictures: Tensor) -> Tensor:
    """Of pictures reduced to 8 x 8: the sums of outer products, of values, and of ones, as one `(d + 1, d + 1)`."""
    values = F.adaptive_avg_pool2d(pictures.double(), GRID).flatten(1)
    values = F.pad(values, (0, 1), value=1.0)
    found: Tensor = values.T @ values
    return found


def _gaussian(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance."""
    mean = moments[:-1, -1] / moments[-1, -1]
    return mean, moments[:-1, :-1] / moments[-1, -1] - mean.outer(mean)
