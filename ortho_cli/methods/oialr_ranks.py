"""How OIALR cuts the rank of cores: pure functions of their singular values.

`relative_rank` is the rule of the authors' code, `energy_rank` bounds the error, `budget_ranks` the parameters.
Matrices that share a rank (the groups of a convolution) are a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ortho_cli.linalg.ranks import component_energies

__all__ = ["CUTS", "Spectrum", "active_layers", "budget_ranks", "cut_ranks", "energy_rank", "relative_rank"]

CUTS = ("relative", "energy", "budget")
FLOOR_SHARE = 0.01  # of the layer's short side: no rank below it
MOST_CUT = 0.5  # a check takes away half of the components at most


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a core, `(r)` or `(groups, r)` descending, and what the cut needs to know beside them.

    Attributes:
        values: of the core.
        rows: of the layer's matrix.
        cols: of the layer's matrix.
        lost: energy that earlier cuts took away.
    """

    values: Tensor
    rows: int
    cols: int
    lost: float = 0.0

    @property
    def matrices(self) -> int:
        """How many share the rank."""
        return self.values.numel() // self.values.shape[-1]

    @property
    def floor(self) -> int:
        """The least rank of cuts by energy and budget."""
        return max(1, int(FLOOR_SHARE * min(self.rows, self.cols)))


def cut_ranks(spectra: Mapping[str, Spectrum], cut: str, beta: float) -> dict[str, int]:
    """The rank of each layer after a check; never above what it has.

    Args:
        spectra: of the layers that are checked, by name.
        cut: "relative", "energy" or "budget".
        beta: of `relative_rank` and `energy_rank`; of a budget the share of the layers' entries that may train.
    """
    if cut == "budget":
        return budget_ranks(spectra, beta)
    rule = relative_rank if cut == "relative" else energy_rank
    return {name: rule(spectrum, beta) for name, spectrum in spectra.items()}


def relative_rank(spectrum: Spectrum, beta: float) -> int:
    """Drop singular values below `beta` times the largest, at most half of them in one check.

    Reference: OIALR, arXiv:2401.08505, section 3, and its code, whose floor of 1 % of the short side this keeps.

    >>> relative_rank(Spectrum(torch.tensor([4.0, 3.0, 2.0, 0.1]), 4, 4), 0.1)
    3
    >>> relative_rank(Spectrum(torch.tensor([4.0, 0.3, 0.2, 0.1]), 4, 4), 0.1)
    2
    """
    values = spectrum.values.reshape(-1, spectrum.values.shape[-1])
    rank = values.shape[-1]
    below = (values < beta * values[:, :1]).all(0).nonzero()
    if not len(below):
        return rank
    first, half = int(below[0]), MOST_CUT * rank
    floor = int(FLOOR_SHARE * min(spectrum.rows, spectrum.cols))
    if first < half and half > floor:
        return int(half)
    return max(first, min(floor, rank))


def energy_rank(spectrum: Spectrum, beta: float) -> int:
    """Drop what keeps the relative Frobenius error of all cuts of a layer together at `beta` or below.

    >>> energy_rank(Spectrum(torch.tensor([3.0, 2.0, 1.0]), 3, 3), 0.3)
    2
    >>> energy_rank(Spectrum(torch.tensor([3.0, 2.0, 1.0]), 3, 3, lost=1.0), 0.3)
    3
    """
    energies = component_energies(spectrum.values)
    tails = energies.flip(0).cumsum(0).flip(0)
    needed = int((spectrum.lost + tails > beta**2 * (spectrum.lost + tails[0])).sum())
    return min(max(needed, spectrum.floor), len(energies))


def budget_ranks(spectra: Mapping[str, Spectrum], share: float) -> dict[str, int]:
    """One threshold for all layers, on singular values over each layer's largest, so that their cores fit a budget.

    Args:
        spectra: by layer.
        share: of the layers' entries `rows * cols`, that their cores `r * r` may have together.

    >>> flat, steep = torch.tensor([1.0, 0.9, 0.8, 0.7]), torch.tensor([1.0, 0.3, 0.2, 0.1])
    >>> budget_ranks({"a": Spectrum(flat, 4, 4), "b": Spectrum(steep, 4, 4)}, 0.4)
    {'a': 3, 'b': 1}
    """
    limit = share * sum(each.matrices * each.rows * each.cols for each in spectra.values())
    ranks = {name: min(each.floor, each.values.shape[-1]) for name, each in spectra.items()}
    spent = sum(spectra[name].matrices * rank**2 for name, rank in ranks.items())
    steps = []
    for name, each in spectra.items():
        values = each.values.double().reshape(-1, each.values.shape[-1]).cpu()
        largest = values[:, :1].clamp_min(torch.finfo(values.dtype).tiny)
        steps += [(-score, name) for score in (values / largest).amax(0)[ranks[name] :].tolist()]
    for _, name in sorted(steps):
        spent += spectra[name].matrices * (2 * ranks[name] + 1)  # (r + 1)^2 - r^2
        if spent > limit:
            break
        ranks[name] += 1
    return ranks


def active_layers(layers: int, checks: int, order: str, share: float) -> int:
    """How many of the last layers a check looks at: at each a further share, from the back of the network.

    A share of less than one layer takes them all, as the authors' code does.

    Args:
        layers: in all.
        checks: done so far, this one included.
        order: "back" or "all".
        share: of the layers that each check adds.

    >>> [active_layers(25, checks, "back", 0.1) for checks in (1, 2, 13)], active_layers(10, 1, "back", 0.1)
    ([2, 4, 25], 10)
    """
    added = int((layers - 1) * share)
    return layers if order == "all" or not added else min(layers, added * checks)
