"""The two fast forms of a reflection: right gradients, the reference's numbers, and what they keep for backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from adapted import gap
from torch import Tensor, nn

from ortho_cli.linalg.householder import Householder
from ortho_cli.linalg.reflections import reflect_activations
from ortho_cli.linalg.starts import orthonormal_start, paired_start
from ortho_cli.methods.reflected_weight import low_rank_factors, reflected_output
from ortho_cli.methods.reflecting import Form, reflect

FORMS = [
    (Form(), 0),
    (Form(transpose=True), 0),
    (Form(eps=0.3), 0),
    (Form(eps=0.3, transpose=True), 0),
    (Form(span=True), 0),
    (Form(span=True), 2),
    (Form(span=True, transpose=True), 3),
]
IDS = [f"{form}-{frozen}".replace(" ", "") for form, frozen in FORMS]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def start_of(frozen: int, width: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(1)
    return orthonormal_start(width, frozen, generator, torch.float64) if frozen else None


def dense(vectors: Tensor, form: Form, start: Tensor | None) -> Tensor:
    """The matrix `D`, by the operators that merge."""
    matrix = torch.eye(vectors.shape[0], dtype=torch.float64)
    if start is not None:
        matrix = Householder(start, gram_schmidt=True).apply(matrix)
    matrix = Householder(vectors.detach(), eps=form.eps, gram_schmidt=form.span).apply(matrix)
    return matrix.T if form.transpose else matrix


@pytest.mark.parametrize(("form", "frozen"), FORMS, ids=IDS)
def test_both_forms_are_the_operator_and_have_its_gradient(form: Form, frozen: int) -> None:
    width, rank, out = 7, 3, 5
    x, weight, vectors = drawn(4, 2, width), drawn(out, width, seed=2), drawn(width, rank, seed=3).requires_grad_()
    start = start_of(frozen, width)
    wanted = x @ dense(vectors, form, start).T @ weight.T
    up, down = low_rank_factors(lambda columns: weight @ columns, vectors, form=form, start=start)
    ways = [
        reflect(x, vectors, form=form, start=start) @ weight.T,
        reflected_output(x @ weight.T, x, weight, vectors, form=form, start=start),
        x @ (weight + up @ down).T,
    ]
    direction = drawn(4, 2, out, seed=4)
    gradients = [torch.autograd.grad(way, vectors, direction)[0] for way in ways]
    for way, gradient in zip(ways, gradients, strict=True):
        torch.testing.assert_close(way, wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient, gradients[0], rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda a, b: reflect(a, b, form=form, start=start), (x.clone().requires_grad_(), vectors)
    )
    output = (x @ weight.T).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: reflected_output(a, x, weight, b, form=form, start=start), (output, vectors)
    )


def test_a_gradient_is_orthogonal_to_its_column_and_pairs_part_symmetrically() -> None:
    vectors = paired_start(12, 6, torch.Generator().manual_seed(0)).double().requires_grad_()
    x = drawn(9, 12).requires_grad_()
    torch.testing.assert_close(reflect(x, vectors), x, rtol=0, atol=1e-14)
    reflect(x, vectors).backward(drawn(9, 12, seed=5))
    assert vectors.grad is not None
    torch.testing.assert_close((vectors.grad * vectors).sum(0), torch.zeros(6).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(vectors.grad[:, 0::2], -vectors.grad[:, 1::2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_lengths_of_columns_do_not_matter(scale: float) -> None:
    vectors, x = drawn(16, 4, seed=1).float(), drawn(8, 16).float()
    scaled = vectors * torch.tensor([1.0, scale, 1.0, scale])
    torch.testing.assert_close(reflect(x, scaled), reflect_activations(x, vectors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_with_float32_vectors(dtype: torch.dtype) -> None:
    vectors, x = drawn(64, 8, seed=1).float().requires_grad_(), drawn(32, 64).requires_grad_()
    half = x.detach().to(dtype).requires_grad_()
    wanted, found = reflect(x, vectors), reflect(half, vectors)
    assert found.dtype == dtype
    assert gap(found.double(), wanted) < 8e-3
    direction = drawn(32, 64, seed=2)
    wanted_x, wanted_u = torch.autograd.grad(wanted, (x, vectors), direction)
    found_x, found_u = torch.autograd.grad(found, (half, vectors), direction.to(dtype))
    assert (found_x.dtype, found_u.dtype) == (dtype, torch.float32)
    assert gap(found_x.double(), wanted_x) < 1e-2
    assert gap(found_u, wanted_u) < 2e-2


def test_autocast_chooses_the_type_and_small_products_stay_float32() -> None:
    vectors, x = drawn(64, 8, seed=1).float().requires_grad_(), drawn(32, 64).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = reflect(x, vectors)
        assert found.dtype == torch.bfloat16
        found.sum().backward()  # even where backward runs under autocast
    again = reflect(x.detach().bfloat16(), vectors.detach().requires_grad_())
    assert torch.equal(found, again)
    assert vectors.grad is not None and vectors.grad.dtype == torch.float32
    wanted = torch.autograd.grad(reflect(x, vectors).sum(), vectors)[0]
    assert gap(vectors.grad, wanted) < 2e-2


def test_vectors_kept_in_half_precision_are_raised() -> None:
    vectors, x = drawn(64, 8, seed=1).bfloat16().requires_grad_(), drawn(32, 64).bfloat16()
    found = reflect(x, vectors)
    assert torch.equal(found, reflect(x, vectors.detach().float()))
    found.sum().backward()
    assert vectors.grad is not None and vectors.grad.dtype == torch.bfloat16


def test_any_shape_of_input_and_none_at_all() -> None:
    vectors = drawn(6, 2)
    for shape in ((6,), (1, 6), (2, 3, 4, 6), (0, 6)):
        assert reflect(drawn(*shape), vectors).shape == shape
    strided = drawn(6, 5).T
    torch.testing.assert_close(reflect(strided, vectors), reflect_activations(strided, vectors))
    with pytest.raises(ValueError, match="width 5"):
        reflect(drawn(3, 5), vectors)


def test_differentiating_twice_is_refused_not_wrong() -> None:
    vectors, x = drawn(6, 2).requires_grad_(), drawn(3, 6).requires_grad_()
    (first,) = torch.autograd.grad(reflect(x, vectors).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@contextmanager
def kept_bytes(*parameters: Tensor) -> Iterator[list[int]]:
    """Bytes that are kept for backward inside the block, each memory once, without the parameters'."""
    own = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    seen: dict[int, int] = {}
    total: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(seen.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width", "rank"), [(512, 320, 8), (512, 320, 32), (4096, 320, 32)])
def test_it_keeps_what_a_lora_keeps(dtype: torch.dtype, tokens: int, width: int, rank: int) -> None:
    base = nn.Linear(width, width, dtype=dtype).requires_grad_(False)
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    down, up = torch.randn(rank, width, dtype=dtype), torch.randn(width, rank, dtype=dtype)
    vectors = torch.randn(width, rank)
    for parameter in (down, up, vectors):
        parameter.requires_grad_()
    with kept_bytes(base.weight, down, up) as lora:
        base(x) + nn.functional.linear(nn.functional.linear(x, down), up) * 1.0
    with kept_bytes(base.weight, vectors) as ours:
        base(reflect(x, vectors))
    assert lora[0] == (tokens * (width + rank)) * x.element_size()
    assert ours[0] <= 1.02 * lora[0]


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")  # dynamo's
def test_it_compiles() -> None:
    vectors, x = drawn(16, 4).float().requires_grad_(), drawn(8, 16).float().requires_grad_()
    compiled = torch.compile(lambda a, b: reflect(a, b).square().sum(), backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x, vectors), (x, vectors))
    wanted = torch.autograd.grad(reflect(x, vectors).square().sum(), (x, vectors))
    torch.testing.assert_close(found, wanted)
