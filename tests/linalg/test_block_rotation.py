"""OFT: Cayley maps against their closed forms, block rotations against dense products, angles against known ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import relative
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg import (
    BlockRotation,
    Rescale,
    cayley,
    cayley_neumann,
    diag_oft,
    limit_skew,
    orthogonality_defect,
    plane_angles,
    skew_from_upper,
    skew_part,
)

quick = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**20)
sizes = st.integers(1, 7)
counts = st.integers(1, 4)


def draw_skew(count: int, size: int, seed: int, spread: float = 1.0) -> Tensor:
    torch.manual_seed(seed)
    return skew_from_upper(spread * torch.randn(count, size * (size - 1) // 2, dtype=torch.float64), size)


@quick
@given(counts, sizes, seeds)
def test_cayley_is_the_written_quotient_and_special_orthogonal(count: int, size: int, seed: int) -> None:
    skew = draw_skew(count, size, seed)
    eye = torch.eye(size, dtype=torch.float64)
    assert torch.equal(skew, -skew.mT)
    rotation = cayley(skew)
    assert relative(rotation, (eye - skew) @ torch.linalg.inv(eye + skew)) < 1e-10
    assert orthogonality_defect(rotation) < 1e-12
    assert torch.linalg.det(rotation).tolist() == pytest.approx([1.0] * count)
    assert relative(cayley(-skew), rotation.mT) < 1e-12
    # kohya stores B with Q = B - B^T, and turns by the inverse of what PEFT makes of the same Q
    assert relative(diag_oft(torch.triu(skew)), rotation.mT) < 1e-12


@quick
@given(counts, st.integers(2, 6), seeds, st.integers(3, 9))
def test_the_neumann_series_approaches_the_opposite_rotation(count: int, size: int, seed: int, terms: int) -> None:
    skew = draw_skew(count, size, seed)
    skew = 0.2 * skew / torch.linalg.matrix_norm(skew, ord=2, keepdim=True).clamp_min(1e-9)
    series, opposite = cayley_neumann(skew, terms), cayley(-skew)
    bound = 2 * 0.2 ** max(terms - 1, 3) * size
    assert float((series - opposite).abs().max()) < bound
    assert float((cayley_neumann(skew, 30) - opposite).abs().max()) < 1e-12
    assert float((series - cayley(skew)).norm()) > 0.1  # never the exact form's own direction


def test_the_neumann_series_is_written_out_as_peft_does() -> None:
    q = draw_skew(2, 4, 0)
    eye = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    cube, fourth = q @ q @ q, q @ q @ q @ q
    assert torch.equal(cayley_neumann(q, 1), eye)
    assert relative(cayley_neumann(q, 2), eye + 2 * q) < 1e-14
    assert relative(cayley_neumann(q, 3), eye + 2 * q + 2 * q @ q + cube) < 1e-14
    assert torch.equal(cayley_neumann(q, 3), cayley_neumann(q, 4))
    assert relative(cayley_neumann(q, 5), eye + 2 * q + 2 * q @ q + 2 * cube + fourth) < 1e-14
    with pytest.raises(ValueError, match="found 0"):
        cayley_neumann(q, 0)


@quick
@given(counts, sizes, seeds, st.integers(1, 9), st.booleans())
def test_block_rotations_are_dense_products(count: int, size: int, seed: int, other: int, shared: bool) -> None:
    blocks = cayley(draw_skew(1 if shared else count, size, seed))
    dense = torch.block_diag(*(blocks.expand(count, size, size)))
    weight = torch.randn(other, count * size, dtype=torch.float64)
    right = BlockRotation(blocks, shared=shared)
    left = BlockRotation(blocks, side="output", shared=shared)
    assert relative(right.apply(weight), weight @ dense.T) < 1e-12
    assert relative(left.apply(weight.T), dense.T @ weight.T) < 1e-12
    for start in range(0, count * size, size):
        assert torch.equal(
            left.apply(weight.T[start : start + size], start), left.apply(weight.T)[start : start + size]
        )


def test_kohya_rotates_output_rows_by_its_einsum() -> None:
    torch.manual_seed(0)
    stored, weight = torch.randn(3, 4, 4, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
    q = stored - stored.mT
    q = q * 0.6 / q.norm()  # constraint alpha * out = 0.05 * 12
    eye = torch.eye(4, dtype=torch.float64)
    rotation = (eye + q) @ torch.linalg.inv(eye - q)
    expected = torch.einsum("knm,knp->kmp", rotation, weight.reshape(3, 4, 5)).reshape(12, 5)
    operator = BlockRotation(diag_oft(stored, limit=0.05 * 12), side="output")
    assert relative(operator.apply(weight), expected) < 1e-12
    unbounded = BlockRotation(diag_oft(stored), side="output").apply(weight)
    assert relative(unbounded, expected) > 0.1
    assert relative(BlockRotation(diag_oft(stored, limit=0.0), side="output").apply(weight), weight) < 1e-12


def test_limits() -> None:
    skew = torch.stack([draw_skew(1, 4, 1)[0], 1e-3 * draw_skew(1, 4, 2)[0], torch.zeros(4, 4)])
    each = limit_skew(skew, 0.3, each=True)
    assert float(each[0].norm()) == pytest.approx(0.3 / 3**0.5)
    assert torch.equal(each[1:], skew[1:])
    together = limit_skew(skew, 0.3, each=False)
    assert float(together.norm()) == pytest.approx(0.3)
    assert relative(together / together.norm(), skew / skew.norm()) < 1e-12
    assert torch.equal(limit_skew(skew, 1e3, each=False), skew)
    assert torch.equal(limit_skew(torch.zeros(2, 4, 4), 0.0, each=True), torch.zeros(2, 4, 4))


def rotation_by(angles: list[float], fixed: int, flipped: int, seed: int) -> Tensor:
    """A random orthogonal matrix that turns planes by given angles, keeps some directions, reflects others."""
    parts = [
        torch.tensor([[torch.tensor(a).cos(), -torch.tensor(a).sin()], [torch.tensor(a).sin(), torch.tensor(a).cos()]])
        for a in angles
    ]
    core = torch.block_diag(*parts, torch.eye(fixed), -torch.eye(flipped)).double()
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(*core.shape, dtype=torch.float64)).Q
    return basis @ core @ basis.T


@pytest.mark.parametrize(
    ("turns", "fixed", "flipped", "expected"),
    [
        ([], 3, 0, [0.0]),
        ([], 0, 1, [torch.pi]),
        ([], 1, 1, [torch.pi]),
        ([], 0, 2, [torch.pi]),
        ([], 0, 3, [torch.pi, torch.pi]),
        ([0.3], 0, 0, [0.3]),
        ([0.3], 1, 0, [0.3]),
        ([0.3], 0, 1, [torch.pi, 0.3]),
        ([0.3], 1, 1, [torch.pi, 0.3]),
        ([0.3], 0, 2, [torch.pi, 0.3]),
        ([1.2, 0.3, 0.3], 0, 0, [1.2, 0.3, 0.3]),
        ([1.2, 0.3], 1, 3, [torch.pi, torch.pi, 1.2, 0.3]),
        ([1.2, 0.3], 3, 0, [1.2, 0.3, 0.0]),
    ],
)
def test_plane_angles_of_known_rotations(turns: list[float], fixed: int, flipped: int, expected: list[float]) -> None:
    found = plane_angles(rotation_by(turns, fixed, flipped, seed=fixed + 7 * flipped)[None])
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_plane_angles_of_many_blocks_are_sorted_together() -> None:
    blocks = torch.stack([rotation_by([0.1], 1, 0, 0), rotation_by([0.7], 0, 1, 1), rotation_by([0.4], 1, 0, 2)])
    assert plane_angles(blocks).tolist() == pytest.approx([torch.pi, 0.7, 0.4, 0.1], abs=1e-6)
    assert plane_angles(torch.zeros(2, 0, 0)).shape == (0,)


def test_a_stretching_series_has_no_angles() -> None:
    gentle, strong = (draw_skew(2, 6, 3, spread) for spread in (0.02, 0.3))
    near, far = BlockRotation(cayley_neumann(gentle)), BlockRotation(cayley_neumann(strong))
    assert orthogonality_defect(near.blocks) < 1e-2 < orthogonality_defect(far.blocks)
    assert far.angles() is None
    found, exact = near.angles(), BlockRotation(cayley(-gentle)).angles()
    assert found is not None
    assert exact is not None
    assert relative(found, exact) < 1e-3
    assert BlockRotation(cayley(strong)).angles() is not None


def test_inverse_of_a_series_is_exact_though_it_is_no_rotation() -> None:
    torch.manual_seed(0)
    operator, weight = BlockRotation(cayley_neumann(draw_skew(3, 4, 0, 0.3))), torch.randn(5, 12, dtype=torch.float64)
    assert relative(operator.inverse().apply(operator.apply(weight)), weight) < 1e-12
    assert relative(BlockRotation(operator.blocks.mT).apply(operator.apply(weight)), weight) > 1e-2
    singular = BlockRotation(torch.ones(1, 2, 2))
    with pytest.raises(NumericsError, match="singular"):
        singular.inverse()


def test_malformed_blocks_are_refused() -> None:
    with pytest.raises(TargetError, match="expected \\(blocks, 6\\)"):
        skew_from_upper(torch.ones(2, 5), 4)
    for bad in (torch.ones(2, 3), torch.ones(2, 3, 4), torch.ones(1, 2, 3, 3)):
        for build in (skew_part, diag_oft, BlockRotation):
            with pytest.raises(TargetError, match="expected \\(blocks, b, b\\)"):
                build(bad)
    with pytest.raises(TargetError, match="3 rotation blocks in an adapter that shares one"):
        BlockRotation(torch.eye(2).repeat(3, 1, 1), shared=True)
    with pytest.raises(ValueError, match="'up'"):
        BlockRotation(torch.eye(2)[None], side="up")


def test_a_zero_row_factor_has_no_inverse() -> None:
    with pytest.raises(TargetError, match="zero"):
        Rescale(torch.tensor([1.0, 0.0])).inverse()
