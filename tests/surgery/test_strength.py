"""Strength of adapters in files: 0 is the base, 1 the adapter, between them along the rotation; in every verb alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import Tensors, metadata, peft_folder, read, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ortho_cli.checkpoints.adapters import read_adapter
from ortho_cli.errors import TargetError, UsageError
from ortho_cli.surgery.convert import convert
from ortho_cli.surgery.merge import merge
from ortho_cli.surgery.strengths import given_strengths, split_strength

WIDTHS = {"up.q": 16, "up.k": 16, "down.q": 12}


def model(dtype: torch.dtype = torch.float64) -> Tensors:
    torch.manual_seed(0)
    weights = {f"{name}.weight": torch.randn(20, width).to(dtype) for name, width in WIDTHS.items()}
    return weights | {"up.q.bias": torch.randn(20).to(dtype), "steps": torch.tensor([3])}


def hra(folder: Path, rank: int = 4, seed: int = 1, bring: Tensors | None = None, **config: Any) -> Path:
    torch.manual_seed(seed)
    vectors = {f"{name}.hra_u": torch.randn(width, rank) for name, width in WIDTHS.items()}
    return peft_folder(folder, vectors | (bring or {}), peft_type="HRA", r=rank, target_modules=["q", "k"], **config)


def lora(folder: Path, seed: int = 2) -> Path:
    torch.manual_seed(seed)
    factors = {}
    for name, width in WIDTHS.items():
        factors[f"{name}.lora_A.weight"] = torch.randn(2, width)
        factors[f"{name}.lora_B.weight"] = torch.randn(20, 2)
    return peft_folder(folder, factors, peft_type="LORA", r=2, lora_alpha=4, target_modules=["q", "k"])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file(model(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def merged(base: Path, adapters: Any, strength: Any = 1.0, **options: Any) -> Tensors:
    out = base.parent / "merged.safetensors"
    merge(base, adapters, out, strength=strength, exact=True, force=True, **options)
    return read(out)


def same(found: Tensors, wanted: Tensors, tolerance: float = 1e-10) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert relative_error(found[name], tensor) <= tolerance, name


def weights(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".weight")}


class TestLaws:
    @pytest.mark.parametrize("kind", [hra, lora])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_half_twice_is_one(self, tmp_path: Path, kind: Any, dtype: torch.dtype) -> None:
        save_file(model(dtype), tmp_path / "base.safetensors")
        adapter = kind(tmp_path / "adapter")
        whole = merged(tmp_path / "base.safetensors", adapter)
        half = tmp_path / "half.safetensors"
        merge(tmp_path / "base.safetensors", adapter, half, strength=0.5, exact=True)
        rounding = 1e-10 if dtype == torch.float64 else 2e-7
        same(merged(half, adapter, 0.5), whole, rounding)
        same(merged(tmp_path / "base.safetensors", [(adapter, 0.5), (adapter, 0.5)]), whole, rounding)

    def test_zero_changes_no_byte(self, base: Path, tmp_path: Path) -> None:
        report = merge(base, [hra(tmp_path / "hra"), lora(tmp_path / "lora")], tmp_path / "out.safetensors", strength=0)
        found = read(tmp_path / "out.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in model().items())
        assert report.layers == 0 and report.totals["strengths"] == ["hra: 0", "lora: 0"]

    @pytest.mark.parametrize("strength", [0.3, 0.5, 0.9, 1.7, -1.0])
    def test_rotations_keep_singular_values_where_lines_do_not(
        self, base: Path, tmp_path: Path, strength: float
    ) -> None:
        adapter = hra(tmp_path / "hra")
        found = merged(base, adapter, strength)
        whole = merged(base, adapter)
        for name, weight in weights(model()).items():
            wanted = torch.linalg.svdvals(weight)
            assert torch.allclose(torch.linalg.svdvals(found[name]), wanted, rtol=1e-10)
            line = weight + strength * (whole[name] - weight)
            assert not torch.allclose(torch.linalg.svdvals(line), wanted, rtol=1e-3)

    def test_low_rank_sums_are_linear(self, base: Path, tmp_path: Path) -> None:
        adapter = lora(tmp_path / "lora")
        whole = merged(base, adapter)
        same(merged(base, adapter, 0.3), {name: torch.lerp(t, whole[name], 0.3) if name.endswith(".weight") else t
                                          for name, t in model().items()})  # fmt: skip

    def test_minus_one_is_the_inverse(self, base: Path, tmp_path: Path) -> None:
        adapter = hra(tmp_path / "hra")
        same(merged(base, [(adapter, 1.0), (adapter, -1.0)]), model())

    def test_the_angle_follows(self, base: Path, tmp_path: Path) -> None:
        adapter = hra(tmp_path / "hra")
        one = merge(base, adapter, tmp_path / "1.safetensors")
        part = merge(base, adapter, tmp_path / "2.safetensors", strength=0.25)
        for whole, quarter in zip(one.details, part.details, strict=True):
            assert quarter["largest_angle"] == pytest.approx(0.25 * whole["largest_angle"], rel=1e-9)
            assert quarter["strength"] == 0.25 and "strength" not in whole


class TestPatterns:
    def test_the_last_match_wins_and_own_strengths_multiply(self, base: Path, tmp_path: Path) -> None:
        first, second = hra(tmp_path / "first"), lora(tmp_path / "second")
        given = [f"{first}=0.5", str(second)]
        found = merged(base, given, [0.8, "up.**=0.4", "*.k=0"])
        report = merge(base, given, tmp_path / "r.safetensors", strength=[0.8, "up.**=0.4", "*.k=0"], dry_run=True)
        assert report.totals["strengths"] == ["first: 0 to 0.4", "second: 0 to 0.8"]
        at = {"up.q": (0.2, 0.4), "down.q": (0.4, 0.8)}
        for name, (own, other) in at.items():
            wanted = merged(base, [(first, own), (second, other)])
            assert relative_error(found[f"{name}.weight"], wanted[f"{name}.weight"]) <= 1e-10
        assert torch.equal(found["up.k.weight"], model()["up.k.weight"])

    def test_a_pattern_alone_leaves_the_rest_whole(self, base: Path, tmp_path: Path) -> None:
        adapter = hra(tmp_path / "hra")
        found, whole = merged(base, adapter, "up.**=0.3"), merged(base, adapter)
        assert torch.equal(found["down.q.weight"], whole["down.q.weight"])
        assert not torch.equal(found["up.q.weight"], whole["up.q.weight"])

    def test_a_file_of_that_very_name_wins(self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        adapter = hra(Path("odd=0.7"))
        assert split_strength("odd=0.7") == ("odd=0.7", 1.0)
        assert split_strength("odd=0.7=0.5") == ("odd=0.7", 0.5)
        same(merged(base, "odd=0.7"), merged(base, [(adapter, 1.0)]), 0)

    def test_what_is_refused(self, base: Path, tmp_path: Path) -> None:
        adapter = hra(tmp_path / "hra")
        with pytest.raises(TargetError, match="matched 0 of 3"):
            merged(base, adapter, "middle.**=0.3")
        for value in ("nan", "up.q=inf"):
            with pytest.raises(UsageError, match="not finite"):
                merged(base, adapter, value)
        with pytest.raises(UsageError, match="not a number"):
            merged(base, adapter, "up.q=much")
        with pytest.raises(UsageError, match="not finite"):
            given_strengths([f"{adapter}=nan"], 1.0)


class TestKinds:
    def test_a_half_turn_is_split_and_said(self, base: Path, tmp_path: Path) -> None:
        spans = hra(tmp_path / "spans", apply_GS=True)
        half = tmp_path / "half.safetensors"
        report = merge(base, spans, half, strength=0.5, exact=True)
        assert sum("turn planes by pi" in note for note in report.notes) == 1
        same(merged(half, spans, 0.5), merged(base, spans))
        whole = merge(base, [spans], tmp_path / "whole.safetensors")
        plain = merge(base, hra(tmp_path / "plain"), tmp_path / "plain.safetensors", strength=0.5)
        assert not any("turn planes" in note for note in [*whole.notes, *plain.notes])

    def test_an_odd_number_of_reflections_has_no_half(self, base: Path, tmp_path: Path) -> None:
        odd = hra(tmp_path / "odd", rank=3)
        with pytest.raises(TargetError, match="odd number of reflections"):
            merge(base, odd, tmp_path / "out.safetensors", strength=0.5)
        assert not (tmp_path / "out.safetensors").exists()
        same(merged(base, odd, [0.0, "up.q=1"]) | {"up.q.weight": model()["up.q.weight"]}, model(), 0)

    def test_whole_tensors_go_part_of_the_way(self, base: Path, tmp_path: Path) -> None:
        brought = torch.randn(20)
        adapter = hra(tmp_path / "hra", bring={"up.q.bias": brought}, bias="all")
        bias = model()["up.q.bias"]
        assert torch.allclose(merged(base, adapter, 0.25)["up.q.bias"], torch.lerp(bias, brought.double(), 0.25))
        assert torch.equal(merged(base, adapter, "up.q=0")["up.q.bias"], bias)

    def test_a_resized_tensor_has_no_half(self, tmp_path: Path) -> None:
        save_file(model() | {"embed.weight": torch.randn(5, 4)}, tmp_path / "base.safetensors")
        adapter = hra(tmp_path / "hra", bring={"embed.weight": torch.randn(7, 4)}, modules_to_save=["embed"])
        with pytest.raises(TargetError, match=r"resizes embed\.weight") as caught:
            merged(tmp_path / "base.safetensors", adapter, 0.5)
        assert "embed=1" in (caught.value.hint or "")
        assert merged(tmp_path / "base.safetensors", adapter, [0.5, "embed=1"])["embed.weight"].shape == (7, 4)
        assert merged(tmp_path / "base.safetensors", adapter, [0.5, "embed=0"])["embed.weight"].shape == (5, 4)


class TestConvert:
    @pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, -0.7])
    @pytest.mark.parametrize("options", [{}, {"apply_GS": True}])
    def test_reflections_of_the_power(
        self, base: Path, tmp_path: Path, strength: float, options: dict[str, Any]
    ) -> None:
        adapter = hra(tmp_path / "hra", **options)
        report = convert(adapter, tmp_path / "part", strength=[strength, "up.k=0.25"])
        part = read_adapter(tmp_path / "part")
        assert (part.kind, {layer.rank for layer in part.layers.values()}) == ("hra", {4})
        assert not any(layer.options.get("gram_schmidt") for layer in part.layers.values())
        assert [detail["strength"] for detail in report.details] == [strength, 0.25, strength]
        same(merged(base, tmp_path / "part"), merged(base, adapter, [strength, "up.k=0.25"]), 2e-7)

    @pytest.mark.parametrize("rank", [1, 3])
    @pytest.mark.parametrize("options", [{}, {"apply_GS": True}])
    def test_zero_of_an_odd_chain_is_the_base(
        self, base: Path, tmp_path: Path, rank: int, options: dict[str, Any]
    ) -> None:
        convert(hra(tmp_path / "odd", rank=rank, **options), tmp_path / "none", strength=0)
        assert {layer.rank for layer in read_adapter(tmp_path / "none").layers.values()} == {2}
        same(merged(base, tmp_path / "none"), model(), 1e-7)

    def test_one_layer_of_an_odd_adapter_at_zero_has_no_form(self, tmp_path: Path) -> None:
        with pytest.raises(TargetError, match="differ by an odd number"):
            convert(hra(tmp_path / "odd", rank=3), tmp_path / "part", strength="up.k=0")
        assert not (tmp_path / "part").exists()

    def test_peft_computes_the_same(self, base: Path, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        adapter = hra(tmp_path / "hra")
        convert(adapter, tmp_path / "part", "peft-hra", strength=0.5)
        wanted = merged(base, adapter, 0.5)

        def linear(name: str, tensors: Tensors) -> nn.Linear:
            layer = nn.Linear(WIDTHS[name], 20, bias=False, dtype=torch.float64)
            layer.load_state_dict({"weight": tensors[f"{name}.weight"]})
            return layer

        class Two(nn.Module):
            def __init__(self, tensors: Tensors) -> None:
                super().__init__()
                self.up = nn.ModuleDict({"q": linear("up.q", tensors), "k": linear("up.k", tensors)})
                self.down = nn.ModuleDict({"q": linear("down.q", tensors)})

            def forward(self, x: Tensor) -> Tensor:
                return self.up["q"](x) + self.up["k"](x) + self.down["q"](x[:, :12])

        x = torch.randn(5, 16, dtype=torch.float64)
        loaded = peft.PeftModel.from_pretrained(Two(model()), tmp_path / "part", autocast_adapter_dtype=False)
        assert relative_error(loaded(x), Two(wanted)(x)) < 1e-6

    def test_a_lora_keeps_its_form(self, base: Path, tmp_path: Path) -> None:
        adapter = lora(tmp_path / "lora")
        convert(adapter, tmp_path / "part", strength=0.4)
        config = json.loads((tmp_path / "part" / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and config["r"] == 2
        same(merged(base, tmp_path / "part"), merged(base, adapter, 0.4), 2e-7)
        assert "--strength 0.4" in metadata(tmp_path / "part" / "adapter_model.safetensors")["ortho.command"]

    def test_checkpoints_have_no_strength(self, base: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="is for adapters"):
            convert(base, tmp_path / "out.safetensors", "safetensors", strength=0.5)
        with pytest.raises(UsageError, match="neither a form nor a strength"):
            convert(hra(tmp_path / "hra"), tmp_path / "out")

    def test_vectors_stay_as_they_are_at_one(self, tmp_path: Path) -> None:
        adapter = hra(tmp_path / "hra")
        convert(adapter, tmp_path / "same", "peft-hra")
        found, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "same", adapter))
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
