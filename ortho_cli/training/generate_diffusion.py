"""Draw pictures with Stable Diffusion: of prompts, to hints, with adapters at any strength.

diffusers' pipeline and schedulers draw; what is ours is that each picture is a function of its own seed, whatever the
batch or the shard, and that a killed job goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ortho_cli import __version__
from ortho_cli.checkpoints.output import atomic
from ortho_cli.errors import UsageError, check_choice
from ortho_cli.models.hint_encoder import CONTROL, hint_added

from .evaluate import SPLITS
from .generate import Made, Maker, Progress, Source
from .generate_folder import OutputFolder, read_manifests
from .generate_hints import HintKind, hint_batch, middle
from .generate_model import DTYPES, Drawing, Weights, drawing_model
from .generate_pictures import Picture, Prompt, data_prompts, prompts_of, shard_of, share
from .generate_sheet import SHEET, write_sheet

__all__ = ["MAKER", "SCHEDULERS", "DiffusionMaking"]

# diffusers' schedulers, by the names that user interfaces give them.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
}
GRAIN = 8  # pixels of which the sides of a picture are multiples, for every pipeline of diffusers
GENERAL = ("prompt", "prompts", "negative", "num", "seed", "shard", "steps", "guidance", "scheduler", "size", "batch")
WEIGHTS = ("adapter", "strength", "checkpoint", "precision", "config")
HINTS = ("control", "control_type", "split", "reference")


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn; with the weights it is the head of the manifest."""

    steps: int = 50
    guidance: float = 7.5
    scheduler: str = "ddim"
    size: tuple[int, int] | None = None
    """Width and height; None: what the model was trained for."""
    negative: str = ""


class DiffusionMaking:
    """Pictures of prompts.

    Args:
        source: a run or a base.
        asked: the options that were typed.

    Raises:
        UsageError: no prompt, or options that contradict each other.
    """

    def __init__(self, source: Source, asked: Mapping[str, Any]) -> None:
        self.source, self.reference = source, asked.get("reference")
        self.prompts = self._prompts(asked)
        check_choice("--scheduler", asked.get("scheduler"), tuple(SCHEDULERS))
        check_choice("--precision", asked.get("precision"), tuple(DTYPES))
        given = {key: asked[key] for key in ("steps", "guidance", "scheduler", "negative") if key in asked}
        self.settings = Settings(size=_size(asked.get("size")), **given)
        self.shard, self.batch = shard_of(asked.get("shard")), asked.get("batch", 4)
        self.every, self.pictures = share(
            self.prompts, num=asked.get("num", 1), seed=asked.get("seed", 0), shard=self.shard
        )
        self.weights = Weights(
            tuple(asked.get("adapter", ())), tuple(asked.get("strength", ())),
            *(asked.get(key) for key in ("checkpoint", "precision", "config")),
        )  # fmt: skip
        own = getattr(source.recipe, "data", None)
        kind = asked.get("control_type") or getattr(own, "hint", None)
        self.hint = HintKind(kind, getattr(own, "thresholds", HintKind.thresholds))

    def planned(self) -> dict[str, Any]:
        """How many pictures there will be, of this shard and of all, and how they are drawn."""
        shown = {key: value for key, value in asdict(self.settings).items() if value not in (None, "")}
        share_of_it = {} if self.shard is None else {"of": len(self.every)}
        return {"kind": "pictures", "files": len(self.pictures), **share_of_it, "prompts": len(self.prompts), **shown}

    def make(self, output: Path, progress: Progress | None) -> Made:
        """Draw what is not there yet, a batch at a time.

        Raises:
            OrthoError: weights, adapters or hints cannot be read; the folder holds what was made otherwise.
        """
        with drawing_model(self.source, self.weights) as drawing:
            lines = {picture.name: self._line(picture) for picture in self.every}
            settings = self._settings(drawing)
            folder = OutputFolder(output, settings, self.shard)
            waiting = [picture for picture in self.pictures if folder.lacks(picture.name, lines[picture.name])]
            if progress is not None:
                progress.start(len(waiting))
            pipeline = _pipeline(drawing.model, self.settings) if waiting else None
            for start in range(0, len(waiting), self.batch):
                part = waiting[start : start + self.batch]
                self._keep_references(part, settings)
                for picture, image in zip(part, self._drawn(drawing.model, pipeline, part, settings), strict=True):
                    line = lines[picture.name]
                    folder.write(picture.name, line, partial(_save, image, settings | line))
                if progress is not None:
                    progress.advance(len(part))
        also = [folder.manifest.name]
        if folder.finish([picture.name for picture in self.every]):
            write_sheet(output, settings, read_manifests(output)[1])
            also.append(SHEET)
        return Made(folder.made, folder.skipped, drawing.checkpoint, also, [*drawing.notes, *self._unhinted()])

    def _prompts(self, asked: Mapping[str, Any]) -> list[Prompt]:
        """Those of the command, of a run's data, or what a run shows while it trains."""
        if asked.get("split"):
            if set(asked) & {"prompt", "prompts", "control", "control_type"}:
                raise UsageError("--split takes prompts and hints of the run's data", hint="leave the others out")
            check_choice("--split", asked["split"], SPLITS)
            return data_prompts(self.source.recipe, asked["split"])
        if self.reference is not None:
            raise UsageError("--reference is of the pictures that --split draws anew", hint="--split val")
        task = getattr(self.source.recipe, "task", None)
        found = prompts_of(asked) or [Prompt(text) for text in getattr(task, "validation_prompts", ())]
        if not found:
            hint = "--prompt 'a photo of a cat', or --prompts FILE"
            if getattr(task, "name", None) == "control":
                hint += "; with --control IMAGE; or --split val"
            if self.source.recipe is None and not Path(self.source.place).expanduser().exists():
                hint += f"; {self.source.place} is neither a run nor a file here, so the hub's"
            raise UsageError("nothing says what to draw", hint=hint)
        return found

    def _unhinted(self) -> list[str]:
        """What to know where a model that listens to hints was given none."""
        if self.source.recipe is None or self.source.recipe.task.name != "control":
            return []
        count = sum(prompt.hint is None for prompt in self.prompts)
        return [f"prompts without a hint: {count}; give one: --control IMAGE"] if count else []

    def _line(self, picture: Picture) -> dict[str, Any]:
        """What decides a picture beside the settings of all: its line in the manifest."""
        prompt = picture.prompt
        line = {"prompt": prompt.text, "seed": picture.seed}
        line |= {"negative": prompt.negative} if prompt.negative is not None else {}
        return line | ({"control": prompt.hint.name} if prompt.hint is not None else {})

    def _settings(self, drawing: Drawing) -> dict[str, Any]:
        width, height = self.settings.size or _own_size(drawing.model)
        run = {"run": self.source.folder.name, "checkpoint": drawing.checkpoint}
        base = {"base": Path(self.source.place).name, "precision": drawing.precision}
        return {
            "kind": "pictures", **(base if self.source.recipe is None else run), "adapters": self.weights.told(),
            "strength": list(self.weights.strengths), "steps": self.settings.steps,
            "guidance": self.settings.guidance, "scheduler": self.settings.scheduler,
            "negative": self.settings.negative, "size": f"{width}x{height}",
            **({"control": self.hint.name} if any(prompt.hint for prompt in self.prompts) else {}),
        }  # fmt: skip

    def _keep_references(self, part: Sequence[Picture], settings: Mapping[str, Any]) -> None:
        """Write the data's own pictures, one for each prompt, by the number that what is drawn of it begins with."""
        if self.reference is None:
            return
        Path(self.reference).mkdir(parents=True, exist_ok=True)
        for picture in part:
            path = Path(self.reference) / f"{picture.sample:06d}.png"
            if picture.prompt.hint is not None and not path.exists():
                original = middle(picture.prompt.hint.open()[0], _sides(settings))
                with atomic(path) as partial_path:
                    original.save(partial_path, format="PNG")

    def _drawn(self, model: Any, pipeline: Any, part: Sequence[Picture], settings: Mapping[str, Any]) -> list[Any]:
        """The pictures of a batch, as PIL images."""
        width, height = _sides(settings)
        added: Any = nullcontext()
        if any(picture.prompt.hint is not None for picture in part):
            encoder = _hint_encoder(model)
            hints = hint_batch([picture.prompt.hint for picture in part], self.hint, model, width, height)
            own = next(encoder.parameters())
            added = hint_added(model.unet.conv_in, encoder(hints.to(own.device, own.dtype)))
        with added:
            found = pipeline(
                prompt=[picture.prompt.text for picture in part],
                negative_prompt=[
                    self.settings.negative if picture.prompt.negative is None else picture.prompt.negative
                    for picture in part
                ],
                generator=[torch.Generator("cpu").manual_seed(picture.seed) for picture in part],
                num_inference_steps=self.settings.steps, guidance_scale=self.settings.guidance,
                width=width, height=height,
            )  # fmt: skip
        return list(found.images)


