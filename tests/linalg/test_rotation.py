"""Rotations of a few directions: golden numbers, laws over shapes and degenerate spans, hard angles."""

from __future__ import annotations

from math import pi

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import chain, golden, relative
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg import (
    Householder,
    LowRankRotation,
    find_planes,
    orthogonality_defect,
    orthonormal_start,
    rotation_logs,
)

quick = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**20)
alphas = st.floats(-2, 2)
EYE12 = torch.eye(12, dtype=torch.float64)


def dense(rotation: LowRankRotation) -> Tensor:
    return rotation.apply(torch.eye(rotation.basis.shape[0], dtype=torch.float64))


def turns(angles: list[float], seed: int = 0, mirrored: int = 0) -> Tensor:
    """An orthogonal matrix of given angles in random planes, with one direction left over."""
    size = 2 * len(angles) + 1 + mirrored
    skew = torch.zeros(size, size, dtype=torch.float64)
    for plane, angle in enumerate(angles):
        skew[2 * plane + 1, 2 * plane] = angle
    core = torch.linalg.matrix_exp(skew - skew.T)
    core.diagonal()[size - mirrored :] = -1
    turned = torch.linalg.qr(
        torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    )
    return turned.Q @ core @ turned.Q.T


def test_golden_rotation_and_its_power() -> None:
    first, second = (Householder(golden(12, 4, phase)).rotation() for phase in (0, 1))
    assert relative(dense(first), chain(golden(12, 4, 0))) < 1e-13
    assert first.angles().tolist() == pytest.approx([0.183630304343, 0.041325982067], abs=1e-11)
    assert second.angles().tolist() == pytest.approx([0.168598864966, 0.037677734177], abs=1e-11)
    assert float(dense(first).trace()) == pytest.approx(11.964666964837, abs=1e-11)
    assert float(dense(second).trace()) == pytest.approx(11.970222249698, abs=1e-11)
    assert float((dense(first) - EYE12).norm()) == pytest.approx(0.265830905512, abs=1e-11)
    row = [0.992971362797, 0.028261689773, 0.046446873579, 0.032580886418]
    assert dense(first)[0, :4].tolist() == pytest.approx(row, abs=1e-11)
    part = dense(first.power(0.3))
    assert float(part.trace()) == pytest.approx(11.996812256104, abs=1e-11)
    row = [0.999365819841, 0.009610966727, 0.014198756692, 0.009358336757]
    assert part[0, :4].tolist() == pytest.approx(row, abs=1e-11)


@quick
@given(st.integers(2, 9), st.integers(1, 4), seeds, alphas, alphas, st.sampled_from(["input", "output"]))
def test_powers_add_up_and_keep_singular_values(
    width: int, half: int, seed: int, one: float, other: float, side: str
) -> None:
    torch.manual_seed(seed)
    vectors = torch.randn(width, min(2 * half, width - width % 2), dtype=torch.float64)
    rotation = Householder(vectors, side=side).rotation()
    assert orthogonality_defect(rotation.core[None]) < 1e-10
    weight = torch.randn(width, width, dtype=torch.float64)
    once = rotation.power(one).apply(weight)
    both = rotation.power(other).apply(once)
    assert relative(both, rotation.power(one + other).apply(weight)) < 1e-10
    assert relative(torch.linalg.svdvals(once), torch.linalg.svdvals(weight)) < 1e-10
    assert relative(rotation.inverse().apply(rotation.apply(weight)), weight) < 1e-12
    assert relative(rotation.power(one + 1e-9).apply(weight), once) < 1e-7, "strength is continuous"


