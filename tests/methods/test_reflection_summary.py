"""How far reflections are from orthogonal, and how far they turn: against the rotation matrix itself."""

from __future__ import annotations

import csv
from math import pi
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ortho_cli as ortho
from ortho_cli.methods.adapter_layer import adapter_layers
from ortho_cli.methods.hra_layer import HRALayer
from ortho_cli.methods.method import Context
from ortho_cli.methods.orthogonality import reflection_details, reflection_summary
from ortho_cli.recipe.methods import HRA
from ortho_cli.registry import resolve

WIDTH, RANK = 12, 4


def adapted(**options: object) -> HRALayer:
    """A layer with an adapter, as training might have left it."""
    torch.manual_seed(0)
    model = ortho.add_adapter(nn.Sequential(nn.Linear(WIDTH, 3)), rank=RANK, targets=["0"], **options)  # type: ignore[arg-type]
    layer = model[0]
    assert isinstance(layer, HRALayer)
    with torch.no_grad():
        layer.vectors.add_(0.3 * torch.randn_like(layer.vectors))
    return layer


def rotation(vectors: Tensor) -> Tensor:
    """The product of the reflections, one after the other."""
    found = torch.eye(len(vectors), dtype=torch.float64)
    for vector in (vectors.detach().double() / vectors.detach().double().norm(dim=0)).T:
        found = found @ (torch.eye(len(vectors), dtype=torch.float64) - 2 * torch.outer(vector, vector))
    return found


def test_defect_and_angle_are_those_of_the_matrix() -> None:
    layer = adapted()
    unit = layer.vectors.detach().double() / layer.vectors.detach().double().norm(dim=0)
    phases = torch.linalg.eigvals(rotation(layer.vectors)).angle().abs()
    found = reflection_details(layer)
    assert found["defect"] == pytest.approx(float((torch.eye(RANK) - unit.T @ unit).norm()))
    assert found["angle"] == pytest.approx(float(phases.sum()) / 2 / (RANK // 2), abs=1e-6)  # phases come in pairs
    assert reflection_summary([layer, layer]) == {
        "defect_mean": found["defect"], "defect_max": found["defect"], "angle_mean": found["angle"],
    }  # fmt: skip


def test_two_orthogonal_reflections_turn_by_half_a_circle() -> None:
    layer = adapted()
    with torch.no_grad():
        layer.vectors.copy_(torch.eye(WIDTH)[:, :RANK])
    assert reflection_details(layer) == {"defect": 0.0, "angle": pytest.approx(pi)}


def test_gram_schmidt_has_no_defect_and_soft_reflections_no_angle() -> None:
    assert reflection_details(adapted(gram_schmidt=True))["defect"] == 0.0
    assert reflection_details(adapted(eps=1e-3)).keys() == {"defect"}


def test_a_run_exports_the_table_of_its_layers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
    method = resolve("methods", "hra")(HRA(name="hra", rank=RANK, targets=("0", "1")))
    method.prepare(model, Context(seed=0, total_steps=1, task="classify", base=None))
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.vectors.add_(torch.randn_like(layer.vectors))  # type: ignore[operator,arg-type]
    method.export(model, tmp_path / "hra")
    with (tmp_path / "hra" / "layers.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["0", "1"]
    assert sum(float(row["defect"]) for row in rows) / 2 == pytest.approx(method.scalars()["defect_mean"])
    assert sum(float(row["angle"]) for row in rows) / 2 == pytest.approx(method.scalars()["angle_mean"])
    other = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
    assert adapter_layers(ortho.load_adapter(other, tmp_path / "hra")).keys() == {"0", "1"}  # the table is no obstacle
