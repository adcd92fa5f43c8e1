"""Which values adapters may hold, whatever their kind: half types are raised, the rest is refused."""

from __future__ import annotations

import pytest
import torch
from naive import relative

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg import (
    BlockRotation,
    Dora,
    Hadamard,
    Householder,
    Kronecker,
    LowRank,
    Rescale,
    diag_oft,
    skew_from_upper,
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adapters_are_raised(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    up, down, vectors = (torch.randn(shape).to(dtype) for shape in ((4, 2), (2, 6), (6, 2)))
    weight = torch.randn(4, 6)
    assert torch.equal(LowRank(up, down).apply(weight), LowRank(up.float(), down.float()).apply(weight))
    assert torch.equal(Householder(vectors).apply(weight), Householder(vectors.float()).apply(weight))
    mixed = LowRank(up, down.double())
    assert mixed.dtype == torch.float64
    assert relative(mixed.apply(weight.double()), weight.double() + up.double() @ down.double()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_values_that_need_a_scale_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TargetError, match=str(dtype).removeprefix("torch.")):
        Householder(torch.ones(4, 2).to(dtype))
    with pytest.raises(TargetError, match="expected a float type"):
        LowRank(torch.ones(4, 2).to(dtype), torch.ones(2, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_adapters_are_refused(bad: float) -> None:
    poisoned = torch.ones(4, 4)
    poisoned[1, 2] = bad
    for build in (
        lambda: Householder(poisoned[:, 1:3]),
        lambda: LowRank(poisoned, torch.ones(4, 4)),
        lambda: Hadamard(torch.ones(4, 4), poisoned, torch.ones(4, 4), torch.ones(4, 4)),
        lambda: Kronecker(torch.ones(2, 2), (torch.ones(4, 4), poisoned)),
        lambda: Dora(LowRank(torch.ones(4, 1), torch.ones(1, 4)), poisoned[1]),
        lambda: BlockRotation(poisoned[None]),
        lambda: Rescale(poisoned[1]),
        lambda: skew_from_upper(poisoned[:, 2:3], 2),
        lambda: diag_oft(poisoned[None]),
    ):
        with pytest.raises(NumericsError, match="1 non-finite value of"):
            build()
