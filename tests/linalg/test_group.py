"""Group orthogonality against its definition, written out set by set and differentiated by autograd in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ortho_cli.errors import TargetError
from ortho_cli.linalg import group as group_module
from ortho_cli.linalg.group import (
    MODES,
    bucket_penalty,
    buckets,
    count_groups,
    filter_rows,
    group_penalty,
    rows_to_weight,
)

quick = settings(deadline=None, max_examples=60)
modes = st.sampled_from(MODES)
seeds = st.integers(0, 2**20)


def naive(rows: Tensor, count: int, mode: str, normalize: bool = False) -> Tensor:
    """The definition: every set of filters, its Gram on the smaller side, the distance from the identity."""
    size = rows.shape[0] // count
    if mode == "inter":
        sets = [rows[first : first + size] for first in range(0, rows.shape[0], size)]
    else:
        sets = [rows[place::size] for place in range(size)]
    total = torch.zeros((), dtype=rows.dtype)
    for t in sets:
        gram = t.T @ t if t.shape[0] >= t.shape[1] else t @ t.T
        if normalize:
            gram = gram / gram.diagonal().mean()
        total = total + (gram - torch.eye(len(gram), dtype=rows.dtype)).square().sum()
    return total


def naive_gradient(rows: Tensor, count: int, mode: str, normalize: bool = False) -> tuple[Tensor, Tensor]:
    leaf = rows.detach().double().requires_grad_()
    value = naive(leaf, count, mode, normalize)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((found.double() - expected).norm()) <= tolerance * max(1.0, float(expected.norm()))


def gradient_unit(rows: Tensor, normalize: bool) -> float:
    """The scale-free gradient is a difference of terms of size 1 / |T|, and so is its rounding where they cancel."""
    return min(1.0, float(rows.norm())) if normalize else 1.0


def golden(rows: int, columns: int) -> Tensor:
    """The matrix A that the golden numbers of the facts are stated for."""
    i = torch.arange(rows, dtype=torch.float64)[:, None]
    j = torch.arange(columns, dtype=torch.float64)[None, :]
    return torch.sin(0.1 + 0.7 * i + 1.3 * j + 0.37 * i * j)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Filters as training meets them: one, an odd number, wider or taller than they are many, in any even deal."""
    size, count, columns = draw(st.integers(1, 7)), draw(st.integers(1, 6)), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(seeds))
    rows = torch.randn(size * count, columns, dtype=torch.float64, generator=generator)
    return rows * draw(st.sampled_from([1e-3, 0.3, 1.0, 5.0])), count


@pytest.mark.parametrize(
    ("rows", "columns", "count", "inter", "intra", "whole"),
    [
        (8, 4, 2, 39.014341590, 14.967370310, 69.593398368),
        (8, 4, 1, 69.593398368, 11.743245889, 69.593398368),
        (8, 12, 2, 265.552184675, 214.368668038, 301.991608679),
        (16, 27, 4, 3278.435874520, 2650.328521441, 3641.127425388),
        (16, 27, 16, 2498.687960940, 3641.127425388, 3641.127425388),
        (40, 4, 4, 360.166590830, 158.332770717, 1475.415162040),
    ],
)
def test_golden_numbers(rows: int, columns: int, count: int, inter: float, intra: float, whole: float) -> None:
    weight = golden(rows, columns)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        w = weight.to(dtype)
        assert group_penalty([w], [count], "inter").item() == pytest.approx(inter, rel=tolerance)
        assert group_penalty([w], [count], "intra").item() == pytest.approx(intra, rel=tolerance)
        assert group_penalty([w], [1], "inter").item() == pytest.approx(whole, rel=tolerance)


