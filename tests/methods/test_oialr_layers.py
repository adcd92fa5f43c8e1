"""Layers with a frozen basis: they compute what the dense layer does, in either form, and train the core only."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest
import torch
from adapted import gap
from torch import Tensor, nn

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg.matricize import Matricization
from ortho_cli.methods import basis_layers
from ortho_cli.methods.basis_layers import BasisLayer, basis_layer, decompose, step_cost

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear wide": (nn.Linear(12, 7), (5, 3, 12)),
    "linear tall": (nn.Linear(7, 12, bias=False), (5, 7)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), padding=(1, 0), stride=(1, 2), dilation=(2, 1)), (2, 4, 8, 9)),
    "conv2d unbatched": (nn.Conv2d(4, 6, 3), (4, 8, 9)),
    "conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2, padding="same"), (2, 4, 5, 5)),
    "conv2d reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False), (2, 4, 5, 5)),
    "conv3d": (nn.Conv3d(2, 5, (1, 3, 3), padding=(0, 1, 1)), (1, 2, 3, 4, 4)),
}


def filled(base: nn.Module, rank: int | None = None) -> BasisLayer:
    layer = basis_layer(base)
    u, values, vt = decompose(layer.form.to_matrix(base.weight), "layer")
    layer.set_parts(u[..., :rank], values[..., :rank], vt[..., :rank, :])
    return layer


@pytest.fixture(params=["parts", "product"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of applying a layer, whatever the sizes would choose."""
    costs = (0, 1) if request.param == "parts" else (1, 0)
    monkeypatch.setattr(basis_layers, "step_cost", lambda *sizes, training: costs)
    return str(request.param)


@pytest.mark.parametrize("name", LAYERS)
def test_full_rank_is_the_dense_layer_and_its_gradient(name: str, form: str) -> None:
    base, shape = LAYERS[name]
    layer, inputs = filled(base), torch.randn(shape)
    outputs = layer(inputs)
    wanted = base(inputs)
    assert gap(outputs, wanted) < 1e-5
    direction = torch.randn_like(outputs)
    base.zero_grad()
    (wanted * direction).sum().backward()
    (outputs * direction).sum().backward()
    u, vt = layer.form.unstack(layer.U, layer.VT)
    gradient = u.mT @ layer.form.to_matrix(base.weight.grad) @ vt.mT
    assert layer.M.grad is not None and layer.U.grad is None and layer.VT.grad is None
    assert gap(layer.M.grad.reshape(gradient.shape), gradient) < 1e-4


@pytest.mark.parametrize("name", LAYERS)
def test_both_forms_are_one_function_at_low_rank(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, shape = LAYERS[name]
    layer, inputs = filled(base, 2), torch.randn(shape)
    found = []
    for costs in ((0, 1), (1, 0)):
        monkeypatch.setattr(basis_layers, "step_cost", lambda *sizes, training, costs=costs: costs)
        found.append(layer(inputs))
    assert gap(found[0], found[1]) < 1e-5
    dense = layer.dense()
    assert gap(dense(inputs), found[0]) < 1e-5


def test_the_cheaper_form_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below break-even the three thin products, above it and for few vectors the whole."""
    layer = filled(nn.Linear(64, 64), 8)
    assert not layer.forms_product(4096)
    assert filled(nn.Linear(64, 64)).forms_product(4096)
    parts, whole = step_cost(64, 64, 8, 4096, training=False)
    assert parts == 4096 * 8 * (128 + 8) and whole == 4096 * 64 * 64 + 8 * (64 * 8 + 64 * 64)
    assert step_cost(64, 64, 30, 10**9, training=True)[0] < step_cost(64, 64, 30, 10**9, training=True)[1]


def test_transformers_conv1d() -> None:
    pytorch_utils: Any = pytest.importorskip("transformers.pytorch_utils")
    base = pytorch_utils.Conv1D(6, 10)
    inputs = torch.randn(3, 10)
    assert gap(filled(base)(inputs), base(inputs)) < 1e-5


def test_the_bias_is_the_layers_own() -> None:
    base = nn.Linear(5, 4)
    layer = basis_layer(base)
    assert layer.bias is base.bias
    assert {name for name, part in layer.named_parameters() if part.requires_grad} == {"bias", "M"}


def test_what_has_no_such_form() -> None:
    with pytest.raises(TargetError, match="Bilinear"):
        basis_layer(nn.Bilinear(2, 2, 2))
    with pytest.raises(NumericsError, match="layer a has values that are not finite"):
        decompose(torch.tensor([[float("nan")]]), "layer a")


def test_axes_of_a_kernel_in_the_rows() -> None:
    weight = torch.randn(4, 6, 3, 2)
    for axes, shape in ((0, (4, 36)), (1, (12, 12)), (2, (24, 6)), (None, (12, 12))):
        view = Matricization("conv", (4, 6, 3, 2), row_axes=axes)
        matrix: Tensor = view.to_matrix(weight)
        assert tuple(matrix.shape) == shape == view.matrix_shape
        assert torch.equal(view.to_weight(matrix), weight)
    assert torch.equal(Matricization("conv", (4, 6, 3, 2), row_axes=0).to_matrix(weight), weight.flatten(1))
    with pytest.raises(TargetError, match="no 3 axes"):
        Matricization("conv", (4, 6, 3, 2), row_axes=3)


@pytest.mark.parametrize("module", [
    "basis_layers", "oialr_model", "oialr_moments", "oialr_ranks", "oialr_select", "projected_attention",
])  # fmt: skip
def test_examples(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"ortho_cli.methods.{module}"))
    assert found.attempted and not found.failed
