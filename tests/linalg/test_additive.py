"""LoRA, LoHa, LoKr and DoRA against their definitions written out, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import relative
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg import Dora, Hadamard, Kronecker, LowRank, fold_core

quick = settings(deadline=None, max_examples=30)
small = st.integers(1, 6)
seeds = st.integers(0, 2**20)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@quick
@given(small, small, small, seeds)
def test_lora_and_locon_with_a_core(out: int, inputs: int, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    up, down, core, weight = (
        randn(out, rank, 1, 1),
        randn(rank + 1, inputs, 1, 1),
        randn(rank, rank + 1, 3, 2),
        randn(out, inputs * 6),
    )
    # the convolution kernel that the three factors make when run one after the other
    kernel = torch.einsum("pi,ijkl,jr->prkl", up.flatten(1), core, down.flatten(1))
    operator = LowRank(up, fold_core(core, down), scale=-0.3)
    assert relative(operator.apply(weight), weight - 0.3 * kernel.flatten(1)) < 1e-12


@quick
@given(small, small, small, small, seeds)
def test_loha(out: int, inputs: int, first: int, second: int, seed: int) -> None:
    torch.manual_seed(seed)
    a1, b1, a2, b2 = randn(out, first), randn(first, inputs), randn(out, second), randn(second, inputs)
    weight = randn(out, inputs)
    operator = Hadamard(a1, b1, a2, b2, 0.7)
    assert relative(operator.apply(weight), weight + 0.7 * (a1 @ b1) * (a2 @ b2)) < 1e-12
    assert operator.rank == (first * second if first * second < min(out, inputs) else None)


@quick
@given(small, small, small, seeds)
def test_loha_with_cores(out: int, inputs: int, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    a1, a2, b1, b2 = randn(rank, out), randn(rank, out), randn(rank, inputs), randn(rank, inputs)
    t1, t2, weight = randn(rank, rank, 2, 3), randn(rank, rank, 2, 3), randn(out, inputs * 6)
    halves = [torch.einsum("ijkl,jr,ip->prkl", t, b, a) for t, b, a in ((t1, b1, a1), (t2, b2, a2))]
    operator = Hadamard(a1, b1, a2, b2, 0.7, t1=t1, t2=t2)
    assert relative(operator.apply(weight), weight + 0.7 * (halves[0] * halves[1]).flatten(1)) < 1e-12


@quick
@given(small, small, small, small, small, seeds, st.booleans(), st.booleans())
def test_lokr(p: int, q: int, m: int, n: int, r: int, seed: int, pair1: bool, pair2: bool) -> None:
    torch.manual_seed(seed)
    w1 = (randn(p, r), randn(r, q)) if pair1 else randn(p, q)
    w2 = (randn(m, r), randn(r, n)) if pair2 else randn(m, n)
    whole1, whole2 = (w[0] @ w[1] if isinstance(w, tuple) else w for w in (w1, w2))
    weight = randn(p * m, q * n)
    operator = Kronecker(w1, w2, 0.7)
    assert relative(operator.apply(weight), weight + 0.7 * torch.kron(whole1, whole2)) < 1e-12
    inner = (min(p, q, r) if pair1 else min(p, q)) * (min(m, n, r) if pair2 else min(m, n))
    assert operator.rank == (inner if inner < min(p * m, q * n) else None)
    if operator.rank is not None:
        up, down = operator.as_low_rank(weight)
        assert relative(weight + up @ down, operator.apply(weight)) < 1e-12


@quick
@given(small, small, small, small, seeds)
def test_lokr_of_convolutions(p: int, q: int, m: int, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    w1, kernel, weight = randn(p, q), randn(m, n, 3, 2), randn(p * m, q * n * 6)
    delta = torch.kron(w1[:, :, None, None], kernel).flatten(1)
    assert relative(Kronecker(w1, kernel).apply(weight), weight + delta) < 1e-12
    a, b, core = randn(2, m), randn(2, n), randn(2, 2, 3, 2)
    kernel = torch.einsum("ijkl,ip,jr->prkl", core, a, b).contiguous()
    delta = torch.kron(w1[:, :, None, None], kernel).flatten(1)
    assert relative(Kronecker(w1, (a, b), 0.7, t2=core).apply(weight), weight + 0.7 * delta) < 1e-12


@quick
@given(small, small, st.integers(1, 4), seeds)
def test_dora_of_rows_and_of_input_channels(out: int, inputs: int, kernel: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = randn(out, inputs * kernel)
    delta = LowRank(randn(out, 2), randn(2, inputs * kernel), 0.7)
    moved = delta.apply(weight)
    rows, channels = torch.rand(out, dtype=torch.float64) + 0.1, torch.rand(1, inputs, 1, dtype=torch.float64) + 0.1
    by_row = Dora(delta, rows.reshape(1, out, 1, 1)).apply(weight)
    assert relative(by_row.norm(dim=1), rows) < 1e-12
    assert relative(by_row, moved * (rows / moved.norm(dim=1))[:, None]) < 1e-12
    by_channel = Dora(delta, channels, axis="input").apply(weight).reshape(out, inputs, kernel)
    norms = moved.reshape(out, inputs, kernel).norm(dim=(0, 2), keepdim=True)
    assert relative(by_channel, moved.reshape(out, inputs, kernel) * channels.reshape(1, inputs, 1) / norms) < 1e-12


def test_dora_keeps_dead_rows_dead_and_refuses_to_invent_a_direction() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    nothing = LowRank(torch.zeros(2, 1), torch.zeros(1, 2))
    assert Dora(nothing, torch.tensor([1.0, 0.0])).apply(weight).tolist() == [
        [0.6000000238418579, 0.800000011920929],
        [0, 0],
    ]
    with pytest.raises(NumericsError, match="1 of 2 directions"):
        Dora(nothing, torch.tensor([1.0, 1.0])).apply(weight)


def test_factors_that_do_not_fit_are_refused() -> None:
    one = torch.ones
    with pytest.raises(TargetError, match=r"shapes \(4, 2\) and \(3, 5\) do not chain"):
        LowRank(one(4, 2), one(3, 5))
    with pytest.raises(TargetError, match="LoHa factors w2 of shapes"):
        Hadamard(one(4, 2), one(2, 5), one(4, 2), one(3, 5))
    with pytest.raises(TargetError, match="differ in shape"):
        Hadamard(one(4, 2), one(2, 5), one(4, 2), one(2, 6))
    with pytest.raises(TargetError, match="one Tucker core of two"):
        Hadamard(one(2, 4), one(2, 5), one(2, 4), one(2, 5), t1=one(2, 2, 3, 3))
    with pytest.raises(TargetError, match="LoKr factors w1 of shapes"):
        Kronecker((one(4, 2), one(3, 5)), one(2, 2))
    with pytest.raises(TargetError, match="its w2 is whole"):
        Kronecker(one(2, 2), one(2, 2), t2=one(2, 2, 3, 3))
    with pytest.raises(TargetError, match="do not chain"):
        fold_core(one(2, 3, 3, 3), one(2, 5))
    delta = LowRank(one(4, 1), one(1, 6))
    with pytest.raises(TargetError, match=r"3 DoRA magnitudes on the output side of a weight of shape \(4, 6\)"):
        Dora(delta, one(3))
    with pytest.raises(TargetError, match="4 DoRA magnitudes on the input side"):
        Dora(delta, one(4), axis="input")
    with pytest.raises(ValueError, match="'rows'"):
        Dora(delta, one(4), axis="rows")
