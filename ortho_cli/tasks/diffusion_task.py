"""What tasks of diffusion models share: noise is mixed into the latents of pictures, and a model predicts it.

All noise belongs to a sample of an epoch: a resumed run draws what an uninterrupted one draws, and two processes draw
together what one draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ortho_cli import registry
from ortho_cli.errors import RecipeError
from ortho_cli.models.stable_diffusion import StableDiffusion, draw_latents

from .batching import eval_parts, load_batches, shuffled
from .diffusion_loss import diffusion_draws, min_snr_weights, mix_noise, noise_loss, target_of
from .image_specs import Split
from .task import EVAL_SEED, Batch, Losses, Reduce, Task

if TYPE_CHECKING:
    from ortho_cli.recipe.data_captions import CaptionedPictures
    from ortho_cli.recipe.data_hints import HintedPictures
    from ortho_cli.recipe.data_subject import SubjectPictures
    from ortho_cli.recipe.tasks_control import Control
    from ortho_cli.recipe.tasks_diffusion import TextToImage
    from ortho_cli.recipe.tasks_dreambooth import Dreambooth

__all__ = ["JUDGE_SEED", "DiffusionTask"]

JUDGE_SEED = 0  # all runs are judged by the same noise


class DiffusionTask(Task):
    """Train by the error of the predicted noise (or of v, where the base predicts that).

    `loss` is the mean error over the evaluation split: unweighted, with the same noise and times for all runs.

    A batch has `image` (B, 3, H, W) in [-1, 1] or `moments` of its latents, `tokens` (B, L) or the `text` encoded,
    what `noise_of` draws, and in evaluation `counted` (B,), which is 0 of samples that only fill a batch up.
    """

    metrics: tuple[str, ...] = ("loss",)
    splits = ("val",)  # noise and times are drawn for it alone
    config: TextToImage | Control | Dreambooth
    data: CaptionedPictures | HintedPictures | SubjectPictures
    model: StableDiffusion  # known once it is built; what is called in training may be a wrapper of it
    sides: tuple[str, ...] = ("size",)
    """Keys of the data section that have to be whole numbers of latents."""

    def build_model(self, config: Any) -> StableDiffusion:
        """The diffusion model of a recipe's `model` section.

        Raises:
            RecipeError: pictures of a size that has no whole number of latents in the UNet's smallest layers.
        """
        self.model = registry.resolve("models", config.name)(config)
        grain = self.model.latent_factor * 2 ** (len(self.model.unet.config.block_out_channels) - 1)
        for key in self.sides:
            value = getattr(self.data, key)
            if value is not None and value % grain:
                near = max(grain, round(value / grain) * grain)
                raise RecipeError(
                    f"data.{key} {value} is no multiple of {grain}, which the model needs", hint=f"data.{key}: {near}"
                )
        return self.model

    def latents(self, width: int | None = None, height: int | None = None) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a picture; by default of a square one of the data's size."""
        sides = (height or self.data.size, width or self.data.size)
        rows, columns = (side // self.model.latent_factor for side in sides)
        return self.model.unet.config.in_channels, rows, columns

    def example(self, batch: int) -> Batch:
        """Grey squares, no words, and everything that is drawn."""
        size, length = self.data.size, self.model.text_encoder.config.max_position_embeddings
        noise, whole = torch.zeros(batch, *self.latents()), torch.long
        return {
            "image": torch.zeros(batch, 3, size, size), "tokens": torch.zeros(batch, length, dtype=whole),
            "noise": noise, "latent_noise": noise, "timestep": torch.zeros(batch, dtype=whole),
        }  # fmt: skip

    def batches(
        self, split: Split, epoch: int, *, batch: int, rank: int = 0, world: int = 1, skip: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        """As `Task.batches`, but none is empty: a process without a share sees a sample that is not counted.

        Networks take no batch of nothing, and wrapped ones are called as often in every process.
        """
        if split == "train":
            yield from super().batches(split, epoch, batch=batch, rank=rank, world=world, skip=skip, workers=workers)
            return
        samples = self.dataset(split)
        order, parts = shuffled(len(samples), EVAL_SEED, 0), eval_parts(len(samples), batch, rank, world)[skip:]
        filled = [(start, stop) if stop > start else (0, 1) for start, stop in parts]
        for each, (start, stop) in zip(load_batches(samples, order, filled, epoch, workers), parts, strict=True):
            yield {**each, "counted": torch.full((len(each["index"]),), float(stop > start))}

    def draws_from(self, split: Split, epoch: int) -> tuple[int, int]:
        """Seed and epoch of all that is drawn for a split: the run's in training, the same for all runs to judge by."""
        return (self.seed, epoch) if split == "train" else (JUDGE_SEED, 0)

    def noise_of(self, split: Split, seed: int, epoch: int, index: Tensor, latents: tuple[int, int, int]) -> Batch:
        """`noise`, `latent_noise` and `timestep` of the samples at some places; see `diffusion_draws`."""
        offset = self.config.noise_offset if split == "train" else 0.0
        return diffusion_draws(seed, epoch, index, latents, len(self.model.alphas_cumprod), offset=offset)

    def loss(self, model: nn.Module, batch: Batch, phase: str) -> Losses:
        """The mean squared error of what is predicted, weighted where the recipe says so."""
        errors, predicted = self.errors(model, batch, self.weights(batch["timestep"]))
        return errors.mean(), predicted, {}

    def weights(self, times: Tensor) -> Tensor | None:
        """By min-SNR, of samples at some times `(B,)`; None: all count alike."""
        if self.config.min_snr is None:
            return None
        return min_snr_weights(times, self.model.alphas_cumprod, self.config.min_snr, self.model.prediction_type)

    def errors(self, model: nn.Module, batch: Batch, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The squared error of each sample `(B,)`, weighted where there are weights; and the prediction."""
        moments = batch["moments"] if "moments" in batch else self.model.encode_pictures(batch["image"])
        latents, noise = draw_latents(moments, batch["latent_noise"]), batch["noise"]
        times, table = batch["timestep"], self.model.alphas_cumprod
        predicted = self.predicted(model, mix_noise(latents, noise, times, table), batch)
        target = target_of(self.model.prediction_type, latents, noise, times, table)
        return noise_loss(predicted, target, weights), predicted

    def predicted(self, model: nn.Module, noisy: Tensor, batch: Batch) -> Tensor:
        """What the model says of noisy latents `(B, C, h, w)`, of the same shape."""
        predicted: Tensor = model(noisy, batch["timestep"], batch["text"] if "text" in batch else batch["tokens"])
        return predicted

    def scores(self, model: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Some of `metrics` by name: values of a batch's samples, and how much each counts in the mean."""
        errors, _ = self.errors(model, batch)
        return {"loss": (errors, batch["counted"])}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], reduce: Reduce | None = None) -> dict[str, float]:
        """The means of what `scores` gives; sums are added up over processes and divided once.

        A metric that no sample counts in is left out; so is the loss where nothing is held out.
        """
        was_training = model.training
        model.eval()
        sums = torch.zeros(len(self.metrics), 2, dtype=torch.float64, device=self.model.alphas_cumprod.device)
        for batch in batches:
            for name, (values, counts) in self.scores(model, batch).items():
                values, counts = values.double(), counts.double()
                sums[self.metrics.index(name)] += torch.stack([(values * counts).sum(), counts.sum()]).to(sums.device)
        model.train(was_training)
        rows = (sums if reduce is None else reduce(sums)).tolist()
        return {name: total / count for name, (total, count) in zip(self.metrics, rows, strict=True) if count}
