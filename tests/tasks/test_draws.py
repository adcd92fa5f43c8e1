"""Stateless random numbers: a function of their address, uniform, and unlike each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ortho_cli.tasks.draws import seed_of, uniform

whole = st.integers(min_value=0, max_value=2**40)


@settings(deadline=None, max_examples=50)
@given(seed=whole, epoch=whole, places=st.lists(whole, min_size=1, max_size=9), columns=st.integers(1, 5))
def test_a_number_depends_on_its_address_alone(seed: int, epoch: int, places: list[int], columns: int) -> None:
    together = uniform(seed, epoch, np.array(places), columns)
    assert together.shape == (len(places), columns)
    assert ((together >= 0) & (together < 1)).all()
    for row, place in zip(together, places, strict=True):
        assert np.array_equal(row, uniform(seed, epoch, np.array([place]), columns)[0])
        assert np.array_equal(row[:1], uniform(seed, epoch, np.array([place]), 1)[0])


@pytest.mark.parametrize("change", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_seed_epoch_and_stream_each_matter(change: tuple[int, int, int]) -> None:
    places = np.arange(1000)
    plain, other = uniform(0, 0, places, 1, 0), uniform(change[0], change[1], places, 1, change[2])
    assert abs(np.corrcoef(plain[:, 0], other[:, 0])[0, 1]) < 0.1


def test_numbers_are_uniform_and_neighbours_independent() -> None:
    drawn = uniform(3, 1, np.arange(50_000), 4)
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0] / drawn.size
    assert abs(counts - 0.05).max() < 0.002  # five standard deviations are 0.0024
    assert abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.02
    assert abs(np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1]) < 0.02


def test_seeds_do_not_collide_and_fit_a_generator() -> None:
    seeds = {seed_of(seed, epoch) for seed in range(100) for epoch in range(100)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)
