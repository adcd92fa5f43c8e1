"""Adversarial losses and penalties against their definitions; augmentation that is a function of a sample alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_cli.linalg.frechet import frechet_distance
from ortho_cli.tasks.gan_augment import DRAWS, augment
from ortho_cli.tasks.gan_losses import LOSSES, gradient_penalty, r1_penalty


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(16, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_vanilla_is_binary_cross_entropy() -> None:
    real, fake = logits(0), logits(1)
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    cross = F.binary_cross_entropy_with_logits
    expected = 0.5 * (cross(real, ones) + cross(fake, zeros))
    assert torch.allclose(LOSSES["vanilla"].discriminator(real, fake), expected)
    assert torch.allclose(LOSSES["vanilla"].generator(fake), cross(fake, ones))
    assert torch.allclose(LOSSES["non-saturating"].discriminator(real, fake), 2 * expected)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_pull_in_opposed_directions(name: str) -> None:
    real, fake = (value.clamp(-0.9, 0.9).requires_grad_() for value in (logits(0), logits(1)))
    down = torch.autograd.grad(LOSSES[name].discriminator(real, fake), (real, fake))
    (up,) = torch.autograd.grad(LOSSES[name].generator(fake), fake)
    assert bool((down[0] < 0).all())  # real ones shall be taken for real
    assert bool((up < 0).all())
    assert float(down[1].sum()) > 0 or name == "lsgan"  # its target 0 may lie on either side


def test_penalties_are_of_each_samples_gradient() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    pictures = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    lengths = []
    for picture in pictures.detach():
        alone = picture[None].clone().requires_grad_()
        lengths.append(torch.autograd.grad(network(alone).sum(), alone)[0].norm())
    found = torch.stack(lengths)
    assert torch.allclose(r1_penalty(network(pictures), pictures), found.square().mean())
    penalty = gradient_penalty(network(pictures), pictures)
    assert torch.allclose(penalty, (found - 1).square().mean())
    penalty.backward()
    assert all(each.grad is not None for name, each in network.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_is_a_function_of_the_sample(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(6, channels, 16, 16, generator=generator).mul(2).sub(1)
    draws = torch.rand(6, DRAWS, generator=generator)
    found = augment(pictures, draws, 0.6)
    assert found.shape == pictures.shape
    assert not torch.equal(found, pictures)
    for place in range(6):
        assert torch.equal(augment(pictures[place : place + 1], draws[place : place + 1], 0.6)[0], found[place])


def test_each_augmentation_does_what_it_says() -> None:
    pictures = torch.linspace(-0.4, 0.4, 3 * 64).view(1, 3, 8, 8)

    def alone(number: int, **values: float) -> torch.Tensor:
        draws = torch.full((1, DRAWS), 0.99)
        draws[0, number] = 0.0
        for column, value in values.items():
            draws[0, int(column[1:])] = value
        return augment(pictures, draws, 0.5)

    assert torch.allclose(alone(0, d5=0.75), pictures + 0.25)
    assert torch.allclose(alone(1, d6=0.0), pictures.mean(1, keepdim=True).expand_as(pictures))
    assert torch.allclose(alone(2, d7=0.5), pictures)
    moved = alone(3, d8=0.99, d9=0.5)  # one row down in the window, so up in the picture
    assert torch.equal(moved[:, :, :-1], pictures[:, :, 1:])
    assert bool((moved[:, :, -1] == -1).all())
    cut = alone(4, d10=0.5, d11=0.5)
    assert int((cut == 0).sum()) == 3 * 4 * 4
    assert bool((cut[:, :, 2:6, 2:6] == 0).all())


def test_gradients_pass_through_augmentation() -> None:
    pictures = torch.rand(2, 3, 8, 8, requires_grad=True)
    augment(pictures, torch.full((2, DRAWS), 0.5)).square().sum().backward()
    assert pictures.grad is not None
    assert bool(pictures.grad.any())


def test_frechet_distance() -> None:
    """Zero from itself, symmetric, and the closed form of commuting covariances; singular ones too."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    first, second = torch.tensor([4.0, 1, 1, 0, 9]).double(), torch.tensor([1.0, 1, 4, 0, 0]).double()
    covs = [basis @ torch.diag(values) @ basis.T for values in (first, second)]
    means = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2)]
    expected = (means[0] - means[1]).square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    found = frechet_distance(means[0], covs[0], means[1], covs[1])
    assert found.item() == pytest.approx(expected.item(), rel=1e-7)
    assert frechet_distance(means[1], covs[1], means[0], covs[0]).item() == pytest.approx(expected.item(), rel=1e-7)
    assert frechet_distance(means[0], covs[0], means[0], covs[0]).item() == pytest.approx(0, abs=1e-6)
