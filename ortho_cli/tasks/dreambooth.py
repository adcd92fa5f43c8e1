"""One subject from a few pictures: its pictures are named by a new word, and pictures of its class keep the class.

A sample is a picture of the subject and one of the class (prior preservation, arXiv:2208.12242). All noise belongs to
a sample of an epoch: a resumed run draws what an uninterrupted one draws, and two processes what one draws.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ortho_cli.recipe.subjects import CLASS_PROMPT

from .diffusion_task import DiffusionTask
from .draws import seed_of, uniform
from .image_specs import Split
from .pictures import Pictures, to_tensor
from .subject_data import load_subject
from .subject_pictures import MANIFEST, Drawn, class_pictures, draw, draw_class
from .task import Batch, Losses

if TYPE_CHECKING:
    from ortho_cli.recipe.data_subject import SubjectPictures
    from ortho_cli.recipe.tasks_dreambooth import Dreambooth

__all__ = ["DreamboothTask", "SubjectSamples"]

CROP_STREAM = 0  # of the random numbers
CLASS_SEED = 1  # which of a sample's two pictures noise is for
OF_CLASS = "class_"  # how names of what belongs to the class picture begin
WHITE = 127.5


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


class DreamboothTask(DiffusionTask):
    """Train by the error of the predicted noise on the subject's pictures, and on the class's times the prior's weight.

    `loss` is over the subject's pictures, with the same noise and times for all runs: there are too few to hold any
    out, so it says how well they are known, and samples say what else is.

    Args:
        task: the subject, the prior, and how samples are drawn.
        data: the pictures.
        seed: of the run.
    """

    def __init__(self, task: Dreambooth, data: SubjectPictures, *, seed: int) -> None:
        super().__init__(task, data, seed=seed)
        self.config: Dreambooth = task
        self.data: SubjectPictures = data
        self.how = Drawn(data.size, task.steps, task.guidance)
        self._splits: dict[Split, SubjectSamples] = {}

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
            others = class_pictures(self.class_folder, self.config.class_pictures) if self.config.prior else None
            seed = self.seed if self.data.crop == "random" else None
            subject = self._splits["eval"].subject
            self._splits["train"] = SubjectSamples(subject, others, self.data.size, seed, self.size("train"))
        return self._splits[split]

    def example(self, batch: int) -> Batch:
        """As `DiffusionTask.example`, twice where there is a prior."""
        one = super().example(batch)
        return {**one, **({f"{OF_CLASS}{name}": value for name, value in one.items()} if self.config.prior else {})}

    def batches(
        self, split: Split, epoch: int, *, batch: int, rank: int = 0, world: int = 1, skip: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        """As `Task.batches`, with tokens, noise and times for each picture; those of the class begin with `class_`."""
        seed, round_ = self.draws_from(split, epoch)
        prompts = (self.config.instance_prompt, CLASS_PROMPT.format(class_name=self.config.shown.class_name))
        tokens = self.model.tokens(list(prompts))
        for each in super().batches(split, epoch, batch=batch, rank=rank, world=world, skip=skip, workers=workers):
            index = each["index"]
            for kind, own, words in zip(("", OF_CLASS), (seed, seed_of(seed, CLASS_SEED)), tokens, strict=True):
                if f"{kind}image" in each:
                    drawn = self.noise_of(split, own, round_, index, self.latents())
                    drawn["tokens"] = words.expand(len(index), -1)
                    each |= {f"{kind}{name}": value for name, value in drawn.items()}
            yield each

    def loss(self, model: nn.Module, batch: Batch, phase: str) -> Losses:
        """The mean error on the subject's pictures, and on the class's times its weight: one call of the model."""
        if f"{OF_CLASS}image" not in batch:
            return super().loss(model, batch, phase)
        names = [name for name in batch if f"{OF_CLASS}{name}" in batch]
        both = {name: torch.cat([batch[name], batch[f"{OF_CLASS}{name}"]]) for name in names}
        errors, predicted = self.errors(model, both, self.weights(both["timestep"]))
        own, of_class = (part.mean() for part in errors.chunk(2))
        return own + self.config.prior * of_class, predicted, {"subject": own.detach(), "prior": of_class.detach()}

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
