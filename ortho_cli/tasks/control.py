"""Pictures to a prompt and a hint: noise is predicted from noisy latents, the prompt, and what the hint shows.

The hint enters behind the UNet's first convolution (`models/hint_encoder.py`). All noise belongs to a sample of an
epoch: a resumed run draws what an uninterrupted one draws, and two processes draw together what one draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli.errors import RecipeError
from ortho_cli.models.hint_encoder import STRIDE, HintEncoder, add_hint_encoder, hint_added, load_hint_encoder
from ortho_cli.models.stable_diffusion import StableDiffusion

from .diffusion_task import JUDGE_SEED, DiffusionTask
from .draws import normal, uniform
from .hint_data import load_hints
from .hint_samples import HintSamples
from .hint_scores import edge_f1
from .image_specs import Split
from .picture_grid import save_grid
from .task import Batch

if TYPE_CHECKING:
    from ortho_cli.checkpoints.checkpoint import Checkpoint
    from ortho_cli.recipe.data_hints import HintedPictures
    from ortho_cli.recipe.tasks_control import Control

__all__ = ["ControlTask"]

DROP_STREAM, SAMPLE_STREAM = 14, 15  # of the random numbers; the noise has its own
TOLD = 5  # faults that are told one by one


class ControlTask(DiffusionTask):
    """Train a hint encoder, and whatever adapts the UNet to it, by the error of the predicted noise.

    `loss` is over the evaluation split, with the same noise and the same times for all runs; `canny_f1` is of as many
    of its pictures as are to be scored, drawn and compared by their edges.

    Args:
        task: prompts left out, and how samples are drawn.
        data: pictures, hints and prompts.
        seed: of the run.

    Raises:
        RecipeError: edges are to be scored, and the hints are none.
    """

    metrics = ("loss", "canny_f1")

    def __init__(self, task: Control, data: HintedPictures, *, seed: int) -> None:
        super().__init__(task, data, seed=seed)
        self.config: Control = task
        self.data: HintedPictures = data
        if task.scored and data.hint != "canny":
            raise RecipeError(
                f"task.scored compares edges, and the hints are {data.hint}", hint="score pictures with: ortho evaluate"
            )
        self.encoder: HintEncoder
        self._splits: dict[Split, HintSamples] = {}

    def build_model(self, config: Any) -> StableDiffusion:
        """As `DiffusionTask.build_model`, with a hint encoder."""
        model = super().build_model(config)
        self.encoder = add_hint_encoder(model)
        return model

    def take_over(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        """Go on with the hint encoder of a base that holds one."""
        self.model.notes += load_hint_encoder(self.encoder, checkpoint)

    @property
    def hint_size(self) -> int:
        """Side of the hints in pixels."""
        return STRIDE * self.latents()[1]

    def dataset(self, split: Split) -> HintSamples:
        """A split; both are opened at once, so that every fault is told before training starts."""
        if not self._splits:
            for each in ("train", "eval"):
                hints = load_hints(self.data, each)
                self._splits[each] = HintSamples(hints, self.data.size, self.hint_size, self.data.thresholds)
                if hints.faults:
                    told = "; ".join(hints.faults[:TOLD]) + ("; ..." if len(hints.faults) > TOLD else "")
                    self.model.notes.append(f"{len(hints.faults)} bad samples of {each} are left out: {told}")
        return self._splits[split]

    def example(self, batch: int) -> Batch:
        """As `DiffusionTask.example`, with black hints."""
        return {**super().example(batch), "hint": torch.zeros(batch, 3, self.hint_size, self.hint_size)}

    def batches(
        self, split: Split, epoch: int, *, batch: int, rank: int = 0, world: int = 1, skip: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        """As `Task.batches`, with tokens of the prompts, noise for the latents and a time for each sample."""
        samples, (seed, round_) = self.dataset(split), self.draws_from(split, epoch)
        dropout = self.config.prompt_dropout if split == "train" else 0.0
        for each in super().batches(split, epoch, batch=batch, rank=rank, world=world, skip=skip, workers=workers):
            index = each["index"]
            dropped = uniform(seed, round_, index.numpy(), 1, DROP_STREAM)[:, 0] < dropout
            prompts = ["" if drop else said for drop, said in zip(dropped, samples.prompts(index), strict=True)]
            drawn = self.noise_of(split, seed, round_, index, self.latents())
            yield {**each, **drawn, "tokens": self.model.tokens(prompts)}

    def predicted(self, model: nn.Module, noisy: Tensor, batch: Batch) -> Tensor:
        """As `DiffusionTask.predicted`, of a model that is shown the hint."""
        predicted: Tensor = model(noisy, batch["timestep"], batch["tokens"], batch["hint"])
        return predicted

    def scores(self, model: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """The loss, and F1 of the edges of those samples that are to be drawn."""
        found = super().scores(model, batch)
        chosen = (batch["index"] < self.config.scored) & (batch["counted"] > 0)
        if chosen.any():
            drawn = self.drawn(batch["index"][chosen].cpu(), batch["hint"][chosen], JUDGE_SEED)
            f1 = edge_f1(drawn, batch["image"][chosen], self.data.thresholds)
            found["canny_f1"] = f1, torch.ones_like(f1)
        return found

    @torch.no_grad()
    def samples(self, model: nn.Module, generator: torch.Generator, folder: Path) -> None:
        """`samples.png`: a row each of hint, drawn picture and real one, of the first samples to judge by."""
        found = self.dataset("eval")
        index = torch.arange(min(self.config.samples, len(found)))
        if not len(index):
            return
        device, size = self.model.alphas_cumprod.device, (self.data.size, self.data.size)
        batch = {name: value.to(device) for name, value in found.fetch(0, index).items()}
        hints = F.interpolate(batch["hint"].mul(2).sub(1), size, mode="nearest")
        columns = [part.cpu() for part in (hints, self.drawn(index, batch["hint"], self.seed), batch["image"])]
        save_grid(torch.stack(columns, dim=1).flatten(0, 1), folder / "samples.png", columns=3)

    def drawn(self, index: Tensor, hints: Tensor, seed: int) -> Tensor:
        """Draw pictures to the prompts of evaluation samples and their hints, by DDIM, each from noise of its own.

        Args:
            index: `(B,)` int64 on the CPU, places in the evaluation split.
            hints: theirs, where the model is.
            seed: of the noise.

        Returns:
            `(B, 3, S, S)` in [-1, 1].
        """
        first = self.model.unet.conv_in.weight
        noise = normal(seed, 0, index, prod(self.latents()), SAMPLE_STREAM).view(-1, *self.latents())
        with hint_added(self.model.unet.conv_in, self.encoder(hints)):
            made: Tensor = self.model.pipeline()(
                self.dataset("eval").prompts(index), latents=noise.to(first.device, first.dtype),
                num_inference_steps=self.config.steps, guidance_scale=self.config.guidance, output_type="pt",
            ).images  # fmt: skip
        return made.float().mul(2).sub(1)
