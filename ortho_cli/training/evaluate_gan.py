"""What a GAN is judged by beyond its task's own metric: FID, KID, path length, variation predictability, activeness."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ortho_cli.analysis.activeness import activeness
from ortho_cli.analysis.evaluation import Missing
from ortho_cli.analysis.feature_distance import fid, kid
from ortho_cli.analysis.figure import Bars
from ortho_cli.analysis.path_length import Distance, feature_distance, path_length, path_points, released_path_points
from ortho_cli.analysis.perceptual import LPIPS, load_lpips
from ortho_cli.analysis.picture_features import INCEPTION
from ortho_cli.analysis.picture_metrics import Network
from ortho_cli.analysis.vp_score import EPOCHS, variation_predictability
from ortho_cli.errors import UsageError
from ortho_cli.tasks.gan_latents import codes, pairs, sefa_rotation
from ortho_cli.tasks.picture_grid import to_bytes

from .evaluate_pictures import network_loader
from .model_judge import ModelJudge

__all__ = ["GANJudge"]

# As published: pictures of a FID (and real ones), paths, pairs, codes whose coordinates are moved.
PICTURES, PATHS, PAIRS, CODES = 50_000, 10_000, 10_000, 300
PART = 64  # pictures at a time


class GANJudge(ModelJudge):
    """A run's generator, averaged where the run averages.

    Raises:
        UsageError: several processes; what is drawn and compared here is one process's work.
    """

    unasked = frozenset({"ppl_compat"})
    vp_epochs = EPOCHS

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        if self.session.accelerator.num_processes > 1:
            raise UsageError("a GAN is judged by one process", hint="ortho evaluate RUN, without accelerate launch")
        generator: Any = self.model.get_submodule("generator")
        self.device = self.session.accelerator.device
        self.generator, self.latents = generator, tuple(generator.latents)
        matrices = generator.latent_matrices()
        self.blocks = [len(matrix) for matrix in matrices]
        self.rotation = sefa_rotation(matrices) if self.drawing.sefa else None

    @cached_property
    def network(self) -> Network:
        """The network of features."""
        return network_loader(self.drawing.features, self.device, self.session.accelerator)()

    @cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """Of generated and of real pictures, both as the bytes that a file would hold."""
        count = self._number(PICTURES)
        noise = codes(self.drawing.seed, torch.arange(count), self.generator.noise_dim)
        made = self._embed((self.make(part) for part in torch.split(noise, PART)), count, "generated")
        real = self._embed(self._real(), None, "real")
        self.notes.append(
            f"fid and kid: {len(made):,} generated pictures, {len(real):,} real ones, by the features of "
            f"{self.network.title}"
        )
        return made, real

    def _real(self) -> Iterator[Tensor]:
        """The first real pictures, at most as many as are published with; batches may have any size."""
        left = PICTURES
        for batch in self.batches():
            yield from torch.split(batch["image"][:left], PART)
            left -= len(batch["image"])
            if left <= 0:
                return

    def fid(self) -> dict[str, float]:
        """Of all features."""
        return {"fid": fid(*self.features)}

    def kid(self) -> dict[str, float]:
        """Of random subsets of the features."""
        return {"kid": kid(*self.features, self.drawing.seed)}

    def ppl(self) -> dict[str, float]:
        """StyleGAN's definition, between normal codes."""
        points = path_points(self._number(PATHS), self.generator.noise_dim, self.drawing.seed)
        return {"ppl": path_length(self.exactly, self._distance("ppl"), *points, self.say)}

    def ppl_compat(self) -> dict[str, float]:
        """OrthoImproveCond's script."""
        drawn = self._number(PATHS), self.blocks, self.generator.noise_dim, self.drawing.seed
        points = released_path_points(*drawn)
        return {"ppl_compat": path_length(self.exactly, self._distance("ppl_compat"), *points, self.say)}

    def vp_score(self) -> dict[str, float]:
        """By pairs as `ortho generate --pairs` makes them, before they are files."""
        count, seed = self._number(PAIRS), self.drawing.seed
        if count < 2:
            raise Missing("it needs two pairs at least", "--num 10000")
        first, second, moved = pairs(
            seed, torch.arange(count), len(self.latents), self.generator.noise_dim, self.drawing.extent
        )

        def differences(numbers: Tensor) -> Tensor:
            return torch.cat([self.make(first[part]) - self.make(second[part]) for part in torch.split(numbers, PART)])

        changed = moved.abs().argmax(1)
        found = variation_predictability(
            differences, changed, len(self.latents), epochs=self.vp_epochs, seed=seed, say=self.say
        )
        self.data["vp"] = {
            "score": found.score, "score_on_training_pairs": found.seen, "chance": 1 / len(self.latents),
            "trained_on": found.trained, "tested_on": found.tested,
            "by_coordinate": dict(zip(self.latents, found.by_coordinate, strict=True)),
        }  # fmt: skip
        self.notes.append(
            f"vp_score: learnt from {found.trained:,} pairs ({found.seen:.1%} of them right), judged by the other "
            f"{found.tested:,}; chance is {1 / len(self.latents):.1%}"
        )
        self._draw("variation-predictability", "VP score of each coordinate", found.by_coordinate, "share told")
        return {"vp_score": found.score}

    def activeness(self) -> dict[str, float]:
        """The mean over coordinates; each of them in a figure."""
        noise = codes(self.drawing.seed, torch.arange(self._number(CODES)), self.generator.noise_dim)
        found = activeness(self.make, noise, len(self.latents), self.say).tolist()
        self.data["activeness"] = dict(zip(self.latents, found, strict=True))
        self._draw("activeness", "Activeness of each coordinate", found, "variance of the picture")
        return {"activeness": sum(found) / len(found)}

    metrics = {  # noqa: RUF012 - declared by the class above
        "fid": fid, "kid": kid, "ppl": ppl, "ppl_compat": ppl_compat, "vp_score": vp_score, "activeness": activeness,
    }  # fmt: skip

    def make(self, noise: Tensor) -> Tensor:
        """Pictures `(B, C, H, W)` in [-1, 1], in the run's precision."""
        noise = noise.to(self.device)
        if self.rotation is not None:
            turned = noise[:, : len(self.latents)] @ self.rotation.T
            noise = torch.cat([turned, noise[:, len(self.latents) :]], dim=1)
        pictures: Tensor = self.generator(noise)
        return pictures.float()

    def exactly(self, noise: Tensor) -> Tensor:
        """Pictures in colour, in float32 throughout: TF32 and bf16 would round away a step of a path."""
        with (
            torch.autocast(self.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            return _coloured(self.make(noise))

    def _distance(self, metric: str) -> Distance:
        try:
            found = load_lpips(self.device)
            self.notes.append(f"{metric}: by {LPIPS}")
        except Missing as missing:
            if self.drawing.features == INCEPTION:
                other = f"{missing.command}; or, comparable with itself alone: --features RUN|ID"
                raise Missing(missing.reason, other) from missing
            network = self.network
            self.notes.append(
                f"{metric}: {missing.reason}, so by the features of {network.title}: not comparable with published ones"
            )
            found = feature_distance(lambda pictures: network((pictures + 1) / 2))
        return found

    def _embed(self, pictures: Iterator[Tensor], count: int | None, which: str) -> Tensor:
        found: list[Tensor] = []
        for each in pictures:
            found.append(self.network(_coloured(to_bytes(each))).cpu())
            whole = f" of {count:,}" if count else ""
            self.say(f"features: {sum(map(len, found)):,}{whole} {which} pictures")
        return torch.cat(found)

    def _number(self, published: int) -> int:
        return min(published, self.drawing.number or published)

    def _draw(self, name: str, title: str, values: Any, label: str) -> None:
        known = [pair for pair in zip(self.latents, values, strict=True) if pair[1] is not None]
        shown = sorted(known, key=lambda pair: -pair[1])
        names, lengths = zip(*shown, strict=True)
        self.parts.append(Bars(name, title, names, lengths, value_label=label))


def _coloured(pictures: Tensor) -> Tensor:
    return pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures
