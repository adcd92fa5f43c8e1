"""Tensor trains and Tucker forms: published counts, contraction, norms and decay, all without the dense weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_shapes import stages
from torch import Tensor

from ortho_cli.errors import TargetError
from ortho_cli.linalg.tensor import fold_dims, tensor_parameters, tensor_ranks, tensor_train, tucker
from ortho_cli.linalg.tensor_train import (
    apply_train,
    train_decay_gradients,
    train_squared_norm,
    train_to_matrix,
    tucker_as_train,
    tucker_decay_gradients,
)

quick = settings(deadline=None, max_examples=80)
seeds = st.integers(0, 2**20)
WRN_DENSE = 36_479_194


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def wide_resnet_of_tensors(count: Callable[[tuple[int, int, int]], int]) -> int:
    """WRN-28-10 with separable convolutions: a depthwise 3x3, then a 1x1 whose weight is a tensor; shortcuts dense."""
    total = 16 * 3 * 9 + 2 * 640 + 10 * 640 + 10
    for out, inputs in stages((160, 320, 640), 4, 16):
        total += 2 * inputs + 2 * out + 9 * inputs + 9 * out
        total += count(fold_dims(out * inputs)) + count(fold_dims(out * out))
        total += out * inputs if out != inputs else 0
    return total


@pytest.mark.parametrize(
    ("kind", "scale", "parameters", "ratio"),
    [
        ("tensor-train", 0.234, 607_160, 0.016644),
        ("tensor-train", 0.705, 2_434_702, 0.066742),
        ("tucker", 0.211, 608_501, 0.016681),
        ("tucker", 0.68, 2_444_223, 0.067003),
    ],
)
def test_published_counts(kind: str, scale: float, parameters: int, ratio: float) -> None:
    compat = "tntorch" if kind == "tucker" else None
    found = wide_resnet_of_tensors(lambda dims: tensor_parameters(kind, dims, tensor_ranks(kind, dims, scale), compat))
    assert found == parameters
    assert round(found / WRN_DENSE, 6) == ratio
    # A plain core holds the same tensor in less.
    assert wide_resnet_of_tensors(lambda dims: tensor_parameters(kind, dims, tensor_ranks(kind, dims, scale))) <= found


def test_dimensions() -> None:
    assert fold_dims(640 * 640) == (80, 80, 64) and fold_dims(320 * 160) == (40, 40, 32)
    assert fold_dims(160 * 16) == (16, 16, 10) and fold_dims(27) == (3, 3, 3)
    assert fold_dims(1) == (1, 1, 1) and fold_dims(7) == (7, 1, 1) and fold_dims(2 * 97) == (97, 2, 1)


@quick
@given(st.integers(1, 5000))
def test_dimensions_hold_every_entry(entries: int) -> None:
    a, b, c = fold_dims(entries)
    assert a * b * c == entries


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int, int]]:
    out, inputs = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    return gaussian(out, inputs, seed=draw(seeds)), fold_dims(out * inputs)


@quick
@given(weights(), st.floats(0.05, 1.0))
def test_forms_have_the_counted_parameters_and_are_near_optimal(
    case: tuple[Tensor, tuple[int, int, int]], scale: float
) -> None:
    weight, dims = case
    shape, tensor = tuple(weight.shape), weight.reshape(dims)
    ranks = tensor_ranks("tensor-train", dims, scale)
    cores = tensor_train(weight, dims, ranks)
    assert sum(core.numel() for core in cores) == tensor_parameters("tensor-train", dims, ranks)
    # Both forms are within the root of the number of cuts of what each cut alone must lose.
    cuts = [torch.linalg.svdvals(tensor.flatten(1)), torch.linalg.svdvals(tensor.flatten(0, 1))]
    least = sum(float(values[rank:].square().sum()) for values, rank in zip(cuts, ranks, strict=True))
    assert float((train_to_matrix(cores, shape) - weight).square().sum()) <= least + 1e-9
    ranks = tensor_ranks("tucker", dims, scale)
    form = tucker(weight, dims, ranks)
    assert sum(part.numel() for part in form) == tensor_parameters("tucker", dims, ranks)
    unfolded = [torch.linalg.svdvals(tensor.movedim(axis, 0).flatten(1)) for axis in range(3)]
    least = sum(float(values[rank:].square().sum()) for values, rank in zip(unfolded, ranks, strict=True))
    assert float((train_to_matrix(tucker_as_train(*form), shape) - weight).square().sum()) <= least + 1e-9


@quick
@given(weights(), seeds)
def test_full_ranks_reproduce_the_weight(case: tuple[Tensor, tuple[int, int, int]], seed: int) -> None:
    weight, dims = case
    big = 10**6
    cores = tensor_train(weight.float(), dims, (big, big))
    assert float((train_to_matrix(cores, tuple(weight.shape)) - weight).abs().max()) < 1e-5
    form = tucker(weight.float(), dims, (big, big, big))
    assert float((train_to_matrix(tucker_as_train(*form), tuple(weight.shape)) - weight).abs().max()) < 1e-5


@st.composite
def trains(draw: st.DrawFn) -> tuple[tuple[Tensor, Tensor, Tensor], int, int]:
    """Any cores of a weight `(out, in)`, whether or not its cut falls between two of them."""
    out, inputs, seed = draw(st.integers(1, 16)), draw(st.integers(1, 16)), draw(seeds)
    dims = fold_dims(out * inputs)
    if draw(st.booleans()):
        dims = (dims[2], dims[0], dims[1])
    first, second = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    cores = (
        gaussian(dims[0], first, seed=seed),
        gaussian(first, dims[1], second, seed=seed + 1),
        gaussian(second, dims[2], seed=seed + 2),
    )
    return cores, out, inputs


@quick
@given(trains())
def test_activations_go_through_the_cores(case: tuple[tuple[Tensor, Tensor, Tensor], int, int]) -> None:
    cores, out, inputs = case
    x = gaussian(2, 3, inputs, seed=5)
    expected = x @ train_to_matrix(cores, (out, inputs)).mT
    assert torch.allclose(apply_train(x, cores, out), expected, atol=1e-9)
    assert apply_train(x[0, 0], cores, out).shape == (out,)


@pytest.mark.parametrize(
    ("out", "inputs", "dims"),
    [
        (640, 640, (80, 80, 64)),  # the cut falls inside the middle core
        (160, 16, (16, 16, 10)),  # it divides the first core only
        (16, 160, (16, 16, 10)),
        (6, 35, (10, 3, 7)),  # the last one only
        (6, 35, (21, 2, 5)),
        (6, 6, (4, 9, 1)),  # the first only, and an end of one
        (10, 10, (4, 25, 1)),
        (3, 5, (5, 3, 1)),
    ],
)
def test_every_place_of_the_cut(out: int, inputs: int, dims: tuple[int, int, int]) -> None:
    weight, x = gaussian(out, inputs), gaussian(4, inputs, seed=1)
    cores = tensor_train(weight, dims, (10**6, 10**6))
    assert torch.allclose(apply_train(x, cores, out), x @ weight.mT, atol=1e-9)


def test_the_dense_weight_is_not_rebuilt() -> None:
    """At the largest layer of the paper no tensor of the weight's size appears."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, Tensor):
                    Largest.entries = max(Largest.entries, tensor.numel())
            return result

    weight, dims = gaussian(640, 640, dtype=torch.float32), (80, 80, 64)
    cores = tensor_train(weight, dims, tensor_ranks("tensor-train", dims, 0.234))
    x = gaussian(8, 640, dtype=torch.float32)
    with Largest():
        apply_train(x, cores, 640)
        train_squared_norm(cores)
        train_decay_gradients(cores)
    assert Largest.entries < weight.numel() / 10