@quick
@given(st.integers(3, 9), st.integers(1, 4), seeds)
def test_reflections_make_the_same_rotation(width: int, half: int, seed: int) -> None:
    torch.manual_seed(seed)
    vectors = torch.randn(width, min(2 * half, width - width % 2), dtype=torch.float64)
    rotation = Householder(vectors).rotation()
    columns = rotation.reflections()
    assert columns.shape[1] % 2 == 0
    assert columns.shape[1] <= vectors.shape[1]
    assert relative(chain(columns), dense(rotation)) < 1e-12
    for kept in range(0, columns.shape[1] + 1):
        less, error = rotation.truncate(kept)
        assert less.reflections().shape[1] <= kept
        assert float((dense(less) - dense(rotation)).norm()) == pytest.approx(error, abs=1e-12)


def test_an_odd_chain_keeps_its_mirror_and_has_no_strength() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(7, 3, dtype=torch.float64)
    rotation = Householder(vectors).rotation()
    assert relative(chain(rotation.reflections()), chain(vectors)) < 1e-12
    assert rotation.reflections().shape[1] == 3
    with pytest.raises(TargetError, match="odd number of reflections"):
        rotation.power(0.5)
    less, error = rotation.truncate(0)
    assert float((dense(rotation) - dense(less)).norm()) == pytest.approx(error)


def test_paired_starts_and_equal_reflections_turn_nothing() -> None:
    torch.manual_seed(0)
    start = torch.randn(6, 2).repeat_interleave(2, dim=1)
    rotation = Householder(start).rotation()
    assert rotation.rank == 2
    assert relative(dense(rotation.power(0.3)), torch.eye(6)) < 1e-12


def test_half_turns_are_paired_the_same_way_each_time() -> None:
    adapter = Householder(orthonormal_start(9, 4), gram_schmidt=True).rotation()
    assert adapter.planes().half_turns == 2
    half = adapter.power(0.5)
    assert relative(dense(half) @ dense(half), dense(adapter)) < 1e-6
    assert relative(dense(half).T @ dense(half), torch.eye(9)) < 1e-10
    assert torch.equal(dense(adapter.power(0.5)), dense(half))
    with pytest.raises(NumericsError, match="half a turn apart"):
        rotation_logs(adapter.core[None])


@pytest.mark.parametrize(
    "angles",
    [
        [1e-14, 1e-9, 1e-4, 1.0], [0.3, 0.3, 0.3], [pi - 1e-13, pi - 1e-9, pi - 1e-5], [pi, pi, 0.2], [0.7, pi - 0.7],
        [pi / 2, pi / 2 + 1e-12, pi / 2 - 1e-12],
    ],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(4))
def test_hard_angles_are_found_and_rebuilt(angles: list[float], seed: int) -> None:
    core = turns(angles, seed)
    found = find_planes(core)
    expected = torch.tensor(sorted(angles, reverse=True), dtype=torch.float64)
    found_angles = torch.zeros(len(angles), dtype=torch.float64)
    found_angles[: len(found.angles)] = found.angles
    assert float((found_angles - expected).abs().max()) < 1e-13
    assert relative(found.matrix(found.angles, found.lengths, found.factors), core) < 1e-13
    third = found.power(1 / 3)
    assert relative(third @ third @ third, core) < 1e-13
    assert orthogonality_defect(third[None]) < 1e-13
    assert relative(torch.linalg.matrix_exp(found.log()), core) < 1e-12
    assert relative(found.log(), -found.log().T) == 0
    if max(angles) < pi - 1e-6:
        assert relative(rotation_logs(core[None])[0], found.log()) < 1e-12


def test_what_is_no_rotation_is_refused() -> None:
    with pytest.raises(NumericsError, match="Schur form is off by"):
        find_planes(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    with pytest.raises(NumericsError, match="not finite"):
        find_planes(torch.tensor([[float("nan")]]))
    with pytest.raises(TargetError, match="odd number"):
        rotation_logs(turns([0.4], mirrored=1)[None])
    with pytest.raises(TargetError, match="not orthogonal"):
        Householder(torch.ones(3, 2), eps=0.1).rotation()
    assert find_planes(torch.zeros(0, 0)).power(0.5).shape == (0, 0)
