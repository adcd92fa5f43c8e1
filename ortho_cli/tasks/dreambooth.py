"""One subject from a few pictures: its pictures are named by a new word, and pictures of its class keep the class.

A sample is a picture of the subject and one of the class (prior preservation, arXiv:2208.12242). All noise belongs to
a sample of an epoch: a resumed run draws what an uninterrupted one draws, and two processes what one draws.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ortho_cli import registry
from ortho_cli.models.stable_diffusion import StableDiffusion, draw_latents
from ortho_cli.recipe.subjects import CLASS_PROMPT

from .diffusion_loss import diffusion_draws, min_snr_weights, mix_noise, noise_loss, target_of
from .draws import seed_of, uniform
from .image_specs import Split
from .pictures import PictureFiles, Pictures, to_tensor
from .subject_data import load_subject
from .subject_pictures import MANIFEST, Drawn, draw, draw_class
from .task import Batch, Losses, Reduce, Task

if TYPE_CHECKING:
    from ortho_cli.recipe.data_subject import SubjectPictures
    from ortho_cli.recipe.tasks_dreambooth import Dreambooth

__all__ = ["DreamboothTask", "SubjectSamples"]

CROP_STREAM = 0  # of the random numbers
JUDGE_SEED = 0  # all runs are judged by the same noise
OF_CLASS = 1  # which of a sample's two pictures noise is for
WHITE = 127.5
LATENTS = 4


class SubjectSamples(Dataset[dict[str, Tensor]]):
    """Pictures of the subject, over and over, each beside one of the class where there are any.

    Args:
        subject: its pictures.
        class_pictures: None: there are none.
        size: side of the pictures.
        seed: of the run; None: the square in the middle is seen, not one by chance.
        count: samples.
    """

    def __init__(
        self, subject: Pictures, class_pictures: Pictures | None, size: int, seed: int | None, count: int
    ) -> None:
        self.subject, self.class_pictures = subject, class_pictures
        self.size, self.seed, self.count = size, seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """One sample, without the batch dimension."""
        return {name: value[0] for name, value in self.fetch(key[0], torch.tensor([key[1]])).items()}

    def fetch(self, epoch: int, index: Tensor) -> dict[str, Tensor]:
        """A batch.

        Args:
            epoch: squares are drawn anew in each.
            index: `(B,)` int64, places in the split.

        Returns:
            `image` and, where there are any, `class_image` (B, 3, S, S) float32 in [-1, 1]; `index` as given.
        """
        places = index.numpy()
        draws = 0.5 + 0 * places if self.seed is None else uniform(self.seed, epoch, places, 1, CROP_STREAM)[:, 0]
        sets = {"image": self.subject, **({"class_image": self.class_pictures} if self.class_pictures else {})}
        batch = {"index": index}
        for name, pictures in sets.items():
            squares = [self._square(pictures, place, where) for place, where in zip(places, draws, strict=True)]
            batch[name] = torch.stack(squares)
        return batch

    def _square(self, pictures: Pictures, place: int, where: float) -> Tensor:
        """The largest square of a picture, as far along its longer side as `where` in [0, 1] says."""
        picture = pictures.open(int(place) % len(pictures))
        side = min(picture.size)
        left, top = ((length - side) * where for length in picture.size)
        return to_tensor(picture, self.size, 3, (left, top, left + side, top + side)).float().div_(WHITE).sub_(1)


class DreamboothTask(Task):
    """Train by the error of the predicted noise on the subject's pictures, and on the class's times the prior's weight.

    `loss` is over the subject's pictures, with the same noise and times for all runs: there are too few to hold any
    out, so it says how well they are known, and samples say what else is.

    Args:
        task: the subject, the prior, and how samples are drawn.
        data: the pictures.
        seed: of the run.
    """

    metrics = ("loss",)

    def __init__(self, task: Dreambooth, data: SubjectPictures, *, seed: int) -> None:
        super().__init__(task, data, seed=seed)
        self.config: Dreambooth = task
        self.data: SubjectPictures = data
        self.model: StableDiffusion  # known once it is built; what is called in training may be a wrapper of it
        self.how: Drawn
        self._splits: dict[Split, SubjectSamples] = {}

    def build_model(self, config: Any) -> nn.Module:
        """The diffusion model of a recipe's `model` section."""
        self.model = registry.resolve("models", config.name)(config)
        base = Path(config.base).name if config.base is not None else f"random {config.size}"
        self.how = Drawn(base, self.data.size, self.config.steps, self.config.guidance)
        return self.model

    @property
    def class_folder(self) -> Path:
        """Where pictures of the subject's class are."""
        return Path(self.config.class_folder).expanduser() / self.config.shown.class_name.replace(" ", "-")

    def gather(self, model: nn.Module) -> list[str]:
        """Have the base draw the class pictures that are missing."""
        if not self.config.prior:
            return []
        prompt = CLASS_PROMPT.format(class_name=self.config.shown.class_name)
        drawn = draw_class(self.model, self.class_folder, prompt, self.config.class_pictures, self.how)
        return [f"{drawn} class pictures drawn into {self.class_folder}"] if drawn else []

    def size(self, split: Split) -> int:
        """As many as the longer of the two sets; class pictures need not be there yet."""
        count = len(self.dataset("eval"))
        return max(count, self.config.class_pictures) if split == "train" and self.config.prior else count

    def dataset(self, split: Split) -> SubjectSamples:
        """The pictures; to judge by, the subject's alone, as they are."""
        if not self._splits:
            subject = load_subject(self.data, self.config.subject)
            self._splits["eval"] = SubjectSamples(subject, None, self.data.size, None, len(subject))
        if split == "train" and split not in self._splits:
            names = [f"{number:06d}.png" for number in range(self.config.class_pictures)]
            others = PictureFiles(self.class_folder, names) if self.config.prior else None
            seed = self.seed if self.data.crop == "random" else None
            subject = self._splits["eval"].subject
            self._splits["train"] = SubjectSamples(subject, others, self.data.size, seed, self.size("train"))
        return self._splits[split]

    def example(self, batch: int) -> Batch:
        """Grey pictures, and everything that is drawn."""
        size, latent = self.data.size, self.data.size // self.model.latent_factor
        tokens = self.model.text_encoder.config.max_position_embeddings
        one = {
            "image": torch.zeros(batch, 3, size, size), "tokens": torch.zeros(batch, tokens, dtype=torch.long),
            "noise": torch.zeros(batch, LATENTS, latent, latent), "timestep": torch.zeros(batch, dtype=torch.long),
            "latent_noise": torch.zeros(batch, LATENTS, latent, latent),
        }  # fmt: skip
        return {**one, **({f"class_{name}": value for name, value in one.items()} if self.config.prior else {})}

    def batches(
        self, split: Split, epoch: int, *, batch: int, rank: int = 0, world: int = 1, skip: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        """As `Task.batches`, with tokens, noise and times for each picture; those of the class begin with `class_`."""
        seed, epoch = (self.seed, epoch) if split == "train" else (JUDGE_SEED, 0)
        offset = self.config.noise_offset if split == "train" else 0.0
        prompts = (self.config.instance_prompt, CLASS_PROMPT.format(class_name=self.config.shown.class_name))
        tokens = dict(zip(("", "class_"), self.model.tokens(list(prompts)), strict=True))
        for each in super().batches(split, epoch, batch=batch, rank=rank, world=world, skip=skip, workers=workers):
            side = self.data.size // self.model.latent_factor
            for kind, own in (("", seed), ("class_", seed_of(seed, OF_CLASS))):
                if f"{kind}image" not in each:
                    continue
                drawn = diffusion_draws(own, epoch, each["index"], (LATENTS, side, side), offset=offset)
                each |= {f"{kind}{name}": value for name, value in drawn.items()}
                each[f"{kind}tokens"] = tokens[kind].expand(len(each["index"]), -1)
            yield each

    def loss(self, model: nn.Module, batch: Batch, phase: str) -> Losses:
        """The mean error on the subject's pictures, and on the class's times its weight."""
        parts = [kind for kind in ("", "class_") if f"{kind}image" in batch]
        errors, predicted = self._errors(model, batch, parts)
        if len(parts) == 1:
            return errors.mean(), predicted, {}
        own, of_class = (part.mean() for part in errors.chunk(2))
        named = {"subject": own.detach(), "prior": of_class.detach()}
        return own + self.config.prior * of_class, predicted, named

    def _errors(self, model: nn.Module, batch: Batch, parts: list[str]) -> tuple[Tensor, Tensor]:
        """The error of each picture, the subject's first, and the prediction: one call of the model for all."""
        image, noise, latent_noise, times, tokens = (
            torch.cat([batch[f"{kind}{name}"] for kind in parts])
            for name in ("image", "noise", "latent_noise", "timestep", "tokens")
        )
        alphas, kind = self.model.alphas_cumprod, self.model.prediction_type
        latents = draw_latents(self.model.encode_pictures(image), latent_noise)
        predicted = model(mix_noise(latents, noise, times, alphas), times, tokens)
        weights = min_snr_weights(times, alphas, self.config.min_snr, kind) if self.config.min_snr else None
        return noise_loss(predicted, target_of(kind, latents, noise, times, alphas), weights), predicted

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], reduce: Reduce | None = None) -> dict[str, float]:
        """Mean error on the subject's pictures; sums are added up over processes and divided once."""
        was_training = model.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.model.alphas_cumprod.device)
        for batch in batches:
            errors = self._errors(model, batch, [""])[0].double()
            sums += torch.stack([errors.sum(), errors.new_tensor(len(errors))])
        model.train(was_training)
        loss, count = (sums if reduce is None else reduce(sums)).tolist()
        if not count:
            raise ValueError("no batches to evaluate on")
        return {"loss": loss / count}

    def samples(self, model: nn.Module, generator: torch.Generator, folder: Path) -> None:
        """`000003_1.png`: of prompt 3 the second picture, the same noise every time; and their manifest."""
        wanted = [
            (number, text, each) for number, text in self.config.drawn.items() for each in range(self.config.samples)
        ]
        pictures = draw(self.model, [text for _, text, _ in wanted], [each for _, _, each in wanted], self.how)
        lines = []
        for (number, text, each), picture in zip(wanted, pictures, strict=True):
            name = f"{number:06d}_{each}.png"
            picture.save(folder / name)
            lines.append(json.dumps({"file": name, "prompt": text, "seed": each}))
        (folder / MANIFEST).write_text("\n".join(lines) + "\n", "utf-8")
