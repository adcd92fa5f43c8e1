"""Generator and discriminator as one module: each phase is one call, so that wrappers see all of its work."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .gan_augment import augment
from .gan_losses import gradient_penalty, r1_penalty
from .task import Batch

__all__ = ["FAKE", "MADE", "REAL", "Adversaries"]

REAL, FAKE, MADE = range(3)  # which augmentation draws: of real pictures, of those they are compared with, of generated


class Adversaries(nn.Module):
    """Two networks with opposed aims.

    Args:
        generator: noise to pictures in [-1, 1].
        discriminator: pictures to logits.
        augmented: the probability of each differentiable augmentation; 0: none.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module, augmented: float = 0.0) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator
        self.augmented = augmented

    def forward(self, phase: str, batch: Batch) -> dict[str, Tensor]:
        """What a phase's loss is made of.

        Args:
            phase: `discriminator`, `generator`, or `sample` for pictures alone.
            batch: `noise` (B, 2, D), for the two phases; `image` (B, C, H, W); `draws` (B, 3, DRAWS) where pictures
                are augmented; `mix` (B, 1, 1, 1) where the gradient penalty is wanted; `r1`, of any value, where R1 is.
                For `sample`, `noise` (B, D).

        Returns:
            Logits `real` and `fake` (B, 1), `pictures` that were generated, and the penalties `r1` and
            `gradient_penalty` (scalars, unweighted).
        """
        if phase == "sample":
            return {"pictures": self.generator(batch["noise"])}
        if phase == "generator":
            pictures = self.generator(batch["noise"][:, 1])
            return {"pictures": pictures, "fake": self._logits(pictures, batch, MADE)}
        with torch.no_grad():
            pictures = self.generator(batch["noise"][:, 0])
        real = batch["image"].detach().requires_grad_("r1" in batch)
        found = {
            "pictures": pictures, "real": self._logits(real, batch, REAL), "fake": self._logits(pictures, batch, FAKE),
        }  # fmt: skip
        if "r1" in batch:
            found["r1"] = r1_penalty(found["real"], real)
        if "mix" in batch:
            between = torch.lerp(pictures, real.detach(), batch["mix"]).requires_grad_()
            found["gradient_penalty"] = gradient_penalty(self.discriminator(between), between)
        return found

    def _logits(self, pictures: Tensor, batch: Batch, which: int) -> Tensor:
        if self.augmented:
            pictures = augment(pictures, batch["draws"][:, which], self.augmented)
        logits: Tensor = self.discriminator(pictures)
        return logits.float()
