"""`ortho analyze spectrum` against the definitions, on matrices of known singular values."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from ortho_cli.analysis.figure import Bars, Heatmap
from ortho_cli.analysis.layer_map import layer_map, split_name
from ortho_cli.analysis.spectrum import measure, spectra
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.cli.app import app
from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.surgery.factorize import factorize


def with_values(values: Tensor, rows: int, cols: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(cols, len(values), generator=generator)).Q
    return left * values @ right.T


VALUES = {"flat": torch.ones(20), "steep": 2.0 ** -torch.arange(20.0), "twin": torch.tensor([3.0, 3.0] + [0.0] * 18)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    weights = {f"{name}.weight": with_values(values, 30, 20) for name, values in VALUES.items()}
    conv = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    save_file({**weights, "conv.weight": conv, "norm.weight": torch.ones(4)}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def test_known_spectra(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    found = {layer.name: layer for layer in measure(checkpoint, spectra(checkpoint))}
    assert set(found) == {*VALUES, "conv"}
    assert found["flat"].stable_rank == pytest.approx(20, rel=1e-5)
    assert found["flat"].effective_rank == pytest.approx(20, rel=1e-5)
    assert found["flat"].condition == pytest.approx(1, rel=1e-5)
    assert (found["flat"].rank_90, found["flat"].rank_95, found["flat"].rank_99) == (18, 19, 20)
    assert found["twin"].stable_rank == pytest.approx(2, rel=1e-5) and found["twin"].rank_99 == 2
    assert found["twin"].effective_rank == pytest.approx(2, rel=1e-3)
    assert found["steep"].stable_rank == pytest.approx(4 / 3, rel=1e-5)
    assert found["steep"].norm == pytest.approx((4 / 3) ** 0.5, rel=1e-5)


def test_a_convolution_is_the_matrix_that_factorize_factors(base: Path) -> None:
    conv = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    wanted = torch.linalg.svdvals(conv.permute(0, 2, 1, 3).reshape(18, 12).double())
    assert torch.allclose(spectra(open_checkpoint(base), ["conv"])["conv"], wanted, atol=1e-6)


def test_workers_change_nothing(base: Path) -> None:
    one, many = (spectra(open_checkpoint(base), workers=workers) for workers in (1, 4))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_factors_answer_for_their_product(base: Path, tmp_path: Path) -> None:
    factorize(base, tmp_path / "out.safetensors", rank=5, targets=["steep"], method="svd")
    values = spectra(open_checkpoint(tmp_path / "out.safetensors"), ["steep"])["steep"]
    assert torch.allclose(values[:5], VALUES["steep"][:5].double(), atol=1e-5)
    assert len(values) == 20 and not values[5:].any()


def test_refusals(base: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="matched 0 of 4 layers"):
        spectra(open_checkpoint(base), ["none"])
    save_file({"a.weight": torch.full((4, 4), float("inf"))}, tmp_path / "bad.safetensors")
    with pytest.raises(NumericsError, match="layer a: the weight holds values that are not finite"):
        spectra(open_checkpoint(tmp_path / "bad.safetensors"))
    save_file({"a.weight": torch.ones(4, 4, dtype=torch.int8)}, tmp_path / "int.safetensors")
    with pytest.raises(TargetError, match="is stored as floats"):
        spectra(open_checkpoint(tmp_path / "int.safetensors"))


def test_the_command(base: Path, tmp_path: Path) -> None:
    words = ["analyze", "spectrum", str(base), "-o", str(tmp_path / "report"), "--format", "html,png,csv,json"]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["ok"] is True and content["layers"] == 4
    assert content["command"] == "ortho analyze spectrum base.safetensors"
    saved = json.loads((tmp_path / "report" / "spectrum.json").read_text())
    assert saved["details"] == content["details"]
    with (tmp_path / "report" / "layers.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert float(rows["steep"]["stable_rank"]) == pytest.approx(4 / 3, rel=1e-5)
    assert {path.stem for path in (tmp_path / "report" / "figures").iterdir()} == {
        "spectra", "energy", "effective-rank", "stable-rank", "rank-90",
    }  # fmt: skip
    assert CliRunner().invoke(app, words).exit_code == 6, "the folder exists"
    assert CliRunner().invoke(app, [*words, "--force", "-q"]).exit_code == 0


def test_layers_are_laid_out_by_block_and_kind() -> None:
    assert split_name("a.3.b.1.q", depth=2) == ("a.3.b.1", "q")
    values = {f"model.layer.{i}.{part}": float(i) for i in (0, 2, 10) for part in ("q", "out.0")}
    figure = layer_map("x", "X", values, label="x")
    assert isinstance(figure, Heatmap)
    assert (figure.rows, figure.columns) == (("q", "out.0"), ("0", "2", "10"))
    assert figure.values == ((0.0, 2.0, 10.0), (0.0, 2.0, 10.0))
    assert isinstance(layer_map("x", "X", {"fc": 1.0, "head": float("inf")}, label="x"), Bars)
