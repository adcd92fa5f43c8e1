"""The HRA operator: golden numbers, angles, options. The laws it shares with other kinds are in test_operators.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import chain, golden, relative

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg import Householder, orthonormal_start, paired_start

quick = settings(deadline=None, max_examples=30)
eye12 = torch.eye(12, dtype=torch.float64)


def test_golden_numbers() -> None:
    first, second = Householder(golden(12, 4, 0)), Householder(golden(12, 4, 1))
    d1, d2 = first.apply(eye12), second.apply(eye12)
    angles = [operator.angles() for operator in (first, second)]
    for found, expected in zip(
        angles, ([0.183630304343, 0.041325982067], [0.168598864966, 0.037677734177]), strict=True
    ):
        assert found is not None
        assert found.tolist() == pytest.approx(expected, abs=1e-11)
    assert float(d1.trace()) == pytest.approx(11.964666964837, abs=1e-11)
    assert float(d2.trace()) == pytest.approx(11.970222249698, abs=1e-11)
    assert float((d1 - eye12).norm()) == pytest.approx(0.265830905512, abs=1e-11)
    assert d1[0, :4].tolist() == pytest.approx(
        [0.992971362797, 0.028261689773, 0.046446873579, 0.032580886418], abs=1e-11
    )
    assert float((d1 @ d2).trace()) == pytest.approx(11.930632726197, abs=1e-11)


@quick
@given(st.integers(1, 20), st.data())
def test_angles_are_those_of_the_dense_matrix(width: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, width))
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    vectors = torch.randn(width, rank, dtype=torch.float64)
    angles = Householder(vectors).angles()
    assert angles is not None
    # trace and Frobenius distance of a product with these planes, all others fixed; a lone -1 for an odd rank
    dense = chain(vectors)
    lone = rank % 2
    planes = angles[lone:] if lone else angles
    if lone:
        assert float(angles[0]) == pytest.approx(torch.pi, abs=1e-7)
    trace = width - 2 * len(planes) - 2 * lone + 2 * float(planes.cos().sum())
    assert float(dense.trace()) == pytest.approx(trace, abs=1e-9)
    eigenvalues = torch.linalg.eigvals(dense)
    unmoved = torch.ones(width - 2 * len(planes) - lone, dtype=torch.complex128)
    moved = torch.polar(torch.ones_like(planes), planes)
    expected = torch.cat([unmoved, moved, moved.conj(), -torch.ones(lone, dtype=torch.complex128)])
    for value in expected:
        assert float((eigenvalues - value).abs().min()) < 1e-6


def test_angles_of_special_chains() -> None:
    torch.manual_seed(0)
    identity = Householder(paired_start(64, 8)).angles()
    assert identity is not None
    assert float(identity.max()) < 1e-12
    odd = Householder(paired_start(64, 8)[:, :7]).angles()
    assert odd is not None
    assert odd[0] == torch.pi
    assert float(odd[1:].max()) < 1e-12
    flips = Householder(orthonormal_start(64, 5), gram_schmidt=True).angles()
    assert flips is not None
    assert flips.tolist() == pytest.approx([torch.pi] * 3)  # two half turns and a bare reflection
    quarter = Householder(torch.tensor([[1.0, 1.0], [0.0, 1.0]])).angles()
    assert quarter is not None
    assert quarter.tolist() == pytest.approx([torch.pi / 2])  # twice the angle between the two mirrors' normals
    assert Householder(torch.ones(4, 2), eps=0.1).angles() is None


def test_inverse_of_plain_chains_is_the_reversed_chain() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(9, 4)
    assert torch.equal(Householder(vectors).inverse().vectors, vectors.flip(1))
    flips = Householder(vectors, gram_schmidt=True)
    assert flips.inverse() is flips
    weight = torch.randn(3, 9)
    assert relative(flips.apply(flips.apply(weight)), weight) < 1e-6


def test_gram_schmidt_merges_what_the_span_says() -> None:
    torch.manual_seed(1)
    vectors, weight = torch.randn(10, 3, dtype=torch.float64), torch.randn(4, 10, dtype=torch.float64)
    mixed = vectors @ torch.randn(3, 3, dtype=torch.float64)
    first, second = (Householder(v, gram_schmidt=True).apply(weight) for v in (vectors, mixed))
    assert relative(first, second) < 1e-10
    assert relative(first, weight @ (torch.eye(10) - 2 * vectors @ torch.linalg.pinv(vectors))) < 1e-10


def test_low_rank_factors_do_not_depend_on_the_base_on_the_input_side() -> None:
    torch.manual_seed(2)
    operator = Householder(torch.randn(8, 3))
    _, first = operator.as_low_rank(torch.randn(5, 8))
    _, second = operator.as_low_rank(torch.randn(6, 8))
    assert torch.equal(first, second)
    assert relative(first.norm(dim=1), torch.ones(3)) < 1e-6


@pytest.mark.parametrize("vectors", [torch.ones(4, 5), torch.ones(4, 0), torch.ones(4)])
def test_impossible_vectors_are_refused(vectors: torch.Tensor) -> None:
    with pytest.raises(TargetError, match="1 <= rank <= width"):
        Householder(vectors)


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="eps must be 0"):
        Householder(torch.ones(4, 1), eps=0.1, gram_schmidt=True)
    with pytest.raises(ValueError, match="'both'"):
        Householder(torch.ones(4, 1), side="both")
    with pytest.raises(NumericsError, match="2 reflection vectors span 1 direction"):
        Householder(torch.ones(4, 2), gram_schmidt=True)
    with pytest.raises(NumericsError, match="vector 0 of 2 is zero"):
        Householder(torch.zeros(4, 2))