@quick
@given(trains())
def test_norm_and_decay_of_a_train(case: tuple[tuple[Tensor, Tensor, Tensor], int, int]) -> None:
    cores, out, inputs = case
    leaves = tuple(core.clone().requires_grad_() for core in cores)
    square = train_to_matrix(leaves, (out, inputs)).square().sum()  # type: ignore[arg-type]
    expected = torch.autograd.grad(square / 2, leaves)
    assert float(train_squared_norm(cores)) == pytest.approx(float(square.detach()), rel=1e-10)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        found = train_decay_gradients(tuple(core.to(dtype) for core in cores))  # type: ignore[arg-type]
        for gradient, truth in zip(found, expected, strict=True):
            assert gradient.shape == truth.shape and gradient.dtype == dtype
            assert float((gradient - truth).norm()) <= tolerance * max(1.0, float(truth.norm()))


@quick
@given(st.tuples(*[st.integers(1, 5)] * 3), st.tuples(*[st.integers(1, 4)] * 3), seeds)
def test_decay_of_a_tucker_form(dims: tuple[int, int, int], ranks: tuple[int, int, int], seed: int) -> None:
    form = (gaussian(*ranks, seed=seed), *(gaussian(d, r, seed=seed + d) for d, r in zip(dims, ranks, strict=True)))
    leaves = [part.clone().requires_grad_() for part in form]
    square = torch.einsum("abc,ia,jb,kc->ijk", *leaves).square().sum()
    expected = torch.autograd.grad(square / 2, leaves)
    assert float(train_squared_norm(tucker_as_train(*form))) == pytest.approx(float(square.detach()), rel=1e-9)
    for gradient, truth in zip(tucker_decay_gradients(*form), expected, strict=True):
        assert float((gradient - truth).norm()) <= 1e-10 * max(1.0, float(truth.norm()))


def test_decay_acts() -> None:
    """The paper's code adds the term to the loss after the backward pass; here the weight does shrink."""
    cores = tensor_train(gaussian(8, 8), (4, 4, 4), (3, 3))
    before = float(train_squared_norm(cores))
    stepped = tuple(core - 0.01 * d for core, d in zip(cores, train_decay_gradients(cores), strict=True))
    assert float(train_squared_norm(stepped)) < before  # type: ignore[arg-type]


def test_what_is_no_form_is_refused() -> None:
    with pytest.raises(TargetError, match="'cp' is none of"):
        tensor_ranks("cp", (2, 2, 2), 0.5)
    with pytest.raises(ValueError, match="no dimensions"):
        fold_dims(0)
    with pytest.raises(ValueError, match="'tntorch'"):
        tensor_parameters("tucker", (2, 2, 2), (1, 1, 1), "tensorly")
