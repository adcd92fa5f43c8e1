"""The loss of diffusion models as pure functions: noise is mixed into latents, and the model says what was mixed in.

All that is random belongs to a sample of an epoch, as everywhere here: a resumed run draws what an uninterrupted one
draws, and two processes draw together what one draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .draws import normal, uniform

__all__ = ["diffusion_draws", "min_snr_weights", "mix_noise", "noise_loss", "target_of"]

NOISE_STREAM, TIME_STREAM = 7, 8  # of the random numbers; lower ones are the pictures' and the GANs'


def diffusion_draws(
    seed: int, epoch: int, index: Tensor, latents: tuple[int, int, int], steps: int = 1000, *, offset: float = 0.0
) -> dict[str, Tensor]:
    """Everything random in the noise of some samples, each a function of seed, epoch and place alone.

    Args:
        seed: of the run.
        epoch: the samples are drawn anew in each.
        index: `(B,)` places in the split.
        latents: channels, height and width.
        steps: of the noise schedule.
        offset: how much noise all of a channel shares, which lets a model learn very dark and bright pictures.

    Returns:
        `noise` and `latent_noise` (B, C, h, w) float32: what is mixed in, and what draws latents from a picture's
        distribution; `timestep` (B,) int64.

    Reference: noise offset, crosslabs.org/blog/diffusion-with-offset-noise.

    >>> both = diffusion_draws(0, 3, torch.tensor([4, 9]), (4, 2, 2))
    >>> alone = diffusion_draws(0, 3, torch.tensor([9]), (4, 2, 2))
    >>> all(torch.equal(both[name][1:], alone[name]) for name in both)
    True
    """
    channels, height, width = latents
    count = channels * height * width
    drawn = normal(seed, epoch, index, 2 * count + channels, NOISE_STREAM)
    noise = drawn[:, :count].view(-1, *latents)
    if offset:
        noise = noise + offset * drawn[:, 2 * count :].view(-1, channels, 1, 1)
    times = torch.from_numpy(uniform(seed, epoch, index.numpy(), 1, TIME_STREAM)[:, 0])
    return {
        "noise": noise.contiguous(),
        "latent_noise": drawn[:, count : 2 * count].reshape(-1, *latents),
        "timestep": times.mul_(steps).long(),
    }


def mix_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    r"""Latents with noise: :math:`\sqrt{\bar\alpha_t}\, x + \sqrt{1 - \bar\alpha_t}\, \epsilon`.

    Args:
        latents: `(B, C, h, w)`.
        noise: of the same shape.
        timesteps: `(B,)` int64.
        alphas_cumprod: `(T,)` of the schedule.

    Reference: DDPM, arXiv:2006.11239, equation 4; diffusers' `add_noise`.

    >>> mix_noise(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([0]), torch.tensor([0.25])).item()
    0.5
    """
    kept = _each(alphas_cumprod[timesteps], latents)
    return kept.sqrt() * latents + (1 - kept).sqrt() * noise


def target_of(kind: str, latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    r"""What a model predicts: the noise, or :math:`v = \sqrt{\bar\alpha_t}\, \epsilon - \sqrt{1 - \bar\alpha_t}\, x`.

    Args:
        kind: `epsilon` or `v_prediction`, as diffusers' schedulers call them.
        latents: without noise, `(B, C, h, w)`.
        noise: that was mixed in.
        timesteps: `(B,)`.
        alphas_cumprod: `(T,)`.

    Raises:
        ValueError: another kind.

    Reference: v, arXiv:2202.00512, section 4.
    """
    if kind == "epsilon":
        return noise
    if kind != "v_prediction":
        raise ValueError(f"a model that predicts {kind!r}; trained are epsilon and v_prediction")
    kept = _each(alphas_cumprod[timesteps], latents)
    return kept.sqrt() * noise - (1 - kept).sqrt() * latents


def min_snr_weights(timesteps: Tensor, alphas_cumprod: Tensor, gamma: float, kind: str = "epsilon") -> Tensor:
    r"""Weights that keep nearly clean latents from dominating: :math:`\min(\mathrm{SNR}, \gamma)`, of a loss on x.

    Args:
        timesteps: `(B,)`.
        alphas_cumprod: `(T,)`.
        gamma: the largest signal-to-noise ratio that counts, 5 in the paper.
        kind: what is predicted; a loss on noise has SNR in it already, one on v has SNR + 1.

    Returns:
        `(B,)`, of the table's type.

    Reference: Min-SNR, arXiv:2303.09556, section 3.4.

    >>> min_snr_weights(torch.tensor([0, 1]), torch.tensor([0.75, 0.5]), 1.5).tolist()
    [0.5, 1.0]
    """
    kept = alphas_cumprod[timesteps]
    ratio = kept / (1 - kept)
    return ratio.clamp(max=gamma) / (ratio + 1 if kind == "v_prediction" else ratio)


def noise_loss(predicted: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """The squared error of each sample, a mean over its values: `(B,)` float32, weighted where there are weights."""
    each = (predicted.float() - target.float()).square().flatten(1).mean(1)
    return each if weights is None else each * weights


def _each(values: Tensor, like: Tensor) -> Tensor:
    """One value a sample, to multiply with samples."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))
