"""The loss of diffusion models against diffusers' own, and its draws, which belong to samples."""

from __future__ import annotations

import doctest
import warnings

import pytest
import torch

from ortho_cli.tasks import diffusion_loss
from ortho_cli.tasks.diffusion_loss import diffusion_draws, min_snr_weights, mix_noise, noise_loss, target_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import compute_snr


@pytest.fixture
def schedule() -> object:
    return diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_noise_and_targets_are_those_of_diffusers(schedule: object) -> None:
    x, noise, t = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6), torch.tensor([0, 400, 999])
    table = schedule.alphas_cumprod  # type: ignore[attr-defined]
    torch.testing.assert_close(mix_noise(x, noise, t, table), schedule.add_noise(x, noise, t))  # type: ignore[attr-defined]
    velocity = schedule.get_velocity(x, noise, t)  # type: ignore[attr-defined]
    torch.testing.assert_close(target_of("v_prediction", x, noise, t, table), velocity)
    assert target_of("epsilon", x, noise, t, table) is noise
    with pytest.raises(ValueError, match="sample"):
        target_of("sample", x, noise, t, table)
    snr: torch.Tensor = compute_snr(schedule, t)  # type: ignore[no-untyped-call]
    five = torch.full_like(snr, 5.0)
    torch.testing.assert_close(min_snr_weights(t, table, 5.0), torch.minimum(snr, five) / snr)
    expected = torch.minimum(snr, five) / (snr + 1)
    torch.testing.assert_close(min_snr_weights(t, table, 5.0, "v_prediction"), expected)


def test_a_loss_is_of_each_sample() -> None:
    predicted, target = torch.zeros(2, 1, 2, 2), torch.stack([torch.ones(1, 2, 2), torch.full((1, 2, 2), 2.0)])
    assert noise_loss(predicted, target).tolist() == [1.0, 4.0]
    assert noise_loss(predicted, target, torch.tensor([1.0, 0.5])).tolist() == [1.0, 2.0]


def test_draws_are_normal_uniform_and_fresh() -> None:
    found = diffusion_draws(0, 0, torch.arange(200), (4, 4, 4))
    for name in ("noise", "latent_noise"):
        assert abs(found[name].mean().item()) < 0.03
        assert abs(found[name].std().item() - 1) < 0.03
    assert not torch.equal(found["noise"], found["latent_noise"])
    assert found["timestep"].min() < 50
    assert found["timestep"].max() > 949
    other = diffusion_draws(0, 1, torch.arange(200), (4, 4, 4))
    assert not torch.equal(found["noise"], other["noise"])
    shared = diffusion_draws(0, 0, torch.arange(200), (4, 4, 4), offset=0.5)["noise"] - found["noise"]
    assert torch.allclose(shared, shared[:, :, :1, :1].expand_as(shared), atol=1e-6)
    assert abs(shared.std().item() - 0.5) < 0.05


def test_the_examples_run() -> None:
    assert doctest.testmod(diffusion_loss).failed == 0
