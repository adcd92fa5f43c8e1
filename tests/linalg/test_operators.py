"""Laws that every kind of operator obeys, over one table of kinds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from naive import relative
from torch import Tensor

from ortho_cli.errors import TargetError
from ortho_cli.linalg import (
    BlockRotation,
    Chain,
    Dora,
    Hadamard,
    Householder,
    Kronecker,
    LowRank,
    Operator,
    Rescale,
    Transposed,
    cayley,
    cayley_neumann,
    diag_oft,
    orthonormal_start,
    skew_from_upper,
)

OUT, IN = 12, 18


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def skew(blocks: int, size: int) -> Tensor:
    return skew_from_upper(0.2 * randn(blocks, size * (size - 1) // 2), size)


KINDS: dict[str, Callable[[], Operator]] = {
    "hra": lambda: Householder(randn(IN, 4)),
    "hra-odd": lambda: Householder(randn(IN, 5)),
    "hra-output": lambda: Householder(randn(OUT, 4), side="output"),
    "hra-soft": lambda: Householder(randn(IN, 4), eps=0.5),
    "hra-soft-output": lambda: Householder(randn(OUT, 3), eps=0.5, side="output"),
    "hra-gram-schmidt": lambda: Householder(randn(IN, 3), gram_schmidt=True),
    "hra-gram-schmidt-output": lambda: Householder(orthonormal_start(OUT, 3), gram_schmidt=True, side="output"),
    "lora": lambda: LowRank(randn(OUT, 3), randn(3, IN), scale=0.7),
    "locon": lambda: LowRank(randn(OUT, 3, 1, 1), randn(3, 2, 3, 3), scale=0.7),
    "dora": lambda: Dora(LowRank(randn(OUT, 3), randn(3, IN)), torch.rand(OUT) + 0.5),
    "dora-input": lambda: Dora(LowRank(randn(OUT, 3), randn(3, IN)), torch.rand(1, IN) + 0.5, axis="input"),
    "dora-input-conv": lambda: Dora(LowRank(randn(OUT, 3), randn(3, IN)), torch.rand(1, 2, 1, 1) + 1, axis="input"),
    "dora-of-lokr": lambda: Dora(Kronecker(randn(3, 2), randn(4, 9)), torch.rand(OUT, 1) + 0.5),
    "loha": lambda: Hadamard(randn(OUT, 3), randn(3, IN), randn(OUT, 3), randn(3, IN), scale=0.7),
    "loha-tucker": lambda: Hadamard(
        randn(2, OUT), randn(2, 2), randn(2, OUT), randn(2, 2), 0.7, t1=randn(2, 2, 3, 3), t2=randn(2, 2, 3, 3)
    ),
    "loha-full-rank": lambda: Hadamard(randn(OUT, 5), randn(5, IN), randn(OUT, 5), randn(5, IN)),
    "lokr-whole": lambda: Kronecker(randn(3, 2), randn(4, 9), scale=0.7),
    "lokr-pairs": lambda: Kronecker((randn(3, 1), randn(1, 2)), (randn(4, 2), randn(2, 9)), scale=0.7),
    "lokr-wide-pairs": lambda: Kronecker((randn(3, 8), randn(8, 2)), (randn(4, 2), randn(2, 9)), scale=0.7),
    "lokr-conv": lambda: Kronecker(randn(3, 2), randn(4, 1, 3, 3), scale=0.7),
    "lokr-tucker": lambda: Kronecker(randn(3, 2), (randn(2, 4), randn(2, 1)), 0.7, t2=randn(2, 2, 3, 3)),
    "oft": lambda: BlockRotation(cayley(skew(3, 6))),
    "oft-shared": lambda: BlockRotation(cayley(skew(1, 6)), shared=True),
    "oft-neumann": lambda: BlockRotation(cayley_neumann(skew(3, 6) / 4)),
    "oft-output": lambda: BlockRotation(diag_oft(0.2 * randn(4, 3, 3)), side="output"),
    "oft-shared-output": lambda: BlockRotation(diag_oft(0.2 * randn(1, 3, 3)), side="output", shared=True),
    "rescale": lambda: Rescale(torch.rand(OUT, 1) + 0.5),
    "diag-oft-rescale": lambda: Chain(
        (BlockRotation(diag_oft(0.2 * randn(4, 3, 3)), side="output"), Rescale(torch.rand(OUT, 1, 1, 1) + 0.5))
    ),
    "chain-low-rank": lambda: Chain((Householder(randn(IN, 2)), LowRank(randn(OUT, 3), randn(3, IN)))),
    "chain-whole": lambda: Chain((Householder(randn(OUT, 2), side="output"), Householder(randn(IN, 2)))),
    "transposed-lora": lambda: Transposed(LowRank(randn(IN, 3), randn(3, OUT))),
    "transposed-dora": lambda: Transposed(Dora(LowRank(randn(IN, 3), randn(3, OUT)), torch.rand(IN) + 0.5)),
    "transposed-hra": lambda: Transposed(Householder(randn(OUT, 4))),
}
LOW_RANK = {
    "hra": 4, "hra-odd": 5, "hra-output": 4, "hra-soft": 4, "hra-soft-output": 3, "hra-gram-schmidt": 3,
    "hra-gram-schmidt-output": 3, "lora": 3, "locon": 3, "loha": 9, "loha-tucker": 4, "lokr-whole": 8,
    "lokr-pairs": 2, "lokr-wide-pairs": 4, "lokr-conv": 8, "lokr-tucker": 4, "chain-low-rank": 5, "chain-whole": 4,
    "transposed-lora": 3, "transposed-hra": 4,
}  # fmt: skip
NO_INVERSE = {"hra-soft", "hra-soft-output", "dora", "dora-input", "dora-input-conv", "dora-of-lokr", "transposed-dora"}
ROTATIONS = {
    "hra": 2, "hra-odd": 3, "hra-output": 2, "hra-gram-schmidt": 2, "hra-gram-schmidt-output": 2, "oft": 9,
    "oft-shared": 3, "oft-neumann": 9, "oft-output": 4, "oft-shared-output": 1, "transposed-hra": 2,
}  # fmt: skip


def make(kind: str) -> tuple[Operator, Tensor]:
    torch.manual_seed(sum(map(ord, kind)))
    return KINDS[kind](), torch.randn(OUT, IN)


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_row_blocks_equal_the_whole(kind: str) -> None:
    operator, weight = make(kind)
    whole = operator.apply(weight)
    assert whole.shape == weight.shape
    assert whole.dtype == torch.float32
    assert relative(whole, weight) > 1e-2, "an operator that does nothing proves nothing"
    step = operator.row_multiple
    if step:
        ends = sorted({0, step, OUT - step, OUT})
        blocks = [operator.apply(weight[a:b], first_row=a) for a, b in pairwise(ends)]
        assert relative(torch.cat(blocks), whole) < 1e-6
        if step > 1:
            with pytest.raises(ValueError, match=f"blocks of {step} rows, found rows 1 to"):
                operator.apply(weight[1 : 1 + step], first_row=1)
    else:
        with pytest.raises(ValueError, match="all rows at once"):
            operator.apply(weight[1:], first_row=1)


@every_kind
def test_the_input_is_not_changed_and_the_result_is_new(kind: str) -> None:
    operator, weight = make(kind)
    kept = weight.clone()
    result = operator.apply(weight)
    result.zero_()
    assert torch.equal(weight, kept)
    assert relative(operator.apply(weight), weight) > 1e-2


@every_kind
def test_float64_is_float32_made_precise(kind: str) -> None:
    operator, weight = make(kind)
    double = operator.to(torch.float64).apply(weight.double())
    assert double.dtype == torch.float64
    assert relative(operator.apply(weight), double) < 2e-6
    # an operator casts itself to the weight's dtype; `to` beforehand only saves time
    assert relative(operator.apply(weight.double()), double) < 1e-12
    assert operator.to(torch.float32).apply(weight).dtype == torch.float32


@every_kind
def test_half_precision_is_the_callers_business(kind: str) -> None:
    operator, weight = make(kind)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match="float32 or float64"):
            operator.apply(weight.to(dtype))
        with pytest.raises(ValueError, match="float32 or float64"):
            operator.to(dtype)


@every_kind
def test_the_inverse_undoes(kind: str) -> None:
    operator, weight = make(kind)
    if kind in NO_INVERSE:
        with pytest.raises(TargetError, match="undone"):
            operator.inverse()
        return
    exact, wide = operator.to(torch.float64), weight.double()
    assert relative(exact.inverse().apply(exact.apply(wide)), wide) < 1e-12
    assert relative(exact.apply(exact.inverse().apply(wide)), wide) < 1e-12
    assert relative(operator.inverse().apply(operator.apply(weight)), weight) < 1e-5


@every_kind
def test_low_rank_form_reproduces_apply(kind: str) -> None:
    operator, weight = make(kind)
    assert operator.rank == LOW_RANK.get(kind)
    if operator.rank is None:
        with pytest.raises(TargetError, match="full rank"):
            operator.as_low_rank(weight)
        return
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        up, down = operator.as_low_rank(weight.to(dtype))
        assert up.dtype == down.dtype == dtype
        assert up.shape == (OUT, operator.rank)
        assert down.shape == (operator.rank, IN)
        assert relative(weight.to(dtype) + up @ down, operator.apply(weight.to(dtype))) < tolerance
    if operator.row_multiple:
        rows, _ = operator.as_low_rank(weight[3:6], first_row=3)
        whole, _ = operator.as_low_rank(weight)
        assert relative(rows, whole[3:6]) < 1e-6


@every_kind
def test_rotations_keep_singular_values_and_know_their_angles(kind: str) -> None:
    operator, weight = make(kind)
    angles = operator.angles()
    if kind not in ROTATIONS:
        assert angles is None
        return
    assert angles is not None
    assert angles.dtype == torch.float64
    assert len(angles) == ROTATIONS[kind]
    assert torch.equal(angles, angles.sort(descending=True).values)
    assert 0 <= float(angles.min()) <= float(angles.max()) <= torch.pi
    changed = operator.to(torch.float64).apply(weight.double())
    tolerance = 1e-2 if kind == "oft-neumann" else 1e-6
    assert relative(torch.linalg.svdvals(changed), torch.linalg.svdvals(weight.double())) < tolerance


@every_kind
def test_a_weight_of_another_shape_is_refused(kind: str) -> None:
    operator, weight = make(kind)
    out, width = operator.shape
    assert out in (OUT, None)
    assert width in (IN, None)
    if width is not None:
        with pytest.raises(TargetError, match=f"of width {IN - 1}"):
            operator.apply(weight[:, :-1])
    elif kind == "oft-shared":
        with pytest.raises(TargetError, match="does not divide a width of 17"):
            operator.apply(weight[:, :-1])
    if out is not None:
        step = max(operator.row_multiple, 1)
        with pytest.raises(TargetError, match="does not fit rows 0 to"):
            operator.apply(torch.cat([weight, weight[:step]]))
    with pytest.raises(ValueError, match="found shape"):
        operator.apply(weight.reshape(OUT, 2, 9))


NO_POWER = {"hra-odd", "hra-soft", "hra-soft-output", "hra-gram-schmidt", "hra-gram-schmidt-output"}
ADDED = {"lora", "locon", "loha", "loha-tucker", "loha-full-rank", "lokr-whole", "lokr-pairs", "lokr-wide-pairs",
         "lokr-conv", "lokr-tucker", "dora", "dora-input", "dora-input-conv", "dora-of-lokr", "transposed-lora",
         "transposed-dora"}  # fmt: skip


@every_kind
def test_strength_runs_from_nothing_to_the_whole(kind: str) -> None:
    operator, weight = make(kind)
    whole = operator.apply(weight)
    assert torch.equal(operator.power(0).apply(weight), weight)
    assert torch.equal(operator.power(1).apply(weight), whole)
    if kind in NO_POWER:
        with pytest.raises(TargetError, match=r"odd number of reflections|not orthogonal"):
            operator.power(0.5)
        return
    half = operator.power(0.5).apply(weight)
    if kind in ADDED:
        assert relative(half, (weight + whole) / 2) < 1e-6
    elif kind in ROTATIONS:
        assert relative(operator.power(0.5).apply(half), whole) < 2e-6
        assert relative(operator.power(-1).apply(whole), weight) < 2e-6
        assert relative(torch.linalg.svdvals(half), torch.linalg.svdvals(weight)) < (
            1e-2 if "neumann" in kind else 1e-6
        )
    assert relative(half, weight) > 1e-3
    assert relative(half, whole) > 1e-3
