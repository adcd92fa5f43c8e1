"""The rotation between two weights: found where there is one, the best where there is none, never a mirror image."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import chain, golden, relative
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg import Householder, LowRankRotation
from ortho_cli.linalg.procrustes import extract_rotation, nearest_rotation

quick = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**20)
BOTH = [torch.float64, torch.float32]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def trained(width: int, rank: int, amount: float = 0.3, seed: int = 0) -> Tensor:
    """Vectors as training leaves them: pairs that have moved apart."""
    pairs = draw(width, rank // 2, seed=seed).repeat_interleave(2, dim=1)
    return pairs + amount * draw(width, rank, seed=seed + 1)


def dense(rotation: LowRankRotation) -> Tensor:
    return rotation.apply(torch.eye(rotation.basis.shape[0], dtype=torch.float64))


def left(start: Tensor, end: Tensor, rotation: LowRankRotation) -> float:
    """How much of the change is left, squared, as a share."""
    return float((end - rotation.to(end.dtype).apply(start)).norm() / (end - start).norm()) ** 2


class TestNearestRotation:
    @quick
    @given(st.integers(1, 8), st.integers(0, 6), seeds)
    def test_is_a_rotation_and_none_is_nearer(self, size: int, more: int, seed: int) -> None:
        before, after = draw(size + more, size, seed=seed), draw(size + more, size, seed=seed + 1)
        found = nearest_rotation(before, after)
        assert relative(found.T @ found, torch.eye(size)) < 1e-12
        assert float(torch.linalg.det(found)) == pytest.approx(1, abs=1e-10)
        best = float((before @ found - after).norm())
        for trial in range(5):
            skew = 0.1 * draw(size, size, seed=seed + 2 + trial)
            other = found @ torch.linalg.matrix_exp(skew - skew.T)
            assert float((before @ other - after).norm()) >= best - 1e-9

    def test_a_mirror_image_is_met_by_the_nearest_rotation(self) -> None:
        """The weakest direction pays for the determinant."""
        before = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        assert torch.allclose(nearest_rotation(before, -before).det(), torch.tensor(1.0).double())
        after = before * torch.tensor([1.0, 1.0, -1.0])
        assert torch.allclose(nearest_rotation(before, after), torch.eye(3).double(), atol=1e-12)

    def test_directions_that_are_not_there_do_not_turn(self) -> None:
        turn = torch.linalg.matrix_exp(torch.tensor([[0.0, -0.4], [0.4, 0.0]]).double())
        before = draw(6, 5)
        before[:, 2:] = 0
        after = before.clone()
        after[:, :2] = before[:, :2] @ turn
        found = nearest_rotation(before, after)
        assert relative(found, torch.block_diag(turn, torch.eye(3).double())) < 1e-12


class TestExactRecovery:
    @pytest.mark.parametrize("dtype", BOTH)
    @pytest.mark.parametrize("shape", [(40, 24), (24, 40), (16, 16), (8, 100), (300, 200), (200, 300)])
    def test_of_a_known_adapter(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        vectors = trained(shape[1], 8)
        start = draw(*shape, seed=3).to(dtype)
        end = Householder(vectors.to(dtype)).apply(start)
        found = extract_rotation(start, end - start, 8)
        limit = 1e-10 if dtype == torch.float64 else 1e-5
        assert relative(dense(found), chain(vectors)) < limit
        assert found.dtype == dtype
        assert relative(found.apply(start), end) < limit / 10
        written = Householder(found.reflections())
        assert written.rank == 8
        assert relative(written.apply(start.double()), end) < limit

    @quick
    @given(st.integers(2, 24), st.integers(4, 24), st.integers(1, 3), st.floats(1e-3, 1.5), seeds)
    def test_of_any_shape_and_size(self, rows: int, cols: int, planes: int, amount: float, seed: int) -> None:
        rank = min(2 * planes, rows // 2 * 2, cols // 2 * 2)
        start = draw(rows, cols, seed=seed)
        end = Householder(trained(cols, rank, amount, seed)).apply(start)
        found = extract_rotation(start, end - start, rank)
        assert relative(found.apply(start), end) < 1e-9

    @quick
    @given(st.integers(1, 7), st.integers(8, 24), st.integers(1, 4), seeds)
    def test_of_fewer_outputs_than_reflections(self, rows: int, cols: int, planes: int, seed: int) -> None:
        """Of one row the change shows one direction of the plane it turns in."""
        start = draw(rows, cols, seed=seed)
        end = Householder(draw(cols, 2 * planes, seed=seed + 1)).apply(start)
        found = extract_rotation(start, end - start, 2 * planes)
        assert found.rank <= 2 * planes
        assert relative(found.apply(start), end) < 1e-7

    def test_of_one_row_the_angle_is_the_smallest(self) -> None:
        start = torch.eye(64, dtype=torch.float64)[:1]
        end = start.roll(3, dims=1)
        assert extract_rotation(start, end - start, 8).angles().tolist() == pytest.approx([torch.pi / 2])
        still = extract_rotation(start, start, 8)  # twice as long: nothing turned
        assert still.reflections().shape[1] == 0

    def test_of_the_golden_adapter(self) -> None:
        start = draw(20, 12)
        found = extract_rotation(start, Householder(golden(12, 4, 0)).apply(start) - start, 4)
        assert found.angles().tolist() == pytest.approx([0.183630304343, 0.041325982067], abs=1e-10)

    def test_of_a_small_angle_beside_a_large_one(self) -> None:
        """A thousandth of the large turn: what float32 products cannot see at the first look."""
        columns = torch.linalg.qr(draw(256, 4)).Q
        core = torch.block_diag(*(_turn(angle) for angle in (1.0, 5e-4)))
        start = draw(300, 256, seed=1).float()
        end = LowRankRotation(columns, core, dtype=torch.float64).apply(start.double()).float()
        found = extract_rotation(start, end - start, 4)
        assert found.angles().tolist() == pytest.approx([1.0, 5e-4], rel=1e-3)
        assert relative(found.apply(start), end) < 3e-7

    def test_of_an_ill_conditioned_weight(self) -> None:
        """Singular values over eight decades, and inputs that are dead: no turn is made up where nothing is seen."""
        start = draw(64, 48) * torch.logspace(0, -8, 48, dtype=torch.float64)
        start[:, 40:] = 0
        end = Householder(trained(48, 4)).apply(start)
        found = extract_rotation(start, end - start, 4)
        assert relative(found.apply(start), end) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_weights_give_the_adapter_to_their_rounding(dtype: torch.dtype) -> None:
    start = (0.05 * draw(320, 256)).to(dtype)
    exact = Householder(trained(256, 8, 0.1).float()).apply(start.float())
    end = exact.to(dtype)
    found = extract_rotation(start, end.float() - start.float(), 8)
    assert found.dtype == torch.float32
    rounding = float((end.double() - exact).norm() / exact.norm())
    assert relative(found.apply(start.float()), exact) / relative(end, exact) < 0.5  # most of the noise is left out
    assert float((found.apply(start.float()).to(dtype).double() - end).norm() / exact.norm()) < 2 * rounding


def test_noise_does_not_turn_much() -> None:
    start = draw(200, 150)
    exact = Householder(trained(150, 4)).apply(start)
    noise = draw(200, 150, seed=9)
    noise *= 0.1 * (exact - start).norm() / noise.norm()
    found = extract_rotation(start, exact + noise - start, 4)
    assert left(start, exact + noise, found) < 0.01 + 1e-9  # the noise is a hundredth of the change, squared
    assert relative(found.apply(start), exact) < 0.3 * float(noise.norm() / exact.norm())


def test_planes_are_kept_by_what_they_do_to_the_weight() -> None:
    """Of two planes the one of larger angle lies where the weight is nearly zero; it explains next to nothing."""
    core = torch.block_diag(_turn(0.3), _turn(1.2))
    start = draw(30, 6) * torch.tensor([1.0, 1.0, 1e-3, 1e-3, 1.0, 1.0])
    end = LowRankRotation(torch.eye(6)[:, :4], core, dtype=torch.float64).apply(start)
    found = extract_rotation(start, end - start, 2)
    assert found.angles().tolist() == pytest.approx([0.3], abs=1e-5)
    assert left(start, end, found) < 1e-4


@quick
@given(st.integers(1, 10), st.integers(1, 10), st.integers(2, 6), seeds)
def test_any_change_is_met_by_a_rotation_that_explains_no_less_than_none(
    rows: int, cols: int, reflections: int, seed: int
) -> None:
    start, end = draw(rows, cols, seed=seed), draw(rows, cols, seed=seed + 1)
    found = extract_rotation(start, end - start, reflections)
    assert found.rank <= reflections
    assert float(torch.linalg.det(found.core)) == pytest.approx(1, abs=1e-10)
    assert left(start, end, found) <= 1 + 1e-9
    assert found.reflections().shape[1] % 2 == 0


def test_more_reflections_explain_no_less() -> None:
    start, end = draw(40, 30), draw(40, 30, seed=1)
    shares = [left(start, end, extract_rotation(start, end - start, rank)) for rank in (2, 6, 14, 30)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.6
    best = start @ nearest_rotation(start, end)
    assert shares[-1] == pytest.approx(float((end - best).norm() / (end - start).norm()) ** 2, rel=1e-9)


@pytest.mark.parametrize("dtype", BOTH)
def test_a_rank_above_what_turns_finds_the_same(dtype: torch.dtype) -> None:
    vectors = trained(160, 4)
    start = draw(140, 160).to(dtype)
    end = Householder(vectors.to(dtype)).apply(start)
    found = extract_rotation(start, end - start, 20)
    assert relative(found.apply(start), end) < (1e-12 if dtype == torch.float64 else 1e-6)
    angles = found.angles()
    assert angles[:2].tolist() == pytest.approx(Householder(vectors).rotation().angles().tolist(), rel=1e-4)
    assert float(angles[2:].max()) < 1e-4


@pytest.mark.parametrize("shape", [(5, 5), (200, 160)])
def test_nothing_changed(shape: tuple[int, int]) -> None:
    start = draw(*shape).float()
    found = extract_rotation(start, torch.zeros_like(start), 8)
    assert (found.rank, found.reflections().shape) == (0, (shape[1], 0))
    assert torch.equal(found.apply(start), start)


def test_what_was_zero_cannot_be_turned() -> None:
    found = extract_rotation(torch.zeros(6, 6), draw(6, 6).float(), 4)
    assert torch.equal(dense(found), torch.eye(6, dtype=torch.float64))
    assert found.reflections().shape[1] == 0


def test_refusals() -> None:
    with pytest.raises(TargetError, match=r"\(2, 3\), a change of \(3, 2\): not one layer"):
        extract_rotation(torch.ones(2, 3), torch.ones(3, 2), 2)
    with pytest.raises(TargetError, match="at least two reflections, found 1"):
        extract_rotation(torch.ones(2, 3), torch.ones(2, 3), 1)
    with pytest.raises(TargetError, match="change holds int64"):
        extract_rotation(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64), 2)
    broken = torch.ones(3, 3)
    broken[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="not finite"):
        extract_rotation(torch.ones(3, 3), broken, 2)


def _turn(angle: float) -> Tensor:
    skew = torch.tensor([[0.0, -angle], [angle, 0.0]], dtype=torch.float64)
    rotation: Tensor = torch.linalg.matrix_exp(skew)
    return rotation
