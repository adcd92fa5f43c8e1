"""The ranks of all layers chosen together: the smallest total squared error for a budget of parameters or FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.errors import UsageError
from ortho_cli.linalg.ranks import component_energies

__all__ = ["budget_ranks"]


def budget_ranks(
    spectra: Sequence[Tensor], per_rank: Sequence[int], dense: Sequence[int], budget: float
) -> list[int | None]:
    r"""Choose the ranks of all layers together: the smallest total squared error within a budget.

    Each component costs what its layer charges for one more rank and removes :math:`\sigma^2` of error, so the best
    set is read off one sorted list of :math:`\sigma^2 / cost`. A layer may also stay dense, at its own cost and with
    no error: its components beyond some rank are then worth less, per parameter, than the one step to dense, which
    replaces them in the list (the concave hull of cost and gain). What the list leaves of the budget goes to whatever
    still fits, best first.

    Args:
        spectra: all singular values of each layer, `(k)` descending, or `(batch, k)` where matrices share a rank.
            Scale them to weigh layers against each other.
        per_rank: of each layer, what one more rank costs (parameters, or multiply-adds).
        dense: of each layer, what it costs as it is.
        budget: in the same unit, for these layers.

    Returns:
        A rank for each layer, at least 1; None where it stays dense.

    Raises:
        UsageError: a budget below rank 1 everywhere.

    Cost: one sort of all components. Optimal where costs are alike; else above the optimum by less than the gain of
        one component (or of one step to dense), as greedy is for a knapsack.

    >>> budget_ranks([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])], [4, 4], [100, 100], 12)
    [1, 2]
    """
    squares = [component_energies(values) for values in spectra]
    costs = list(zip(per_rank, dense, strict=True))
    ranks: list[int | None] = [1 if cost < whole else None for cost, whole in costs]
    left = budget - sum(min(pair) for pair in costs)
    if left < 0:
        raise UsageError(f"a budget of {budget:.0f} is below what rank 1 everywhere costs, {budget - left:.0f}")
    open_layers = [index for index, rank in enumerate(ranks) if rank is not None]
    if not open_layers:
        return ranks
    hulls = [_hull(squares[index], *costs[index]) for index in open_layers]
    worth = torch.cat([hull.gains / hull.prices for hull in hulls])
    price = torch.cat([hull.prices for hull in hulls])
    owner = torch.repeat_interleave(torch.tensor(open_layers), torch.tensor([len(hull.gains) for hull in hulls]))
    order = torch.argsort(worth, descending=True, stable=True)
    order = order[torch.cumsum(price[order], 0) <= left]
    left -= float(price[order].sum())
    taken = torch.bincount(owner[order], minlength=len(ranks)).tolist()
    for index, hull in zip(open_layers, hulls, strict=True):
        whole = hull.ends_dense and taken[index] == len(hull.gains)
        ranks[index] = None if whole else 1 + taken[index]
    _spend(ranks, squares, costs, left)
    return ranks


class _Hull(NamedTuple):
    """What each further step of a layer gains and costs, the worthiest first; the last may be the one to dense."""

    gains: Tensor
    prices: Tensor
    ends_dense: bool


def _hull(squares: Tensor, cost: int, whole: int) -> _Hull:
    """The steps from rank 1 on; the one to dense leaves from the first rank where another component is worth less."""
    last = min(len(squares), (whole - 1) // cost)
    steps = squares[1:last]
    lost = squares.flip(0).cumsum(0).flip(0)[1 : last + 1]  # at rank 1, 2, ...
    jumps = whole - cost * torch.arange(1, len(lost) + 1, dtype=squares.dtype)
    onward = torch.cat([steps, steps.new_zeros(1)])[: len(lost)]
    leaves = torch.nonzero((lost > 0) & (onward / cost <= lost / jumps))
    if not len(leaves):
        steps = steps[steps > 0]
        return _Hull(steps, torch.full_like(steps, cost), False)
    at = int(leaves[0])
    prices = torch.full((at + 1,), cost, dtype=squares.dtype)
    prices[at] = jumps[at]
    return _Hull(torch.cat([steps[:at], lost[at : at + 1]]), prices, True)


def _spend(ranks: list[int | None], squares: Sequence[Tensor], costs: Sequence[tuple[int, int]], left: float) -> None:
    """Spend what the list left over on whatever still fits, the best worth first."""
    while True:
        offers: list[tuple[float, int, float, int | None]] = []
        for index, (rank, (cost, whole)) in enumerate(zip(ranks, costs, strict=True)):
            if rank is None:
                continue
            step, jump, gains = cost, whole - cost * rank, squares[index]
            if rank < len(gains) and gains[rank] > 0:
                if step <= left and step < jump:
                    offers.append((float(gains[rank]) / step, index, step, rank + 1))
                if jump <= left:
                    offers.append((float(gains[rank:].sum()) / jump, index, jump, None))
        if not offers:
            return
        _, index, price, ranks[index] = max(offers, key=lambda offer: offer[0])
        left -= price
