"""How far apart two sets of pictures are, by a network's features: FID (two Gaussians) and KID (a kernel)."""

from __future__ import annotations

import importlib.util
import warnings

import torch
from torch import Tensor

from ortho_cli.linalg.frechet import frechet_distance

from .evaluation import Missing
from .picture_folder import PictureFolder
from .picture_metrics import PictureOptions

__all__ = ["fid", "fid_of_folders", "kid", "kid_of_folders"]

KID_SUBSETS, KID_SUBSET = 100, 1000  # of Binkowski et al.'s release; subsets are smaller where pictures are fewer


def fid(generated: Tensor, reference: Tensor) -> float:
    """The squared Frechet distance of two Gaussians with the features' means and (unbiased) covariances.

    Args:
        generated: ``(n, d)``, n at least 2; computed in float64.
        reference: ``(m, d)``, m at least 2.

    Returns:
        Not negative; biased upwards where ``n`` or ``m`` is not much above ``d``, so compare at equal numbers.

    Raises:
        Missing: one of them is of a single picture, which has no covariance.

    Reference: Heusel et al. 2017, arXiv:1706.08500, equation 6.

    >>> fid(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]]))
    9.0
    """
    _check_numbers(generated, reference)
    (mean1, cov1), (mean2, cov2) = (_gaussian(each.double()) for each in (generated, reference))
    return float(frechet_distance(mean1, cov1, mean2, cov2))


def kid(generated: Tensor, reference: Tensor, seed: int = 0) -> float:
    """The squared maximum mean discrepancy with a cubic kernel, a mean over random subsets; unbiased at any number.

    Args:
        generated: ``(n, d)``, n at least 2.
        reference: ``(m, d)``, m at least 2.
        seed: of the subsets; the random state of torch is put back.

    Raises:
        Missing: torchmetrics is not installed, or one of them is of a single picture.

    Reference: Binkowski et al. 2018, arXiv:1801.01401, section 4.
    """
    _check_numbers(generated, reference)
    if importlib.util.find_spec("torchmetrics") is None:
        raise Missing("torchmetrics is not installed", "pip install 'ortho-cli[eval]'")
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET, len(generated), len(reference))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all extracted features")
        metric = KernelInceptionDistance(feature=_AsGiven(generated.shape[1]), subsets=KID_SUBSETS, subset_size=size)
    metric.update(reference.float(), real=True)
    metric.update(generated.float(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mean, _ = metric.compute()
    return float(mean)


def fid_of_folders(generated: PictureFolder, reference: PictureFolder, options: PictureOptions) -> dict[str, float]:
    """The registry's `fid`."""
    return {"fid": fid(options.features(generated), options.features(reference))}


def kid_of_folders(generated: PictureFolder, reference: PictureFolder, options: PictureOptions) -> dict[str, float]:
    """The registry's `kid`."""
    return {"kid": kid(options.features(generated), options.features(reference), options.seed)}


class _AsGiven(torch.nn.Module):
    """For torchmetrics: the features were computed already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _check_numbers(generated: Tensor, reference: Tensor) -> None:
    for which, features in (("generated", generated), ("reference", reference)):
        if len(features) < 2:
            raise Missing(f"it needs two {which} pictures at least, found {len(features)}")


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    width = features.shape[1]
    return features.mean(0), features.T.cov().view(width, width)  # of one feature torch gives a scalar
