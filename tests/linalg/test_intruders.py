"""Best cosines between singular vectors of a weight before and after a change, against two full decompositions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ortho_cli.linalg.intruders import NULL, closest_directions


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(before: Tensor, after: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The definition, with all vectors of both weights; those of the null space are none."""
    found = []
    for side in (0, 2):
        (old, values, _), (new, own, _) = ((s[side], s[1], 0) for s in map(_svd, (before.double(), after.double())))
        old, new = old[:, values > NULL * values.max()], new[:, own > NULL * own.max()][:, :count]
        found.append((old.T @ new).abs().amax(0))
    return found[0], found[1]


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vt.T


def decaying(rows: int, columns: int, power: float = 1.0) -> Tensor:
    """A weight whose singular values fall as those of trained ones do."""
    k = min(rows, columns)
    u, v = torch.linalg.qr(random(rows, k)).Q, torch.linalg.qr(random(columns, k, seed=1)).Q
    return u * torch.arange(1, k + 1, dtype=torch.float64) ** -power @ v.T


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (15, 15), (7, 1), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_values_are_those_of_the_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    before = random(*shape).to(dtype)
    after = before + (3 * random(shape[0], 1, seed=2) @ random(1, shape[1], seed=3)).to(dtype)
    found = closest_directions(before, after, 4)
    output, entering = naive(before, after, 4)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert torch.allclose(found.output, output, atol=tolerance) and torch.allclose(
        found.input, entering, atol=tolerance
    )
    assert found.method == "exact" and len(found.output) == min(4, *shape)


def test_a_rotation_of_the_inputs_keeps_the_outputs() -> None:
    before = decaying(40, 30)
    found = closest_directions(before, before @ torch.linalg.qr(random(30, 30, seed=5)).Q, 8)
    assert found.output.min() > 1 - 1e-9 and found.input.max() < 0.9


def test_degenerate_weights() -> None:
    zero, one = torch.zeros(6, 4), torch.outer(torch.arange(1.0, 7.0), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert len(closest_directions(one, zero).output) == 0
    new = closest_directions(zero, one)
    assert (new.output.tolist(), new.input.tolist()) == ([0.0], [0.0])
    same = closest_directions(one, 2 * one)
    assert same.output.tolist() == pytest.approx([1.0]) and same.input.tolist() == pytest.approx([1.0])
    other = torch.zeros(6, 4)
    other[0, 3] = 100.0  # in the null space of the first: no direction of it
    assert closest_directions(one, one + other, 1).input.item() < 0.1


@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (900, 200)])
@pytest.mark.parametrize("strength", [0.0, 0.2, 5.0])
def test_lanczos_decides_as_the_decomposition(shape: tuple[int, int], strength: float) -> None:
    before = decaying(*shape, power=0.6).float()
    spike = random(shape[0], 1, seed=2) @ random(1, shape[1], seed=3)
    after = (before.double() + strength * spike / spike.norm()).float()
    quick, exact = (closest_directions(before, after, 6, method=method) for method in ("lanczos", "exact"))
    for side in ("output", "input"):
        found, wanted = getattr(quick, side), getattr(exact, side)
        assert torch.allclose(found[wanted > 0.6], wanted[wanted > 0.6], atol=0.03), (found, wanted)
        assert (found > wanted - 0.03).all() and torch.equal(found < 0.5, wanted < 0.5), (found, wanted)
    assert int((exact.output < 0.5).sum()) == (1 if strength == 5 else 0)


def test_the_faint_end_of_a_long_spectrum_hides_no_intruder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a new direction lies on old ones so weak that few steps take them for a single one."""
    monkeypatch.setattr("ortho_cli.linalg.intruders.STEPS", 16)
    before = decaying(500, 400, power=0.5).float()
    spikes = random(500, 3, seed=7) @ random(3, 400, seed=8)
    after = before + (2 * spikes / torch.linalg.matrix_norm(spikes, 2)).float()
    monkeypatch.setattr("ortho_cli.linalg.intruders.FAINT", 0.02)
    blind = closest_directions(before, after, 5, method="lanczos")
    assert int((blind.input < 0.5).sum()) < 3, "what the threshold is for"
    monkeypatch.setattr("ortho_cli.linalg.intruders.FAINT", 3.4 / 16)
    found = closest_directions(before, after, 5, method="lanczos")
    exact = closest_directions(before, after, 5, method="exact")
    for side in ("output", "input"):
        assert torch.equal(getattr(found, side) < 0.5, getattr(exact, side) < 0.5)
    assert int((found.input < 0.5).sum()) == 3


def test_a_flat_spectrum_is_no_alarm() -> None:
    """Its vectors are hardly apart: turned a little, each is a mix of old ones of nearly the same value."""
    before = random(300, 200).float()
    turn = torch.linalg.qr(torch.eye(200) + 0.002 * random(200, 200, seed=4).float()).Q
    found = closest_directions(before, before @ turn, 5, method="lanczos")
    assert found.output.min() > 0.5 and found.input.min() > 0.5
    new = closest_directions(before, before + 300 * random(300, 1, seed=5).float() @ random(1, 200, seed=6).float(), 1,
                             method="lanczos")  # fmt: skip
    assert new.output.item() < 0.4 and new.input.item() < 0.4


def test_few_columns_and_an_invariant_start() -> None:
    before = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    found = closest_directions(before, 2 * before, 3, method="lanczos")
    assert found.output.tolist() == pytest.approx([1.0] * 3, abs=1e-3) == found.input.tolist()