@quick
@given(matrices(), modes, st.booleans())
def test_value_and_gradient_are_those_of_the_definition(case: tuple[Tensor, int], mode: str, normalize: bool) -> None:
    rows, count = case
    unit = gradient_unit(rows, normalize)
    value, gradient = naive_gradient(rows, count, mode, normalize)
    found, (own,) = bucket_penalty([rows], count, mode, normalize=normalize)
    assert close(found, value, 1e-12) and close(unit * own, unit * gradient, 1e-12)
    half, (own,) = bucket_penalty([rows], count, mode, normalize=normalize, scale=0.5)
    assert close(half, value, 1e-12) and close(unit * own, unit * gradient / 2, 1e-12)
    found, (own,) = bucket_penalty([rows.float()], count, mode, normalize=normalize)
    assert found.dtype == own.dtype == torch.float32
    assert close(found, value, 1e-5) and close(unit * own, unit * gradient, 1e-4)


@quick
@given(st.lists(matrices(), min_size=1, max_size=6), modes, st.booleans(), seeds)
def test_many_layers_are_the_sum_of_each(
    cases: list[tuple[Tensor, int]], mode: str, normalize: bool, seed: int
) -> None:
    cases = [*cases, cases[0], cases[-1]]  # some alike, so that buckets hold several
    torch.manual_seed(seed)
    leaves = [rows.clone().requires_grad_(bool(torch.rand(()) < 0.8)) for rows, _ in cases]
    counts = [count for _, count in cases]
    penalty = group_penalty(leaves, counts, mode, normalize=normalize)
    expected = [naive_gradient(rows, count, mode, normalize) for rows, count in cases]
    assert close(penalty.detach(), torch.stack([value for value, _ in expected]).sum(), 1e-12)
    assert penalty.requires_grad == any(leaf.requires_grad for leaf in leaves)
    if penalty.requires_grad:
        (3 * penalty).backward(retain_graph=True)
        penalty.backward()  # a second time, into the same .grad
    for leaf, (_, gradient) in zip(leaves, expected, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        unit = gradient_unit(leaf.detach(), normalize)
        assert leaf.grad is None or close(unit * leaf.grad, 4 * unit * gradient, 1e-12)


@quick
@given(matrices(), modes)
def test_the_side_of_the_gram_changes_a_constant_only(case: tuple[Tensor, int], mode: str) -> None:
    rows, count = case
    value, (gradient,) = bucket_penalty([rows], count, mode)
    groups = rows.view(count, -1, rows.shape[1])
    sets = groups if mode == "inter" else groups.transpose(0, 1)
    b, r, d = sets.shape
    wide = sets @ sets.mT - torch.eye(r, dtype=rows.dtype)
    assert close(wide.square().sum() - value, torch.tensor(float(b * max(0, r - d))).double(), 1e-9)
    closed = (4 * wide @ sets).transpose(0, 1) if mode == "intra" else 4 * wide @ sets
    assert close(gradient, closed.reshape(rows.shape), 1e-11)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rows", "columns", "count"), [(6, 5, 2), (8, 2, 2), (5, 7, 1), (6, 3, 6), (1, 3, 1)])
def test_gradcheck(rows: int, columns: int, count: int, mode: str, normalize: bool) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(rows, columns, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def penalty(*given: Tensor) -> Tensor:
        return group_penalty(given, [count, count], mode, normalize=normalize)

    assert torch.autograd.gradcheck(penalty, weights)
    assert torch.autograd.gradgradcheck(penalty, weights)


def test_second_derivatives_at_zero_are_finite() -> None:
    weight = torch.zeros(4, 3, requires_grad=True)
    for normalize in (False, True):
        penalty = group_penalty([weight], [1], normalize=normalize)
        (gradient,) = torch.autograd.grad(penalty, weight, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), weight)
        assert torch.equal(second, torch.full((4, 3), 0.0 if normalize else -4.0))


@quick
@given(st.integers(1, 400), st.integers(1, 64), st.integers(1, 9))
def test_group_counts_divide_and_are_the_largest_that_do(filters: int, groups: int, least: int) -> None:
    count, wanted = count_groups(filters, groups, least)
    assert wanted == min(groups, filters // least)
    if filters < least:
        assert count == 0
        return
    assert filters % count == 0 and filters // count >= least and count <= groups
    assert not any(filters % larger == 0 for larger in range(count + 1, wanted + 1))


def test_group_counts_of_the_papers_models() -> None:
    assert [count_groups(filters) for filters in (16, 32, 64, 320, 640, 1280)] == [
        (4, 4), (8, 8), (16, 16), (32, 32), (32, 32), (32, 32),
    ]  # fmt: skip
    assert count_groups(37) == (1, 9) and count_groups(0) == (0, 0) and count_groups(3, 32, 1) == (3, 3)
    for wrong in ((8, 0, 4), (8, 4, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            count_groups(*wrong)


@quick
@given(matrices(), modes, st.booleans())
def test_zero_weights_are_a_saddle_without_nan(case: tuple[Tensor, int], mode: str, normalize: bool) -> None:
    rows, count = case
    value, (gradient,) = bucket_penalty([torch.zeros_like(rows)], count, mode, normalize=normalize)
    size = rows.shape[0] // count
    b, r = (count, size) if mode == "inter" else (size, count)
    assert value.item() == b * min(r, rows.shape[1])
    assert not gradient.any()


@quick
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), modes, st.booleans(), seeds)
def test_orthonormal_sets_cost_nothing(r: int, d: int, b: int, mode: str, normalize: bool, seed: int) -> None:
    torch.manual_seed(seed)
    sets = torch.linalg.qr(torch.randn(b, max(r, d), min(r, d), dtype=torch.float64)).Q
    sets = sets if r >= d else sets.mT
    if normalize:  # of any length, each its own
        sets = sets * torch.rand(b, 1, 1, dtype=torch.float64).add(0.1)
    rows = sets.reshape(b * r, d) if mode == "inter" else sets.transpose(0, 1).reshape(r * b, d)
    value, (gradient,) = bucket_penalty([rows], b if mode == "inter" else r, mode, normalize=normalize)
    assert value.item() < 1e-25 and float(gradient.abs().max()) < 1e-12


@quick
@given(matrices(), modes, st.sampled_from([1e-6, 0.1, 1e4]))
def test_the_normalized_form_is_blind_to_length(case: tuple[Tensor, int], mode: str, stretch: float) -> None:
    rows, count = case
    value, (gradient,) = bucket_penalty([rows], count, mode, normalize=True)
    longer, (own,) = bucket_penalty([rows * stretch], count, mode, normalize=True)
    assert close(longer, value, 1e-9) and close(own * stretch, gradient, 1e-9)
    # no force along the weight itself: its length is free
    assert abs(float((gradient * rows).sum())) < 1e-9 * max(1.0, float(gradient.norm() * rows.norm()))
    size = rows.shape[0] // count
    b, r = (count, size) if mode == "inter" else (size, count)
    k = min(r, rows.shape[1])
    assert -1e-9 <= value.item() <= b * (k * k - k) * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_weights_are_computed_in_float32_and_rounded_once(dtype: torch.dtype, mode: str) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(32, 40) * 0.2).to(dtype)
    exact, (gradient,) = bucket_penalty([weight.float()], 8, mode)
    leaf = weight.clone().requires_grad_()
    penalty = group_penalty([leaf], [8], mode)
    assert penalty.dtype == torch.float32 and torch.equal(penalty.detach(), exact)
    penalty.backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, gradient.to(dtype))


