"""How ranks are cut: the authors' rule step by step, errors that add up, budgets that hold."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ortho_cli.methods.oialr_ranks import Spectrum, active_layers, budget_ranks, cut_ranks, energy_rank, relative_rank

VALUES = st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=60).map(lambda found: sorted(found, reverse=True))


def spectrum(values: list[float], side: int | None = None, lost: float = 0.0) -> Spectrum:
    size = side or len(values)
    return Spectrum(torch.tensor(values, dtype=torch.float64), size, 2 * size, lost)


def rule_of_the_code(values: list[float], beta: float, side: int) -> int:
    """As the authors' trainer does it, in its own words."""
    rank, floor, threshold = len(values), int(0.01 * side), beta * values[0]
    first = next((index for index, value in enumerate(values) if value < threshold), None)
    if first is None:
        return rank
    if first < 0.5 * rank and 0.5 * rank > floor:
        return int(0.5 * rank)
    return floor if first < floor else first


@given(VALUES, st.floats(0.01, 0.99), st.integers(0, 4000))
def test_the_relative_rule_is_the_authors(values: list[float], beta: float, more: int) -> None:
    side = len(values) + more
    wanted = rule_of_the_code(values, beta, side)
    assert relative_rank(spectrum(values, side), beta) == min(wanted, len(values))


def test_relative_by_hand() -> None:
    assert relative_rank(spectrum([1.0, 0.5, 0.1, 0.01]), 0.05) == 3
    assert relative_rank(spectrum([1.0, *[0.01] * 9]), 0.05) == 5  # halved at most
    assert relative_rank(spectrum([1.0, 0.01], side=400), 0.05) == 2  # no rank below 1 % of the short side
    assert relative_rank(spectrum([0.0, 0.0]), 0.5) == 2  # nothing is below a share of nothing
    groups = Spectrum(torch.tensor([[1.0, 0.5, 0.01], [1.0, 0.01, 0.01]]), 3, 6)
    assert relative_rank(groups, 0.05) == 2  # what any group needs


@given(VALUES, st.floats(0.01, 0.9))
def test_the_error_of_all_cuts_stays_below_beta(values: list[float], beta: float) -> None:
    """Cut, and cut again what is left: the whole loss counts."""
    whole = sum(value**2 for value in values)
    lost, kept = 0.0, values
    for _ in range(3):
        rank = energy_rank(spectrum(kept, len(values), lost), beta)
        lost += sum(value**2 for value in kept[rank:])
        kept = kept[:rank]
    assert lost <= beta**2 * whole * (1 + 1e-9)
    if len(kept) > 1:  # and not one could have gone
        assert lost + kept[-1] ** 2 > beta**2 * whole * (1 - 1e-9)


@given(st.lists(VALUES, min_size=1, max_size=4), st.floats(0.05, 0.95))
def test_budgets_hold_and_leave_no_room(spectra: list[list[float]], share: float) -> None:
    named = {str(index): spectrum(values) for index, values in enumerate(spectra)}
    ranks = budget_ranks(named, share)
    limit = share * sum(each.rows * each.cols for each in named.values())
    spent = sum(rank**2 for rank in ranks.values())
    assert all(1 <= rank <= len(named[name].values) for name, rank in ranks.items())
    assert spent <= limit or all(rank == 1 for rank in ranks.values())
    short = [2 * rank + 1 for name, rank in ranks.items() if rank < len(named[name].values)]
    assert not short or spent + max(short) > limit


def test_each_rule_by_its_name() -> None:
    found = {"a": spectrum([1.0, 0.5, 0.05, 0.01])}
    assert [cut_ranks(found, cut, 0.1)["a"] for cut in ("relative", "energy", "budget")] == [2, 2, 1]


def test_layers_come_in_from_the_back() -> None:
    assert [active_layers(173, check, "back", 0.1) for check in (1, 10, 11)] == [17, 170, 173]
    assert [active_layers(25, check, "back", 0.1) for check in (12, 13)] == [24, 25]
    assert active_layers(49, 12, "back", 0.1) == 48
    assert active_layers(9, 1, "back", 0.1) == 9 and active_layers(30, 1, "all", 0.1) == 30