MAKER = Maker(frozenset({*GENERAL, *WEIGHTS}), DiffusionMaking)
CONTROL_MAKER = Maker(frozenset({*GENERAL, *WEIGHTS, *HINTS}), DiffusionMaking)


def _pipeline(model: Any, settings: Settings) -> Any:
    import diffusers

    model.tokens([""])  # says what is missing where there is no tokenizer
    scheduler = getattr(diffusers, SCHEDULERS[settings.scheduler]).from_config(model.scheduler.config)
    return model.pipeline(scheduler)


def _hint_encoder(model: Any) -> Any:
    encoder = getattr(model, CONTROL, None)
    if encoder is None:
        raise UsageError(
            "--control needs a hint encoder, and the weights hold none",
            hint="draw with a run of the task control, or with a checkpoint that holds one",
        )
    return encoder


def _sides(settings: Mapping[str, Any]) -> tuple[int, int]:
    width, height = str(settings["size"]).split("x")
    return int(width), int(height)


def _own_size(model: Any) -> tuple[int, int]:
    side = int(model.unet.config.sample_size) * int(model.latent_factor)
    return side, side


def _size(text: str | None) -> tuple[int, int] | None:
    """What `--size` says: one side or both.

    >>> _size("512"), _size("768x512")
    ((512, 512), (768, 512))
    """
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= GRAIN and int(side) % GRAIN == 0 for side in sides):
        raise UsageError(f"--size {text!r} is no size", hint=f"WIDTHxHEIGHT in multiples of {GRAIN}, e.g. 768x512")
    return int(sides[0]), int(sides[-1])


def _save(image: Any, told: Mapping[str, Any], path: Path) -> None:
    """Write a PNG that says of what and how it was drawn; names of files, never folders."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in {**told, "ortho": __version__}.items():
        if value not in (None, "", []):
            info.add_text(key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    image.save(path, format="PNG", pnginfo=info)
