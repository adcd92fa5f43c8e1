"""Combining rotations in their joint span: golden numbers, dense references, and where there is no answer."""

from __future__ import annotations

from math import pi

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import chain, golden, relative
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg import Householder, LowRankRotation, orthogonality_defect, orthonormal_start, rotation_logs
from ortho_cli.linalg.joint_rotation import (
    JointSpan,
    compose,
    grassmann_mean,
    join,
    karcher_mean,
    log_mean,
    order_effect,
    orthomerge,
    restore_angles,
    slerp,
)

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**20)
HALVES = [0.5, 0.5]


def dense(span: JointSpan, core: Tensor) -> Tensor:
    return LowRankRotation(span.basis, core).apply(torch.eye(span.basis.shape[0], dtype=torch.float64))


def drawn(count: int, width: int, rank: int, seed: int, spread: float = 0.1) -> list[LowRankRotation]:
    """Rotations by moderate angles: each pair of reflections is `spread` apart."""
    torch.manual_seed(seed)
    first = torch.randn(count, width, rank // 2, dtype=torch.float64)
    second = first + spread * torch.randn_like(first)
    return [Householder(torch.stack([a, b], dim=2).flatten(1)).rotation() for a, b in zip(first, second, strict=True)]


def plane(angle: float) -> Tensor:
    turn = torch.tensor([[0.0, -angle], [angle, 0.0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(turn)


@pytest.fixture(scope="module")
def pair() -> JointSpan:
    return join([Householder(golden(12, 4, phase)).rotation() for phase in (0, 1)])


def test_golden_numbers(pair: JointSpan) -> None:
    assert pair.basis.shape == (12, 6)
    cores = pair.cores
    product = dense(pair, compose(cores, [1, 1]))
    assert float(product.trace()) == pytest.approx(11.930632726197, abs=1e-11)
    assert relative(product, chain(golden(12, 4, 0)) @ chain(golden(12, 4, 1))) < 1e-13
    expected = {
        log_mean: (11.982561689479, [0.995759086263, 0.029826648221, 0.039629206163]),
        karcher_mean: (11.982519986532, [0.995748732015, 0.029853333864, 0.039669149077]),
        orthomerge: (11.967526179528, [0.992102947169, 0.039442676998, 0.054125708490]),
    }
    for mean, (trace, row) in expected.items():
        found = dense(pair, mean(cores, HALVES))
        assert float(found.trace()) == pytest.approx(trace, abs=1e-10)
        assert found[0, :3].tolist() == pytest.approx(row, abs=1e-10)
    mean = LowRankRotation(pair.basis, log_mean(cores, HALVES))
    columns = mean.reflections()
    assert columns.shape == (12, 6)
    assert relative(chain(columns), dense(pair, mean.core)) < 4e-13


@quick
@given(st.integers(1, 4), st.integers(3, 9), st.sampled_from([2, 4]), seeds)
def test_laws_of_every_mode(count: int, width: int, rank: int, seed: int) -> None:
    rank = min(rank, width - width % 2)
    parts = drawn(count, width, rank, seed)
    span = join(parts)
    assert orthogonality_defect(span.cores) < 1e-10
    for part, core in zip(parts, span.cores, strict=True):
        assert relative(dense(span, core), part.apply(torch.eye(width, dtype=torch.float64))) < 1e-10
    shares = [1 / count] * count
    product = torch.eye(width, dtype=torch.float64)
    for part in parts:
        product = part.apply(product)
    assert relative(dense(span, compose(span.cores, [1.0] * count)), product) < 1e-10
    mean = karcher_mean(span.cores, shares)
    turned = parts[0]
    for found in (mean, log_mean(span.cores, shares), orthomerge(span.cores, shares)):
        assert orthogonality_defect(found[None]) < 1e-10
        assert float(torch.linalg.det(found)) == pytest.approx(1)
    again = join([LowRankRotation(span.basis, mean @ core) for core in span.cores])
    centre = karcher_mean(again.cores, shares)
    assert relative(dense(again, centre), dense(span, mean @ mean)) < 1e-9, "a mean turns with its parts"
    alike = join([turned, turned])
    for merge in (karcher_mean, log_mean, orthomerge):
        assert relative(dense(alike, merge(alike.cores, HALVES)), dense(alike, alike.cores[0])) < 1e-10
    assert relative(dense(alike, compose(alike.cores, [0.5, 0.5])), dense(alike, alike.cores[0])) < 1e-10


def test_two_rotations_meet_on_the_path_between_them(pair: JointSpan) -> None:
    first, second = pair.cores
    assert relative(slerp(first, second, 0.5), karcher_mean(pair.cores, HALVES)) < 1e-11
    assert relative(slerp(first, second, 0.3), karcher_mean(pair.cores, [0.7, 0.3])) < 1e-11
    assert relative(slerp(first, second, 0), first) < 1e-13
    assert relative(slerp(first, second, 1), second) < 1e-13
    short = slerp(first, second, 0.5)
    restored = restore_angles(short, pair.cores, HALVES)
    norms = [float(LowRankRotation(pair.basis, core).angles().norm()) for core in (first, second, short, restored)]
    assert norms[2] < min(norms[:2])
    assert norms[3] == pytest.approx((norms[0] + norms[1]) / 2)


def test_a_mean_near_half_a_turn_is_the_near_one_and_an_ambiguous_one_is_refused() -> None:
    near = torch.stack([plane(0.9 * pi), plane(-0.9 * pi)])
    assert relative(karcher_mean(near, HALVES), plane(pi)) < 1e-9
    opposite = torch.stack([plane(pi / 2), plane(-pi / 2)])
    for mean in (karcher_mean, lambda cores, _: slerp(cores[0], cores[1], 0.5)):
        with pytest.raises(NumericsError, match="half a turn apart"):
            mean(opposite, HALVES)
    spread = torch.stack([plane(0.0), plane(2 * pi / 3), plane(-2 * pi / 3)])
    with pytest.raises(NumericsError, match=r"no one mean: they lie up to 0\.67 pi"):
        karcher_mean(spread, [1 / 3] * 3)
    assert relative(orthomerge(torch.stack([plane(0.4), plane(-0.4)]), HALVES), plane(0)) < 1e-12
    with pytest.raises(NumericsError, match="infinite at a half turn"):
        orthomerge(torch.stack([plane(pi), plane(0.1)]), HALVES)


def test_rotations_of_odd_rank_have_a_mean_among_themselves() -> None:
    torch.manual_seed(0)
    turned = [Householder(torch.randn(6, 1).double() + 3 * torch.ones(6, 1)).rotation() for _ in range(3)]
    span = join(turned)
    mean = karcher_mean(span.cores, [1 / 3] * 3)
    assert float(torch.linalg.det(mean)) == pytest.approx(-1)
    step = sum(rotation_logs((mean.T @ core)[None])[0] for core in span.cores)
    assert float(step.norm()) < 1e-11
    with pytest.raises(TargetError, match="odd number"):
        karcher_mean(torch.stack([*join([*turned, *drawn(1, 6, 2, 0)]).cores]), [0.25] * 4)


def test_restored_angles_do_not_go_the_other_way_round() -> None:
    parts = torch.stack([torch.block_diag(plane(2.5), plane(sign * 2.0)) for sign in (1, -1)])
    with pytest.raises(NumericsError, match=r"1\.02 pi, past half a turn"):
        restore_angles(log_mean(parts, HALVES), parts, HALVES)


def test_grassmann_of_nothing_is_nothing() -> None:
    assert torch.equal(grassmann_mean(torch.eye(3).double().expand(2, 3, 3), HALVES), torch.eye(3).double())


def test_grassmann_keeps_what_subspaces_share() -> None:
    torch.manual_seed(0)
    base = orthonormal_start(9, 3).double()
    near = [torch.linalg.qr(base + 0.05 * torch.randn(9, 3).double()).Q for _ in range(3)]
    parts = [Householder(columns, gram_schmidt=True).rotation() for columns in near]
    span = join(parts)
    mean = grassmann_mean(span.cores, [1 / 3] * 3)
    turned = dense(span, mean)
    assert relative(turned @ turned, torch.eye(9)) < 1e-12
    assert float(turned.trace()) == pytest.approx(9 - 6)
    projector = sum(columns @ columns.T for columns in near) / 3
    top = torch.linalg.eigh(projector).eigenvectors[:, -3:]
    assert relative(turned, torch.eye(9) - 2 * top @ top.T) < 1e-12
    with pytest.raises(TargetError, match="one of these turns"):
        grassmann_mean(plane(0.3)[None], [1.0])
    mirror = torch.diag(torch.tensor([-1.0, 1.0]).double())
    with pytest.raises(NumericsError, match="not one"):
        grassmann_mean(torch.stack([mirror, -mirror]), HALVES)
    with pytest.raises(TargetError, match="1 and 2 directions"):
        grassmann_mean(torch.stack([mirror, -torch.eye(2).double()]), HALVES)


def test_order_matters_where_planes_meet() -> None:
    apart = join([LowRankRotation(torch.eye(4).double()[:, cols], plane(0.3)) for cols in ([0, 1], [2, 3])])
    assert order_effect(apart.cores) < 1e-15
    crossed = join([LowRankRotation(torch.eye(4).double()[:, cols], plane(0.3)) for cols in ([0, 1], [1, 2])])
    assert order_effect(crossed.cores) > 0.05
    with pytest.raises(TargetError, match=r"4 \(input side\) and 5 \(input side\)"):
        join([LowRankRotation(torch.eye(width).double()[:, :2], plane(0.3)) for width in (4, 5)])
