"""Batches by pieces: within their limit, as few as greedy cuts give, of every sentence once, whatever the lengths."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ortho_cli.errors import RecipeError
from ortho_cli.tasks import token_batches
from ortho_cli.tasks.token_batches import batch_order, flatten, ragged_rows, token_cuts, token_order

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=80)


@given(LENGTHS, st.integers(160, 400), st.sampled_from([1, 2, 8]))
def test_cuts(lengths: list[int], limit: int, multiple: int) -> None:
    rising = torch.tensor(sorted(lengths))
    cuts = token_cuts(rising, limit, multiple)
    assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts)][: len(cuts)]
    assert (cuts[-1][1] if cuts else 0) == len(lengths) - len(lengths) % multiple
    for start, stop in cuts:
        assert (stop - start) % multiple == 0 < stop - start
        assert (stop - start) * int(rising[stop - 1]) <= limit
    for start, stop in cuts[:-1]:  # none could have taken in more
        assert (stop - start + multiple) * int(rising[stop + multiple - 1]) > limit


@given(LENGTHS, st.integers(0, 5), st.integers(0, 5))
def test_an_epochs_order_holds_each_sentence_once_shortest_first(lengths: list[int], seed: int, epoch: int) -> None:
    widths = torch.tensor(lengths)
    order = token_order(widths, seed, epoch)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert widths[order].tolist() == sorted(lengths)
    assert torch.equal(order, token_order(widths, seed, epoch))


def test_epochs_and_seeds_differ() -> None:
    widths = torch.ones(50, dtype=torch.long)
    orders = {tuple(token_order(widths, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}
    batches = {tuple(batch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders | batches) == 8


def test_sentences_that_fit_no_batch() -> None:
    with pytest.raises(RecipeError, match="a batch of 30 pieces does not hold 8 sentences of 4"):
        token_cuts(torch.full((16,), 4), 30, 8)
    with pytest.raises(RecipeError, match="does not hold 1 sentence of 4") as caught:
        token_cuts(torch.tensor([1, 4]), 3)
    assert "data.batch" in str(caught.value.hint)


@given(st.lists(st.lists(st.integers(1, 99), max_size=6), min_size=1, max_size=9), st.data())
def test_rows(rows: list[list[int]], data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=5))
    flat, starts = flatten(rows)
    if not len(flat):
        return
    found = ragged_rows(flat, starts, torch.tensor(index, dtype=torch.long), 0)
    longest = max((len(rows[place]) for place in index), default=0)
    assert found.tolist() == [rows[place] + [0] * (longest - len(rows[place])) for place in index]


def test_examples_run() -> None:
    found = doctest.testmod(token_batches)
    assert (found.failed, found.attempted > 0) == (0, True)
