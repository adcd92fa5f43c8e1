"""Pictures from words: a diffusion model learns to tell the noise in the latents of captioned pictures.

Whatever trains (an adapter of the UNet, one of the text encoder, all weights of the UNet) is the methods' business.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .batching import load_batches
from .caption_buckets import bucket_batches, eval_batches
from .caption_data import fault_text, load_captions
from .caption_samples import CaptionSamples
from .diffusion_task import DiffusionTask
from .image_specs import Split
from .latent_cache import TensorCache
from .picture_grid import save_grid
from .task import Batch

if TYPE_CHECKING:
    from ortho_cli.recipe.data_captions import CaptionedPictures
    from ortho_cli.recipe.tasks_diffusion import TextToImage

__all__ = ["TextToImageTask"]

PART = 4  # samples at a time


class TextToImageTask(DiffusionTask):
    """Train a diffusion model on captioned pictures.

    `loss` is the error on held-out pictures, unweighted, with the same noise and times for all runs.

    Args:
        task: the loss, and what samples show.
        data: the pictures.
        seed: of the run.
    """

    sides = ("size", "buckets")

    def __init__(self, task: TextToImage, data: CaptionedPictures, *, seed: int) -> None:
        super().__init__(task, data, seed=seed)
        self.config: TextToImage = task
        self.data: CaptionedPictures = data
        self._splits: dict[Split, CaptionSamples] = {}
        self._caches: tuple[TensorCache, TensorCache | None] | None = None

    def dataset(self, split: Split) -> CaptionSamples:
        """A split; both are opened at once, so that every fault is told before training starts."""
        if not self._splits:
            faults: dict[str, None] = {}
            for each in ("train", "eval"):
                found = load_captions(self.data, each)
                faults |= dict.fromkeys(found.faults)
                self._splits[each] = CaptionSamples(found, self.data, self.seed, training=each == "train")
            if faults:
                self.model.notes.append(fault_text(list(faults)))
        return self._splits[split]

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of one shape."""
        return len(bucket_batches(self.dataset("train").buckets, self.data.batch, self.seed, 0)[1])

    def batches(
        self, split: Split, epoch: int, *, batch: int, rank: int = 0, world: int = 1, skip: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        """As `Task.batches`, each of pictures of one shape; with tokens of the captions, noise, and times."""
        samples, training = self.dataset(split), split == "train"
        seed, epoch = self.draws_from(split, epoch)
        if training:
            order, parts = bucket_batches(samples.buckets, batch, seed, epoch, rank, world)
        else:
            order, parts = eval_batches(samples.buckets, batch, rank, world)
        if self.data.cache is None:
            found = load_batches(samples, order, parts[skip:], epoch, workers)
        else:  # most of them need no picture, so none is opened ahead of time
            found = ({"index": order[start:stop]} for start, stop in parts[skip:])
        for each, (_, stop) in zip(found, parts[skip:], strict=True):
            index = each["index"]
            drawn = self.noise_of(split, seed, epoch, index, self.latents(*samples.shape(int(index[0]))))
            tokens = {"tokens": self.model.tokens(samples.captions(epoch, index))}
            kept = {} if self.data.cache is None else self._kept(samples, epoch, index, tokens["tokens"])
            counted = {} if training else {"counted": torch.full((len(index),), float(stop <= len(samples)))}
            yield {**each, **drawn, **counted, **({} if "text" in kept else tokens), **kept}

    def _kept(self, samples: CaptionSamples, epoch: int, index: Tensor, tokens: Tensor) -> Batch:
        """Moments of latents, and the text's embeddings where their encoder is frozen: from the cache, or into it.

        One at a time, so that no value depends on the batch that it was first asked for in.
        """
        if self._caches is None:
            trained = any(each.requires_grad for each in self.model.text_encoder.parameters())
            text = None if trained else TensorCache(str(self.data.cache), self.model.text_encoder)
            self._caches = TensorCache(str(self.data.cache), self.model.vae), text
        device = self.model.alphas_cumprod.device

        def moments(sample: int) -> Tensor:
            source, place = samples.found.source, samples.found.places[sample]
            identity = f"{source.identity(place)}:{samples.shape(sample)}:{samples.mirrored(epoch, sample)}"
            picture = samples.picture
            return pictures.get(
                identity, lambda: self.model.encode_pictures(picture(epoch, sample)[None].to(device))[0]
            )

        pictures, text = self._caches
        found = {"moments": torch.stack([moments(sample) for sample in index.tolist()])}
        if text is not None:
            with torch.no_grad():
                found["text"] = torch.stack(
                    [
                        text.get(str(row.tolist()), lambda row=row: self.model.encode_text(row[None].to(device))[0])  # type: ignore[misc]
                        for row in tokens
                    ]
                )
        return found

    @torch.no_grad()
    def samples(self, model: nn.Module, generator: torch.Generator, folder: Path) -> None:
        """`samples.png`: a picture of each validation prompt, from the same noise every time."""
        prompts, size = list(self.config.validation_prompts), self.data.size
        if not prompts:
            return
        noise, first = torch.randn(len(prompts), *self.latents(), generator=generator), self.model.unet.conv_in.weight
        noise, pipeline = noise.to(first.device, first.dtype), self.model.pipeline()
        parts: list[Tensor] = [
            pipeline(
                prompts[start : start + PART], latents=noise[start : start + PART], height=size, width=size,
                num_inference_steps=self.config.steps, guidance_scale=self.config.guidance, output_type="pt",
            ).images
            for start in range(0, len(prompts), PART)
        ]  # fmt: skip
        save_grid(torch.cat(parts).float().mul(2).sub(1), folder / "samples.png")
