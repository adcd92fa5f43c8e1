"""First values of new adapters, and padding. That PEFT draws the same numbers is in test_peft_peers.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import relative

from ortho_cli.errors import TargetError
from ortho_cli.linalg import Householder, orthonormal_start, pad_pairs, paired_start, reflect_weight

quick = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**20)


@quick
@given(st.integers(2, 96), st.integers(1, 16), seeds)
def test_a_paired_start_is_the_identity_and_uniform_in_its_bound(width: int, pairs: int, seed: int) -> None:
    rank = 2 * min(pairs, width // 2)
    vectors = paired_start(width, rank, torch.Generator().manual_seed(seed))
    assert vectors.shape == (width, rank)
    assert torch.equal(vectors[:, 0::2], vectors[:, 1::2])
    assert float(vectors.abs().max()) <= (rank / 2) ** -0.5
    weight = torch.randn(3, width)
    assert relative(reflect_weight(weight, vectors), weight) < 1e-6
    double = paired_start(width, rank, torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(double, vectors.double())


def test_a_paired_start_fills_its_bound() -> None:
    vectors = paired_start(4096, 8, torch.Generator().manual_seed(0))
    assert float(vectors.max()) == pytest.approx(0.5, abs=1e-3)
    assert float(vectors.min()) == pytest.approx(-0.5, abs=1e-3)
    assert float(vectors.norm(dim=0).mean()) == pytest.approx(18.5, abs=0.2)  # as measured on PEFT


def test_seeds_decide() -> None:
    for start in (paired_start, orthonormal_start):
        first = start(16, 4, torch.Generator().manual_seed(1))
        assert torch.equal(first, start(16, 4, torch.Generator().manual_seed(1)))
        assert not torch.equal(first, start(16, 4, torch.Generator().manual_seed(2)))
        torch.manual_seed(1)
        assert torch.equal(first, start(16, 4))


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_an_odd_rank_is_refused_with_the_reason(rank: int) -> None:
    with pytest.raises(TargetError, match=f"rank {rank} is odd: .* determinant -1") as caught:
        paired_start(16, rank)
    assert f"rank {rank + 1}" in (caught.value.hint or "")
    assert orthonormal_start(16, rank).shape == (16, rank)


@pytest.mark.parametrize("rank", [-2, 0, 6])
def test_a_rank_above_the_width_is_refused(rank: int) -> None:
    for start in (paired_start, orthonormal_start):
        with pytest.raises(TargetError, match=f"rank {rank} on a layer of width 4"):
            start(4, rank)


@quick
@given(st.integers(1, 64), st.data())
def test_an_orthonormal_start_is_orthonormal(width: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, width))
    basis = orthonormal_start(width, rank, torch.Generator().manual_seed(data.draw(seeds)), dtype=torch.float64)
    assert relative(basis.T @ basis, torch.eye(rank)) < 1e-12
    assert Householder(basis, gram_schmidt=True).rank == rank


@quick
@given(st.integers(2, 24), st.data())
def test_padding_changes_nothing(width: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, width))
    more = data.draw(st.integers(0, (width - rank) // 2))
    torch.manual_seed(data.draw(seeds))
    vectors, weight = torch.randn(width, rank, dtype=torch.float64), torch.randn(3, width, dtype=torch.float64)
    padded = pad_pairs(vectors, rank + 2 * more)
    assert padded.shape == (width, rank + 2 * more)
    assert torch.equal(padded[:, :rank], vectors)
    assert relative(reflect_weight(weight, padded), reflect_weight(weight, vectors)) < 1e-12


def test_padding_that_cannot_be() -> None:
    vectors = torch.ones(6, 2)
    for rank in (1, 3, 5, 0):
        with pytest.raises(ValueError, match=f"2 reflections cannot be padded by pairs to {rank}"):
            pad_pairs(vectors, rank)
    with pytest.raises(TargetError, match="rank 8 on a layer of width 6"):
        pad_pairs(vectors, 8)
