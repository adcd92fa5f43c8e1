"""Products that are never formed, against the products formed in float64; decay against autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ortho_cli.linalg import frobenius
from ortho_cli.linalg.frobenius import add_decay_gradients_, decay_gradients
from ortho_cli.linalg.heads import output_value, output_value_weights, query_key, query_key_weights
from ortho_cli.linalg.product import (
    factor_bound,
    non_orthogonality,
    nuclear_norm,
    product_norm,
    rebalance,
    squared_norm,
)
from ortho_cli.linalg.spectral import spectral_factors

quick = settings(deadline=None, max_examples=100)
U = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
VT = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 1.0]], dtype=torch.float64)
M = torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def factors(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two or three factors, one head or many, the rank below, between and above the sides."""
    batch = draw(st.sampled_from([(), (), (4,), (2, 3)]))
    rows, cols, rank = (draw(st.integers(1, 12)) for _ in range(3))
    seed = draw(st.integers(0, 2**20))
    mid = gaussian(*batch, rank, rank, seed=seed + 2) if draw(st.booleans()) else None
    return gaussian(*batch, rows, rank, seed=seed), gaussian(*batch, rank, cols, seed=seed + 1), mid


def formed(u: Tensor, vt: Tensor, mid: Tensor | None) -> Tensor:
    return u @ vt if mid is None else u @ mid @ vt


def test_the_fixtures_of_the_facts() -> None:
    d_u, d_vt = decay_gradients(U, VT)
    assert d_u.tolist() == [[5, 11], [22, 52], [16, 37]] and d_vt.tolist() == [[5, 8, 1], [16, 22, 5]]
    assert float(squared_norm(U, VT)) == 162
    d_u, d_vt, d_mid = decay_gradients(U, VT, M)
    assert d_u.tolist() == [[53, 74], [148, 208], [127, 178]]
    assert d_mid.tolist() == [[54, 126], [126, 297]]
    assert d_vt.tolist() == [[14, 20, 4], [82, 112, 26]]
    assert float(squared_norm(U, VT, M)) == 774
    assert [float(share) for share in non_orthogonality(U, VT)] == pytest.approx([0.254000, 0.506584], abs=5e-7)


def test_the_fixtures_of_attention() -> None:
    q = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    k = torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
    for heads, d_q, d_k in (
        (1, [[2, 2, 6], [2, 5, 9]], [[9, 5, 2], [6, 2, 2]]),
        (2, [[2, 0, 4], [0, 5, 5]], [[5, 5, 0], [4, 0, 2]]),
    ):
        found = query_key_weights(*decay_gradients(*query_key(q, k, heads)), heads)
        assert [part.tolist() for part in found] == [d_q, d_k]


@quick
@given(factors(), st.sampled_from([torch.float64, torch.float32]))
def test_measures_are_those_of_the_product(case: tuple[Tensor, Tensor, Tensor | None], dtype: torch.dtype) -> None:
    product = formed(*case)
    u, vt, mid = (part if part is None else part.to(dtype) for part in case)
    assert u is not None and vt is not None
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    norm = product.flatten(-2).norm(dim=-1)
    assert torch.allclose(product_norm(u, vt, mid).double(), norm, rtol=tolerance, atol=tolerance)
    assert torch.allclose(squared_norm(u, vt, mid).double(), norm.square(), rtol=tolerance, atol=tolerance)
    values = torch.linalg.svdvals(product)
    assert torch.allclose(nuclear_norm(u, vt, mid).double(), values.sum(-1), rtol=tolerance, atol=tolerance)
    if mid is None:
        assert bool((factor_bound(u, vt) >= nuclear_norm(u, vt) * (1 - tolerance)).all())
        grams = [u.mT @ u, vt @ vt.mT]
        for share, gram in zip(non_orthogonality(u, vt), grams, strict=True):
            off = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
            expected = off.flatten(-2).norm(dim=-1) / gram.flatten(-2).norm(dim=-1)
            assert torch.allclose(share, expected, rtol=tolerance, atol=tolerance)


@quick
@given(factors())
def test_decay_is_the_gradient_of_the_square_norm(case: tuple[Tensor, Tensor, Tensor | None]) -> None:
    leaves = [part.clone().requires_grad_() for part in case if part is not None]
    product = leaves[0] @ leaves[1] if len(leaves) == 2 else leaves[0] @ leaves[2] @ leaves[1]
    expected = torch.autograd.grad(product.square().sum() / 2, leaves)
    square = product.detach().square().sum()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        own = [part.to(dtype) for part in case if part is not None]
        found = decay_gradients(*own)
        for part, gradient, truth in zip(own, found, expected, strict=True):
            assert gradient.shape == truth.shape and gradient.dtype == dtype
            assert float((gradient - truth).norm()) <= tolerance * max(1.0, float(truth.norm()))
            # The inner product with every factor is the square norm.
            assert float((part * gradient).sum()) == pytest.approx(float(square), rel=10 * tolerance, abs=1e-5)


