"""The adversarial losses and the gradient penalties of discriminators, as functions of logits.

A logit is large where the discriminator takes a picture for real. Each loss is a pair: what the discriminator
minimises over real and generated logits, and what the generator minimises over generated ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOSSES", "AdversarialLoss", "gradient_penalty", "r1_penalty"]


@dataclass(frozen=True)
class AdversarialLoss:
    """What the two networks minimise; each a mean over samples.

    >>> real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    >>> LOSSES["hinge"].discriminator(real, fake).item(), LOSSES["hinge"].generator(fake).item()
    (0.75, 1.0)
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def _hinge(real: Tensor, fake: Tensor) -> Tensor:
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def _logistic(real: Tensor, fake: Tensor) -> Tensor:
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def _least_squares(real: Tensor, fake: Tensor) -> Tensor:
    return (real - 1).square().mean() + fake.square().mean()


LOSSES = {
    # arXiv:1705.02894; the generator's is linear, as there.
    "hinge": AdversarialLoss(_hinge, lambda fake: -fake.mean()),
    # The same clipped where a picture already passes, as EigenGAN's PyTorch port has it.
    "hinge-clipped": AdversarialLoss(_hinge, lambda fake: F.relu(1 - fake).mean()),
    # arXiv:1406.2661, with the generator's gradient kept alive as its section 3 says.
    "non-saturating": AdversarialLoss(_logistic, lambda fake: F.softplus(-fake).mean()),
    # arXiv:1611.04076, with the targets 0, 1, 1.
    "lsgan": AdversarialLoss(_least_squares, lambda fake: (fake - 1).square().mean()),
    # Binary cross-entropy, of the discriminator the mean of both halves (pix2pix, and the code bases that follow it).
    "vanilla": AdversarialLoss(lambda real, fake: 0.5 * _logistic(real, fake), lambda fake: F.softplus(-fake).mean()),
}


def r1_penalty(logits: Tensor, pictures: Tensor) -> Tensor:
    """The mean over samples of the squared length of the logit's gradient at real pictures.

    Args:
        logits: ``(B, 1)``, computed from `pictures`.
        pictures: ``(B, C, H, W)``, requiring gradients.

    Cost: a backward pass, and another through it when the result is differentiated.
    Reference: Mescheder et al. 2018, arXiv:1801.04406, equation 9, without its half and weight.

    >>> pictures = torch.ones(2, 1, 1, 3, requires_grad=True)
    >>> r1_penalty(pictures.square().sum((1, 2, 3)), pictures).item()
    12.0
    """
    return _gradient(logits, pictures).square().sum(1).mean()


def gradient_penalty(logits: Tensor, pictures: Tensor) -> Tensor:
    """The mean over samples of how far the gradient's length is from 1, squared.

    Args:
        logits: ``(B, 1)``, computed from `pictures`.
        pictures: ``(B, C, H, W)`` between real and generated ones, requiring gradients.

    Reference: Gulrajani et al. 2017, arXiv:1704.00028, equation 3, without its weight.

    >>> pictures = torch.zeros(2, 1, 1, 4, requires_grad=True)
    >>> gradient_penalty(pictures.sum((1, 2, 3)), pictures).item()
    1.0
    """
    lengths: Tensor = torch.linalg.vector_norm(_gradient(logits, pictures), dim=1)
    return (lengths - 1).square().mean()


def _gradient(logits: Tensor, pictures: Tensor) -> Tensor:
    """Of each sample's logit for its picture, `(B, C H W)`, with a graph."""
    (found,) = torch.autograd.grad(logits.sum(), pictures, create_graph=True)
    flat: Tensor = found.flatten(1)
    return flat
