"""Who sees which sample when: the same over ranks, resumes and workers, each sample once where it must be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ortho_cli.errors import RecipeError
from ortho_cli.tasks.batching import eval_parts, load_batches, shuffled, train_parts

sizes = st.integers(1, 60)


class Numbers:
    """Samples that tell who they are."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        return {"key": torch.tensor(key)}

    def fetch(self, epoch: int, index: Tensor) -> dict[str, Tensor]:
        return {"key": torch.stack([torch.full_like(index, epoch), index], dim=1)}


def test_an_order_is_a_permutation_of_its_own() -> None:
    orders = {(seed, epoch): shuffled(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    assert shuffled(50, 1, 1).tolist() == orders[1, 1]


def test_an_order_takes_nothing_from_torchs_generator() -> None:
    state = torch.get_rng_state()
    shuffled(50, 0, 0)
    list(load_batches(Numbers(), torch.arange(23), [(0, 4)], 0))
    assert torch.equal(state, torch.get_rng_state())


@settings(deadline=None, max_examples=100)
@given(share=st.integers(1, 8), world=st.integers(1, 5), size=sizes)
def test_training_parts_of_all_ranks_make_the_batches_of_one(share: int, world: int, size: int) -> None:
    batch = share * world
    if batch > size:
        return
    alone = train_parts(size, batch)
    ranks = [train_parts(size, batch, rank, world) for rank in range(world)]
    assert alone == [(start, start + batch) for start in range(0, size // batch * batch, batch)]
    for number, (start, stop) in enumerate(alone):
        parts = [rank[number] for rank in ranks]
        assert [place for part in parts for place in range(*part)] == list(range(start, stop))
        assert {last - first for first, last in parts} == {share}


@settings(deadline=None, max_examples=100)
@given(batch=st.integers(1, 20), world=st.integers(1, 5), size=sizes)
def test_evaluation_sees_every_sample_once_and_ranks_keep_step(batch: int, world: int, size: int) -> None:
    ranks = [eval_parts(size, batch, rank, world) for rank in range(world)]
    assert len({len(parts) for parts in ranks}) == 1
    assert sorted(place for parts in ranks for part in parts for place in range(*part)) == list(range(size))
    alone = eval_parts(size, batch)
    lengths = [stop - start for start, stop in alone]
    assert max(lengths) <= batch and max(lengths) - min(lengths) <= 1
    assert len(alone) == -(-size // batch)
    for number, (start, stop) in enumerate(alone):
        assert (ranks[0][number][0], ranks[-1][number][1]) == (start, stop)


def test_batches_that_cannot_be_made() -> None:
    with pytest.raises(RecipeError, match="a batch of 5 cannot be shared evenly by 2 processes"):
        train_parts(10, 5, world=2)
    with pytest.raises(RecipeError, match="a batch of 11 is more than the 10 training samples") as caught:
        train_parts(10, 11)
    assert caught.value.hint == "data.batch: 10 at most"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # how torch starts workers, from Python 3.12 on
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing(workers: int) -> None:
    order, parts = shuffled(23, 0, 5), train_parts(23, 4)
    found = [batch["key"] for batch in load_batches(Numbers(), order, parts, 5, workers)]
    assert torch.equal(torch.cat(found)[:, 1], order[:20])
    assert set(torch.cat(found)[:, 0].tolist()) == {5}
