"""Low-rank sums in their joint bases, against the same done to whole weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import relative
from torch import Tensor

from ortho_cli.errors import TargetError
from ortho_cli.linalg.joint_low_rank import dare, join_factors, split, ties


def drawn(count: int, out: int, width: int, rank: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    return [(torch.randn(out, rank).double(), torch.randn(rank, width).double()) for _ in range(count)]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**20))
def test_cores_are_the_products_and_split_gives_them_back(
    count: int, out: int, width: int, rank: int, seed: int
) -> None:
    factors = drawn(count, out, width, rank, seed)
    joint = join_factors(factors)
    for (up, down), core in zip(factors, joint.cores, strict=True):
        assert relative(joint.left @ core @ joint.right, up @ down) < 1e-12
    total = sum(up @ down for up, down in factors)
    up, down, error = split(joint, joint.cores.sum(dim=0))
    assert relative(up @ down, total) < 1e-10
    assert error < 1e-8
    up, down, error = split(joint, joint.cores.sum(dim=0), rank=1)
    values = torch.linalg.svdvals(total)
    assert up.shape[1] == 1
    assert error == pytest.approx(float(values[1:].norm()), abs=1e-9)
    assert float((up @ down - total).norm()) == pytest.approx(error, abs=1e-9)


def test_equal_adapters_share_their_bases() -> None:
    factors = drawn(1, 8, 7, 2, 0) * 3
    joint = join_factors(factors)
    assert joint.cores.shape == (3, 2, 2)
    merged = ties(joint.cores, [1.0, 1.0, 1.0], density=1.0)
    assert relative(merged, joint.cores[0]) < 1e-12, "the mean of equals is each of them"


def test_ties_by_hand() -> None:
    cores = torch.tensor([[[4.0, -1.0, 0.5]], [[2.0, 3.0, 0.1]], [[-9.0, 0.2, 0.3]]])
    # kept: (4, -1), (2, 3), (-9, 0.3); sums -3, 2, 0.3: signs -, +, +
    assert ties(cores, [1, 1, 1], density=2 / 3).flatten().tolist() == pytest.approx([-9.0, 3.0, 0.3])
    assert ties(cores, [1, 1, 0.1], density=2 / 3).flatten().tolist() == pytest.approx([3.0, 3.0, 0.03])


def test_dare_keeps_the_expectation() -> None:
    cores = torch.ones(2, 40, 50)
    draws = torch.stack([dare(cores, [1.0, 2.0], 0.4, seed) for seed in range(20)])
    assert float(draws.mean()) == pytest.approx(3.0, abs=0.03)
    assert torch.equal(dare(cores, [1.0, 2.0], 0.4, 7), draws[7])
    assert draws.unique().tolist() == pytest.approx([0.0, 2.5, 5.0, 7.5])


def test_other_shapes_are_refused() -> None:
    with pytest.raises(TargetError, match=r"\(3, 4\) and \(3, 5\)"):
        join_factors([(torch.ones(3, 1), torch.ones(1, 4)), (torch.ones(3, 1), torch.ones(1, 5))])
