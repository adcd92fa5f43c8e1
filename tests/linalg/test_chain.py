"""Operators made of operators: `Chain` and `Transposed`. What they share with other kinds is in test_operators.py."""

from __future__ import annotations

import pytest
import torch
from naive import relative
from torch import Tensor

from ortho_cli.errors import TargetError
from ortho_cli.linalg import BlockRotation, Chain, Householder, LowRank, Rescale, Transposed

OUT, IN = 12, 18


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def test_a_chain_applies_in_order_and_flattens() -> None:
    torch.manual_seed(0)
    turn, add, weight = Householder(randn(6, 2)), LowRank(randn(4, 1), randn(1, 6)), randn(4, 6)
    expected = add.apply(turn.apply(weight))
    assert torch.equal(Chain((turn, add)).apply(weight), expected)
    nested = Chain((Chain((turn,)), Chain((add, turn.inverse()))))
    assert [o.kind for o in nested.operators] == ["hra", "lora", "hra"]
    assert relative(nested.apply(weight), turn.inverse().apply(expected)) < 1e-6
    assert relative(Chain((add, turn)).apply(weight), expected) > 1e-2
    angles, alone = turn.angles(), Chain((turn,)).angles()
    assert angles is not None
    assert alone is not None
    assert torch.equal(angles, alone)


def test_a_chain_takes_blocks_that_suit_all_its_parts() -> None:
    by_two = BlockRotation(torch.eye(2).repeat(6, 1, 1), side="output")
    by_three = BlockRotation(torch.eye(3).repeat(4, 1, 1), side="output")
    rows = Rescale(torch.ones(12))
    assert Chain((rows,)).row_multiple == 1
    assert Chain((by_two, rows, by_three)).row_multiple == 6
    assert Chain((by_two, Householder(torch.ones(12, 1), side="output"))).row_multiple == 0


def test_chains_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Chain(())
    with pytest.raises(TargetError, match=r"different width \(5 and 6\)"):
        Chain((Householder(torch.ones(5, 1)), Householder(torch.ones(6, 1))))
    with pytest.raises(TargetError, match="full rank"):
        Chain((Rescale(torch.ones(2)), LowRank(torch.ones(2, 1), torch.ones(1, 2)))).as_low_rank(torch.eye(2))


def test_transposed_is_the_operator_on_the_true_weight() -> None:
    torch.manual_seed(1)
    stored = randn(OUT, IN)  # a GPT-2 layer with IN outputs and OUT inputs
    for inner in (Householder(randn(OUT, 3)), Householder(randn(IN, 3), side="output"), Rescale(torch.rand(IN) + 1)):
        assert torch.equal(Transposed(inner).apply(stored), inner.apply(stored.T).T)
        assert Transposed(inner).shape == (inner.shape[1], inner.shape[0])
