"""extract: what comes out of a fine-tuned checkpoint, merged into its base, is that checkpoint again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import Tensors, read, relative_error, train, write_sharded
from tuned_models import LAYERS, model, noisy, save, shifted, turned

from ortho_cli.checkpoints.adapters import base_bound, read_adapter
from ortho_cli.checkpoints.layouts import canonical_shape, to_canonical
from ortho_cli.errors import CheckpointError
from ortho_cli.linalg import Householder
from ortho_cli.surgery.add_hra import add_hra
from ortho_cli.surgery.convert import convert
from ortho_cli.surgery.diff import diff
from ortho_cli.surgery.extract import extract
from ortho_cli.surgery.inspect import inspect
from ortho_cli.surgery.merge import merge
from ortho_cli.surgery.plan import Report
from ortho_cli.surgery.small_sd15 import small_sd15


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base.safetensors", model())


def merged(base: Path, *adapters: Path) -> Tensors:
    merge(base, list(adapters), base.with_name("again.safetensors"), force=True)
    return read(base.with_name("again.safetensors"))


def errors(found: Tensors, wanted: Tensors) -> dict[str, float]:
    return {name: relative_error(found[f"{name}.weight"], wanted[f"{name}.weight"]) for name in LAYERS}


def detail(report: Report, name: str) -> dict[str, Any]:
    return next(entry for entry in report.details if entry["name"] == name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    small_sd15(folder / "base.safetensors")
    add_hra(folder / "base.safetensors", folder / "hra", rank=8)
    train(folder / "hra")
    merge(folder / "base.safetensors", [folder / "hra"], folder / "tuned.safetensors")
    return folder


class TestStableDiffusion:
    """Its real names, a fifth as wide, an HRA of rank 8 merged in."""

    def test_float32_is_recovered(self, folder: Path, tmp_path: Path) -> None:
        report = extract(folder / "base.safetensors", folder / "tuned.safetensors", tmp_path / "found", rank=8)
        assert (report.layers, report.totals["layers_compared"], report.totals["layers_equal"]) == (144, 205, 61)
        assert report.totals["explained_by_rotation"] > 1 - 1e-9
        merge(folder / "base.safetensors", [tmp_path / "found"], tmp_path / "again.safetensors")
        diff(folder / "tuned.safetensors", tmp_path / "again.safetensors", fail_above=1e-5)
        angles = {entry["name"]: entry["largest_angle"] for entry in report.details}
        wanted = read_adapter(folder / "hra")
        for name, layer in list(wanted.layers.items())[:5]:
            operator: Any = wanted.operator(name, "float64")
            native = next(native for native in angles if to_canonical(native, "sd15-ldm").endswith(name))
            assert angles[native] == pytest.approx(float(operator.angles()[0]), rel=1e-4), layer

    def test_half_precision_is_recovered_to_its_rounding(self, folder: Path, tmp_path: Path) -> None:
        half = {name: tensor.half() for name, tensor in read(folder / "base.safetensors").items()}
        save(tmp_path / "base.safetensors", half)
        merge(tmp_path / "base.safetensors", [folder / "hra"], tmp_path / "tuned.safetensors")
        merge(tmp_path / "base.safetensors", [folder / "hra"], tmp_path / "exact.safetensors", dtype="fp32")
        extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "found", rank=8)
        merge(tmp_path / "base.safetensors", [tmp_path / "found"], tmp_path / "again.safetensors")
        exact, tuned, again = (read(tmp_path / f"{name}.safetensors") for name in ("exact", "tuned", "again"))
        changed = [name for name, tensor in tuned.items() if not torch.equal(tensor, half[name])]
        assert len(changed) == 144
        for name in changed:
            rounding = relative_error(tuned[name], exact[name])
            assert relative_error(again[name], tuned[name]) < 2 * rounding
            assert relative_error(again[name], exact[name]) < 1.5 * rounding

    def test_layouts_do_not_matter(self, folder: Path, tmp_path: Path) -> None:
        """The fine-tuned model as a diffusers pipeline, as its UNet alone, and the other way round."""
        parts: dict[str, Tensors] = {}
        for name, tensor in read(folder / "tuned.safetensors").items():
            canonical = to_canonical(name, "sd15-ldm")
            component, _, local = canonical.partition(".")
            parts.setdefault(component, {})[local] = tensor.reshape(canonical_shape(canonical, tuple(tensor.shape)))
        for component, tensors in parts.items():
            write_sharded(tmp_path / "sd" / component, tensors, 2 if component == "unet" else 1)
        (tmp_path / "sd" / "model_index.json").write_text("{}")
        options: dict[str, Any] = {"targets": ["attn1.to_*"], "rank": 8}
        extract(folder / "base.safetensors", folder / "tuned.safetensors", tmp_path / "a", **options)
        wanted = read(tmp_path / "a")
        assert len(wanted) == 48
        for name, tuned in (("b", tmp_path / "sd"), ("c", tmp_path / "sd" / "unet")):
            report = extract(folder / "base.safetensors", tuned, tmp_path / name, **options)
            found = read(tmp_path / name)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        assert "12 layers are in base.safetensors only, first " in str(report.notes)
        back = extract(tmp_path / "sd", folder / "base.safetensors", tmp_path / "d", **options)
        assert back.totals["explained_by_rotation"] > 1 - 1e-9  # the inverse is a rotation, too


class TestRotation:
    def test_layers_and_convolutions_are_recovered(self, base: Path, tmp_path: Path) -> None:
        tuned = turned(model())
        report = extract(base, save(tmp_path / "tuned.safetensors", tuned), tmp_path / "found", rank=4)
        assert sorted(entry["name"] for entry in report.details) == sorted(LAYERS)
        assert max(errors(merged(base, tmp_path / "found"), tuned).values()) < 1e-6
        config = json.loads((tmp_path / "found" / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"], config["apply_GS"]) == ("HRA", 4, False)
        shapes = {name: tuple(tensor.shape) for name, tensor in read(tmp_path / "found").items()}
        assert shapes["base_model.model.conv.hra_u"] == (54, 4)
        assert report.parameters == sum(a * b for a, b in shapes.values())
        fits = inspect(tmp_path / "found", base=base).totals["adapter"]["fits_base"]
        assert fits["fingerprint"] is True
        assert not base_bound(read_adapter(tmp_path / "found"))

    def test_ranks_by_pattern_and_targets(self, base: Path, tmp_path: Path) -> None:
        tuned = save(tmp_path / "tuned.safetensors", turned(model()))
        report = extract(base, tuned, tmp_path / "found", rank=["2", "conv=4"], targets=["block.*", "conv"],
                         exclude="block.out")  # fmt: skip
        assert {entry["name"]: entry["rank"] for entry in report.details} == {
            "block.to_q": 2, "block.to_k": 2, "conv": 4
        }  # fmt: skip
        assert detail(report, "conv")["explained_by_rotation"] > 1 - 1e-9
        assert 0.3 < detail(report, "block.to_q")["explained_by_rotation"] < 0.99
        assert "2 layers of lower rank are padded to 4 with column pairs that cancel" in report.notes

    def test_shares_are_those_of_the_merged_weights(self, base: Path, tmp_path: Path) -> None:
        tuned = noisy(turned(model()), 0.02)
        report = extract(base, save(tmp_path / "tuned.safetensors", tuned), tmp_path / "found", rank=4)
        again, start = merged(base, tmp_path / "found"), model()
        change, missed = 0.0, 0.0
        for name in LAYERS:
            weight = tuned[f"{name}.weight"].double()
            moved = float((weight - start[f"{name}.weight"]).norm()) ** 2
            left = float((weight - again[f"{name}.weight"]).norm()) ** 2
            change, missed = change + moved, missed + left
            found = detail(report, name)
            assert found["explained_by_rotation"] == pytest.approx(1 - left / moved, abs=1e-6)
            assert found["relative_change"] == pytest.approx(
                relative_error(tuned[f"{name}.weight"], start[f"{name}.weight"]), rel=1e-5
            )
        assert report.totals["explained_by_rotation"] == pytest.approx(1 - missed / change, abs=1e-6)
        assert 0.9 < report.totals["explained_by_rotation"] < 1

    def test_energy_finds_the_rank(self, base: Path, tmp_path: Path) -> None:
        tuned = save(tmp_path / "tuned.safetensors", turned(model(), 6, layers=["block.to_q", "block.out"]))
        report = extract(base, tuned, tmp_path / "found", energy=1 - 1e-9)
        assert [entry["rank"] for entry in report.details] == [6, 6]
        assert report.totals["explained_by_rotation"] > 1 - 1e-9
        few = extract(base, tuned, tmp_path / "few", energy=0.3)
        assert [entry["rank"] for entry in few.details] == [2, 2]

    def test_what_is_not_carried_is_said(self, base: Path, tmp_path: Path) -> None:
        tuned = noisy(model())
        report = extract(base, save(tmp_path / "tuned.safetensors", tuned), tmp_path / "found")
        assert report.layers == len(LAYERS)
        (note,) = (note for note in report.notes if "not in the adapter" in note)
        assert "2 biases" in note and "1 norms" in note and "1 embeddings" in note
        (advice,) = (note for note in report.notes if "explains" in note)
        assert "--kind both" in advice

    @pytest.mark.parametrize("rule", [{"rank": 4}, {"energy": 1 - 1e-9}])
    def test_layers_of_few_outputs_are_recovered(self, tmp_path: Path, rule: dict[str, Any]) -> None:
        torch.manual_seed(0)
        start = {f"head{rows}.weight": torch.randn(rows, 64) for rows in (1, 2, 3)}
        end = {name: Householder(torch.randn(64, 2).double()).apply(t.double()).float() for name, t in start.items()}
        base = save(tmp_path / "base.safetensors", start)
        report = extract(base, save(tmp_path / "tuned.safetensors", end), tmp_path / "found", **rule)
        assert not any("in no way" in note for note in report.notes)
        assert report.totals["explained_by_rotation"] > 1 - 1e-9
        again = merged(base, tmp_path / "found")
        assert max(relative_error(again[name], end[name]) for name in end) < 1e-6

    def test_a_layer_that_no_rotation_explains_is_named(self, tmp_path: Path) -> None:
        tensors = model()
        tensors["block.to_q.weight"] = torch.zeros(24, 20)
        tuned = turned(tensors, layers=["block.out"])
        tuned["block.to_q.weight"] = torch.ones(24, 20)
        base = save(tmp_path / "base.safetensors", tensors)
        report = extract(base, save(tmp_path / "tuned.safetensors", tuned), tmp_path / "found", rank=4)
        assert "1 layers changed in no way that a rotation was found for, first block.to_q" in report.notes
        assert detail(report, "block.to_q")["explained_by_rotation"] == 0
        assert list(read_adapter(tmp_path / "found").layers) == ["block.out"]


class TestLowRank:
    def test_layers_and_convolutions_are_recovered(self, base: Path, tmp_path: Path) -> None:
        tuned = shifted(model())
        report = extract(base, save(tmp_path / "tuned.safetensors", tuned), tmp_path / "found", kind="lora", rank=4)
        assert max(errors(merged(base, tmp_path / "found"), tuned).values()) < 1e-6
        assert report.totals["explained_by_lora"] > 1 - 1e-9
        assert "largest_angle" not in report.totals
        config = json.loads((tmp_path / "found" / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
        found = read(tmp_path / "found")
        assert found["base_model.model.conv.lora_A.weight"].shape == (4, 6, 3, 3)
        assert found["base_model.model.conv.lora_B.weight"].shape == (16, 4, 1, 1)
        assert not base_bound(read_adapter(tmp_path / "found"))

    def test_the_error_is_the_smallest_for_the_rank(self, base: Path, tmp_path: Path) -> None:
        tuned = noisy(model())
        report = extract(base, save(tmp_path / "tuned.safetensors", tuned), tmp_path / "found", kind="lora",
                         rank=[3, "conv=5"])  # fmt: skip
        again, start = merged(base, tmp_path / "found"), model()
        for name in LAYERS:
            change = (tuned[f"{name}.weight"] - start[f"{name}.weight"]).double().flatten(1)
            values = torch.linalg.svdvals(change).square()
            share = float(values[: 5 if name == "conv" else 3].sum() / values.sum())
            assert detail(report, name)["explained_by_lora"] == pytest.approx(share, abs=1e-6)
            left = float((tuned[f"{name}.weight"] - again[f"{name}.weight"]).norm()) ** 2
            assert 1 - left / float(values.sum()) == pytest.approx(share, abs=1e-6)

    def test_energy(self, base: Path, tmp_path: Path) -> None:
        tuned = save(tmp_path / "tuned.safetensors", noisy(model()))
        report = extract(base, tuned, tmp_path / "found", kind="lora", energy=0.8)
        assert all(entry["explained_by_lora"] >= 0.8 for entry in report.details)
        assert len({entry["rank"] for entry in report.details}) > 1
        assert report.totals["explained_by_lora"] >= 0.8

    def test_kernels_that_are_not_square(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        start = {"conv.weight": torch.randn(8, 6, 3, 1)}
        end = {"conv.weight": start["conv.weight"] + torch.randn(8, 6, 3, 1)}
        base = save(tmp_path / "base.safetensors", start)
        extract(base, save(tmp_path / "tuned.safetensors", end), tmp_path / "found", kind="lora", rank=8)
        assert relative_error(merged(base, tmp_path / "found")["conv.weight"], end["conv.weight"]) < 1e-6


class TestBoth:
    def test_the_parts_together_are_the_model_to_what_the_residual_lacks(self, base: Path, tmp_path: Path) -> None:
        tuned = noisy(turned(model()), 0.02)
        path = save(tmp_path / "tuned.safetensors", tuned)
        report = extract(base, path, tmp_path / "found", kind="both", rank=4)
        parts = [tmp_path / "found" / "rotation", tmp_path / "found" / "residual"]
        again, start = merged(base, *parts), model()
        for name in LAYERS:
            weight = tuned[f"{name}.weight"].double()
            moved = float((weight - start[f"{name}.weight"]).norm()) ** 2
            left = float((weight - again[f"{name}.weight"]).norm()) ** 2
            found = detail(report, name)
            assert found["explained"] == pytest.approx(1 - left / moved, abs=1e-6)
            assert found["explained"] == pytest.approx(found["explained_by_rotation"] + found["explained_by_lora"])
            assert found["rank"] == 8
        (hint,) = (note for note in report.notes if "ortho merge" in note)
        assert "ortho merge base.safetensors found/rotation found/residual -o MERGED" in hint

    def test_a_residual_of_full_rank_leaves_nothing(self, base: Path, tmp_path: Path) -> None:
        tuned = noisy(turned(model()))
        extract(base, save(tmp_path / "tuned.safetensors", tuned), tmp_path / "found", kind="both", rank=12)
        parts = [tmp_path / "found" / "rotation", tmp_path / "found" / "residual"]
        assert errors(merged(base, *parts), tuned)["block.to_k"] < 1e-6

    def test_the_residual_is_bound_to_the_base(self, base: Path, tmp_path: Path) -> None:
        tuned = save(tmp_path / "tuned.safetensors", noisy(turned(model())))
        extract(base, tuned, tmp_path / "found", kind="both")
        residual = read_adapter(tmp_path / "found" / "residual")
        assert base_bound(residual)
        assert not base_bound(read_adapter(tmp_path / "found" / "rotation"))
        other = save(tmp_path / "other.safetensors", model(1))
        with pytest.raises(CheckpointError, match="only right on the base it was made for"):
            merge(other, [tmp_path / "found" / "rotation", residual.path], tmp_path / "x.safetensors")

    def test_the_residual_wants_its_rotation_directly_before_it(self, base: Path, tmp_path: Path) -> None:
        """`W D + R` is right, `(W + R) D` and `W + R` are not, though the fingerprint is the base's."""
        tuned = turned(model())
        for name, seed in (("found", 0.05), ("other", 0.1)):
            path = save(tmp_path / f"{name}.safetensors", noisy(tuned, seed))
            extract(base, path, tmp_path / name, kind="both")
        rotation, residual = tmp_path / "found" / "rotation", tmp_path / "found" / "residual"
        other, out = tmp_path / "other" / "rotation", tmp_path / "x.safetensors"
        convert(residual, tmp_path / "weak", strength=0.5)
        for adapters in ([residual], [residual, rotation], [other, residual], [rotation, other, residual],
                         [tmp_path / "weak"]):  # fmt: skip
            with pytest.raises(CheckpointError, match="is what a rotation leaves") as caught:
                merge(base, adapters, out)
            assert caught.value.exit_code == 4 and not out.exists()
        convert(rotation, tmp_path / "half", strength=0.5)
        for adapters in ([rotation, residual], [other, rotation, residual], [rotation, tmp_path / "weak"],
                         [tmp_path / "half", residual]):  # fmt: skip
            assert merge(base, adapters, out, force=True).notes == []
        report = merge(base, [residual], out, force=True)
        assert any("(forced)" in note for note in report.notes)

    def test_layers_that_cannot_turn_are_sums(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        start = {"a.weight": torch.randn(9, 8), "conv.weight": torch.randn(8, 6, 3, 1)}
        end = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in start.items()}
        base = save(tmp_path / "base.safetensors", start)
        report = extract(base, save(tmp_path / "tuned.safetensors", end), tmp_path / "found", kind="both")
        assert "1 layers are taken as sums only, first conv, which has a kernel of 3x1" in report.notes
        assert list(read_adapter(tmp_path / "found" / "rotation").layers) == ["a"]
        parts = [tmp_path / "found" / "rotation", tmp_path / "found" / "residual"]
        again = merged(base, *parts)
        assert max(relative_error(again[name], end[name]) for name in end) < 1e-6