@quick
@given(factors(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_the_law_of_the_squared_norm_differentiates(
    case: tuple[Tensor, Tensor, Tensor | None], dtype: torch.dtype
) -> None:
    leaves = [part.to(dtype).requires_grad_() for part in case if part is not None]
    (squared_norm(*leaves).sum() / 2).backward()
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 2e-2}[dtype]
    for leaf, gradient in zip(leaves, decay_gradients(*(leaf.detach() for leaf in leaves)), strict=True):
        assert leaf.grad is not None
        difference = (leaf.grad.double() - gradient.double()).norm()
        assert float(difference) <= tolerance * max(1.0, float(gradient.norm()))


def test_decay_keeps_the_balance_and_knows_no_gauge() -> None:
    u, vt, turn = gaussian(7, 3), gaussian(3, 5, seed=1), gaussian(3, 3, seed=2)
    d_u, d_vt = decay_gradients(u, vt)
    assert torch.allclose(u.mT @ d_u, d_vt @ vt.mT)
    back = torch.linalg.inv(turn)
    turned_u, turned_vt = decay_gradients(u @ turn, back @ vt)
    assert torch.allclose(turned_u @ turn.mT, d_u) and torch.allclose(back.mT @ turned_vt, d_vt)


def test_decay_of_one_matrix_is_weight_decay() -> None:
    weight = gaussian(6, 4)
    d_weight, _ = decay_gradients(weight, torch.eye(4, dtype=torch.float64))
    assert torch.allclose(d_weight, weight)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_many_layers_are_decayed_in_place(together: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frobenius, "UNBATCHED", () if together else ("cpu",))
    monkeypatch.setattr(frobenius, "BUCKET_ENTRIES", 100)
    shapes = [(6, 2, 5), (6, 2, 5), (9, 3, 4), (6, 2, 5), (2, 4, 5), (6, 2, 5), (3, 3, 3)]
    layers: list[tuple[Tensor, ...]] = []
    for seed, (rows, rank, cols) in enumerate(shapes):
        parts = [gaussian(rows, rank, seed=seed), gaussian(rank, cols, seed=seed + 50)]
        parts += [gaussian(rank, rank, seed=seed + 90)] * (seed % 2)
        layers.append(tuple(part.to(dtype) for part in parts))
    layers.append((gaussian(2, 6, 3).to(dtype), gaussian(2, 3, 5, seed=1).to(dtype)))
    layers.append((gaussian(2, 2, 6, 3).to(dtype), gaussian(2, 2, 3, 5, seed=1).to(dtype)))
    gradients = [tuple(torch.ones_like(part) for part in parts) for parts in layers]
    add_decay_gradients_(layers, gradients, 0.25)
    tolerance = {torch.float16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for parts, sums in zip(layers, gradients, strict=True):
        for total, gradient in zip(sums, decay_gradients(*parts), strict=True):
            assert total.dtype == dtype
            expected = 1 + 0.25 * gradient.double()
            assert float((total.double() - expected).norm()) <= tolerance * float(expected.norm())
    with pytest.raises(ValueError, match="9 layers and gradients of 8"):
        add_decay_gradients_(layers, gradients[1:], 0.25)


def test_decay_ignores_autocast() -> None:
    u, vt = gaussian(20, 3, dtype=torch.float32), gaussian(3, 20, seed=1, dtype=torch.float32)
    plain, cast = ([torch.zeros_like(u), torch.zeros_like(vt)] for _ in range(2))
    add_decay_gradients_([(u, vt)], [tuple(plain)], 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        add_decay_gradients_([(u, vt)], [tuple(cast)], 1.0)
    assert all(map(torch.equal, plain, cast))


@quick
@given(factors(), st.integers(1, 12))
def test_rebalancing_keeps_the_product_or_its_best_part(case: tuple[Tensor, Tensor, Tensor | None], rank: int) -> None:
    product = formed(*case)
    scale = max(1.0, float(product.norm()))
    u, vt = rebalance(*case)
    assert float((u @ vt - product).norm()) <= 1e-10 * scale
    diagonal = torch.diag_embed(torch.linalg.svdvals(product)[..., : u.shape[-1]])
    assert torch.allclose(u.mT @ u, diagonal, atol=1e-9 * scale)
    assert torch.allclose(vt @ vt.mT, diagonal, atol=1e-9 * scale)
    u, vt = rebalance(*case, rank=rank)
    best = torch.linalg.svdvals(product)[..., rank:].norm()
    assert u.shape[-1] <= rank
    assert float((u @ vt - product).norm()) == pytest.approx(float(best), abs=1e-9 * scale)


def test_spectral_factors_meet_the_nuclear_bound() -> None:
    """At the start the bound that weight decay penalises is the nuclear norm, and nothing is out of square."""
    weight = gaussian(192, 192, dtype=torch.float32) * (2 / 576) ** 0.5
    found = spectral_factors(weight, 21, method="svd")
    nuclear = float(nuclear_norm(found.u, found.vt))
    assert nuclear == pytest.approx(float(factor_bound(found.u, found.vt)), rel=1e-5)
    assert nuclear == pytest.approx(30.18, abs=0.5)
    assert float(product_norm(found.u, found.vt)) == pytest.approx(6.60, abs=0.1)
    assert max(float(share) for share in non_orthogonality(found.u, found.vt)) < 1e-5


def test_norms_are_exact_where_float32_sums_are_not() -> None:
    u, vt = gaussian(4000, 4, dtype=torch.float32), gaussian(4, 3000, seed=1, dtype=torch.float32)
    exact = float((u.double() @ vt.double()).norm())
    assert float(product_norm(u, vt)) == pytest.approx(exact, rel=1e-6)


HEADS = [(4, 4), (4, 2), (4, 1), (1, 1)]


@pytest.mark.parametrize(("heads", "shared"), HEADS)
def test_products_of_heads(heads: int, shared: int) -> None:
    size, width = 3, 10
    q, k = gaussian(heads * size, width), gaussian(shared * size, width - 2, seed=1)
    o, v = gaussian(width + 1, heads * size, seed=2), gaussian(shared * size, width - 2, seed=3)
    for head in range(heads):
        of_query, of_shared = slice(head * size, (head + 1) * size), head * shared // heads
        of_key = slice(of_shared * size, (of_shared + 1) * size)
        place = head % (heads // shared)
        u, vt = query_key(q, k, heads, shared)
        rows = slice(place * width, (place + 1) * width)
        assert torch.allclose(u[of_shared, rows] @ vt[of_shared], q[of_query].mT @ k[of_key])
        u, vt = output_value(o, v, heads, shared)
        rows = slice(place * (width + 1), (place + 1) * (width + 1))
        assert torch.allclose(u[of_shared, rows] @ vt[of_shared], o[:, of_query] @ v[of_key])
    assert all(map(torch.equal, query_key_weights(*query_key(q, k, heads, shared), heads), (q, k)))
    assert all(map(torch.equal, output_value_weights(*output_value(o, v, heads, shared), heads), (o, v)))


@pytest.mark.parametrize(("heads", "shared"), HEADS)
def test_balancing_heads_leaves_attention_as_it_is(heads: int, shared: int) -> None:
    size, width, tokens = 3, 12, 7
    q, k = gaussian(heads * size, width), gaussian(shared * size, width, seed=1)
    o, v = gaussian(width, heads * size, seed=2), gaussian(shared * size, width, seed=3)
    x = gaussian(2, tokens, width, seed=4)

    def attention(q: Tensor, k: Tensor, o: Tensor, v: Tensor) -> Tensor:
        def split(weight: Tensor, count: int) -> Tensor:
            return (x @ weight.mT).unflatten(-1, (count, -1)).transpose(1, 2)

        mixed = torch.nn.functional.scaled_dot_product_attention(
            split(q, heads), split(k, shared), split(v, shared), enable_gqa=True
        )
        return mixed.transpose(1, 2).flatten(2) @ o.mT

    balanced_q, balanced_k = query_key_weights(*rebalance(*query_key(q, k, heads, shared)), heads)
    balanced_o, balanced_v = output_value_weights(*rebalance(*output_value(o, v, heads, shared)), heads)
    assert torch.allclose(attention(balanced_q, balanced_k, balanced_o, balanced_v), attention(q, k, o, v), atol=1e-9)
    shares = non_orthogonality(*query_key(balanced_q, balanced_k, heads, shared))
    assert max(float(share.max()) for share in shares) < 1e-10


@pytest.mark.parametrize(("heads", "shared"), HEADS)
def test_decay_of_heads_is_the_gradient_over_all_heads(heads: int, shared: int) -> None:
    size, width = 3, 8
    q = gaussian(heads * size, width).requires_grad_()
    k = gaussian(shared * size, width, seed=1).requires_grad_()
    by_head = k.view(shared, size, width).repeat_interleave(heads // shared, 0)
    products = q.view(heads, size, width).mT @ by_head
    expected = torch.autograd.grad(products.square().sum() / 2, (q, k))
    found = query_key_weights(*decay_gradients(*query_key(q.detach(), k.detach(), heads, shared)), heads)
    assert all(torch.allclose(own, truth) for own, truth in zip(found, expected, strict=True))


def test_weights_that_are_no_heads_are_refused() -> None:
    from ortho_cli.errors import TargetError

    for q, k, heads, shared in ((10, 10, 4, None), (8, 8, 4, 2), (8, 4, 3, 2)):
        with pytest.raises(TargetError, match="do not go into"):
            query_key(torch.ones(q, 5), torch.ones(k, 5), heads, shared)


def test_views_of_heads_share_their_weights() -> None:
    q, k = gaussian(8, 6), gaussian(8, 6, seed=1)
    u, vt = query_key(q, k, heads=2)
    assert u.data_ptr() == q.data_ptr() and vt.data_ptr() == k.data_ptr()
    o = gaussian(6, 8, seed=2)
    assert output_value(o, k, heads=2)[0].data_ptr() == o.data_ptr()