def test_mixed_types_add_up_in_the_widest() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(8, 5).to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    total = group_penalty(weights, [2, 2, 2])
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(sum(float(naive(w.double(), 2, "inter")) for w in weights), rel=1e-5)


def test_autocast_does_not_lower_the_precision() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 36, requires_grad=True)
    plain = group_penalty([weight], [4])
    plain.backward()
    expected, weight.grad = weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        inside = group_penalty([weight], [4])
        inside.backward()
    assert torch.equal(inside, plain) and weight.grad is not None and expected is not None
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("transposed", [0, 1, 2, 3])
@pytest.mark.parametrize("kernel", [(), (3,), (2, 3), (1, 2, 3)])
def test_rows_are_output_channels(transposed: int, kernel: tuple[int, ...]) -> None:
    """Emptying a row silences that output channel of the layer, and nothing else."""
    torch.manual_seed(0)
    groups = max(transposed, 1)
    inputs, outputs = 2 * groups, 3 * groups
    shape = (inputs, outputs // groups, *kernel) if transposed else (outputs, inputs, *kernel)
    weight = torch.randn(shape)
    rows = filter_rows(weight, transposed)
    assert rows.shape == (outputs, weight.numel() // outputs)
    assert torch.equal(rows_to_weight(rows, shape, transposed), weight)
    if not kernel:
        if transposed <= 1:  # a transformers Conv1D, and a Linear
            assert torch.equal(rows, weight.T if transposed else weight)
        return
    x = torch.randn(2, inputs, *(5,) * len(kernel))
    kind = f"conv{'_transpose' if transposed else ''}{len(kernel)}d"
    options = {"groups": transposed} if transposed else {}
    full = getattr(torch.nn.functional, kind)(x, weight, **options)
    emptied = rows.clone()
    emptied[1] = 0
    silent = getattr(torch.nn.functional, kind)(x, rows_to_weight(emptied, shape, transposed), **options)
    assert not silent[:, 1].any() and full[:, 1].any()
    keep = [channel for channel in range(outputs) if channel != 1]
    assert torch.allclose(silent[:, keep], full[:, keep])


def test_strides_do_not_matter() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 4, 3, 3, dtype=torch.float64)
    plain = naive(weight.reshape(8, -1), 2, "intra")
    for stored in (weight.contiguous(memory_format=torch.channels_last), weight.mT.contiguous().mT):
        assert not stored.is_contiguous()
        leaf = stored.clone(memory_format=torch.preserve_format).requires_grad_()
        penalty = group_penalty([filter_rows(leaf)], [2], "intra")
        penalty.backward()
        assert penalty.item() == pytest.approx(plain.item(), rel=1e-12)
        expected = naive_gradient(weight.reshape(8, -1), 2, "intra")[1].view(weight.shape)
        assert leaf.grad is not None and close(leaf.grad, expected, 1e-12)


def test_buckets_hold_alike_layers_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(group_module, "CPU_BUCKET", 100)
    layers = [(4, 10, 2, torch.float32, cpu)] * 5 + [(4, 10, 1, torch.float32, cpu), (4, 10, 2, torch.float64, cpu)]
    layers += [(20, 30, 2, torch.float32, cpu)] * 2  # each alone above the bound
    assert buckets(layers) == [[0, 1], [2, 3], [4], [5], [6], [7], [8]]
    torch.manual_seed(0)
    weights = [torch.randn(4, 10, dtype=torch.float64) for _ in range(5)]
    expected = sum(float(naive(weight, 2, "inter")) for weight in weights)
    assert group_penalty(weights, [2] * 5).item() == pytest.approx(expected, rel=1e-12)


def test_what_is_no_weight_in_groups_is_refused() -> None:
    weight = torch.ones(6, 2)
    with pytest.raises(ValueError, match="'both'"):
        group_penalty([weight], [2], "both")
    for rows, count in ((weight, 4), (weight, 0), (weight[0], 1)):
        with pytest.raises(ValueError, match="groups of rows"):
            bucket_penalty([rows], count)
    with pytest.raises(ValueError, match="no weights"):
        group_penalty([], [])
    with pytest.raises(ValueError, match="longer"):
        group_penalty([weight], [1, 2])
    with pytest.raises(TargetError, match="int8"):
        group_penalty([weight.to(torch.int8)], [1])
