"""extract: what it refuses, what it plans, and that the same inputs give the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import Tensors, read
from tuned_models import LAYERS, model, noisy, save, turned
from typer.testing import CliRunner

from ortho_cli.cli.app import app
from ortho_cli.errors import NumericsError, OrthoError, OutputError, TargetError, UsageError
from ortho_cli.surgery.add_hra import add_hra
from ortho_cli.surgery.extract import extract
from ortho_cli.surgery.factorize import factorize


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base.safetensors", model())


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return save(tmp_path / "tuned.safetensors", turned(model()))


def ran(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["extract", *map(str, words), "--json"])
    report: dict[str, Any] = json.loads(result.stdout)
    return report


class TestModels:
    """The second checkpoint is no fine-tune of the first."""

    def refused(self, tmp_path: Path, base: Path, tensors: Tensors, message: str, **options: Any) -> OrthoError:
        other = save(tmp_path / "other.safetensors", tensors)
        with pytest.raises(TargetError, match=message) as caught:
            extract(base, other, tmp_path / "found", **options)
        assert not (tmp_path / "found").exists()
        return caught.value

    def test_no_layer_in_common(self, base: Path, tmp_path: Path) -> None:
        error = self.refused(tmp_path, base, {"x.weight": torch.ones(3, 3)}, "has no layer of base.safetensors")
        assert error.hint == "compare them: ortho inspect base.safetensors --diff other.safetensors"

    def test_other_shapes(self, base: Path, tmp_path: Path) -> None:
        wide = {**model(), "block.to_k.weight": torch.ones(12, 30), "conv.weight": torch.ones(16, 6, 1, 1)}
        self.refused(
            tmp_path, base, wide, r"layer block\.to_k is 12x20 in base.* and 12x30 in other.*, and 1 more differ"
        )

    def test_nothing_differs(self, base: Path, tmp_path: Path) -> None:
        self.refused(tmp_path, base, model(), "nothing differs between base.* and other.* in the 5 layers compared")
        rounded = {name: tensor.half() for name, tensor in model().items()}
        self.refused(tmp_path, base, rounded, "nothing differs")

    def test_only_what_no_adapter_carries_differs(self, base: Path, tmp_path: Path) -> None:
        moved = {**model(), "block.to_q.bias": torch.ones(24), "word_embeddings.weight": torch.ones(31, 12)}
        error = self.refused(tmp_path, base, moved, r"only 2 tensors differ.*\(embeddings, biases; first ")
        assert error.exit_code == 4

    def test_no_layer_can_be_carried(self, base: Path, tmp_path: Path) -> None:
        self.refused(tmp_path, base, noisy(model()), "one of the embeddings", targets="word_embeddings")
        self.refused(tmp_path, base, noisy(model()), "pattern 'nope' matched 0 of", targets="nope")

    def test_no_rotation_explains_it(self, tmp_path: Path) -> None:
        zero = save(tmp_path / "zero.safetensors", {"a.weight": torch.zeros(6, 6)})
        ones = {"a.weight": torch.ones(6, 6)}
        error = self.refused(tmp_path, zero, ones, "no rotation explains any of the change", rank=4)
        assert error.hint == "take it as a sum: --kind lora"

    def test_values_that_are_not_finite(self, base: Path, tmp_path: Path) -> None:
        broken = noisy(model())
        broken["block.out.weight"][0, 0] = torch.nan
        other = save(tmp_path / "other.safetensors", broken)
        with pytest.raises(NumericsError, match=r"layer block\.out: the weight holds values that are not finite"):
            extract(base, other, tmp_path / "found")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "other.safetensors"]

    @pytest.mark.parametrize("which", ["adapter", "hra", "factors"])
    def test_what_is_no_plain_model(self, base: Path, tuned: Path, tmp_path: Path, which: str) -> None:
        make: dict[str, Callable[[], object]] = {
            "adapter": lambda: add_hra(base, tmp_path / "x", targets=["block.*"]),
            "hra": lambda: add_hra(base, tmp_path / "x", targets=["block.*"], form="checkpoint"),
            "factors": lambda: factorize(base, tmp_path / "x", rank=2, targets=["block.*"]),
        }
        make[which]()
        said = {"adapter": "is an adapter", "hra": "holds a Householder adapter", "factors": "holds factors already"}
        for pair in ((tmp_path / "x", tuned), (base, tmp_path / "x")):
            with pytest.raises(TargetError, match=said[which]):
                extract(*pair, tmp_path / "found")


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rank": 8, "energy": 0.5}, "--rank and --energy both say"),
            ({"energy": 0.0}, "--energy 0 is not in"),
            ({"energy": 1.5}, r"--energy 1\.5 is not in"),
            ({"workers": 0}, "--workers 0"),
            ({"kind": "hrra"}, "--kind 'hrra' is none of hra, lora, both"),
            ({"output": "x.safetensors"}, "an adapter is a folder"),
            ({"output": "x.ckpt"}, "does not write .ckpt"),
        ],
    )
    def test_usage(self, base: Path, tuned: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        output = tmp_path / options.pop("output", "found")
        with pytest.raises(UsageError, match=message):
            extract(base, tuned, output, **options)

    def test_ranks(self, base: Path, tuned: Path, tmp_path: Path) -> None:
        with pytest.raises(TargetError, match="rank 3 is odd") as caught:
            extract(base, tuned, tmp_path / "found", rank=3)
        assert caught.value.hint == "use --rank 4"
        with pytest.raises(TargetError, match="rank 0 at layer"):
            extract(base, tuned, tmp_path / "found", rank=0, kind="lora")
        with pytest.raises(UsageError, match="'many' is not a whole number"):
            extract(base, tuned, tmp_path / "found", rank="many")
        assert extract(base, tuned, tmp_path / "found", rank=3, kind="lora").layers == len(LAYERS)

    def test_narrow_layers_are_left_out(self, base: Path, tuned: Path, tmp_path: Path) -> None:
        report = extract(base, tuned, tmp_path / "found", rank=14)
        assert sorted(entry["name"] for entry in report.details) == sorted({*LAYERS} - {"point"})
        assert any("1 layers cannot turn, first point, which is 12 wide: fewer than 14" in x for x in report.notes)
        assert any("1 layers that cannot turn (first point.weight)" in note for note in report.notes)
        with pytest.raises(TargetError, match="none of the 1 layers can be turned: point is 12 wide"):
            extract(base, tuned, tmp_path / "narrow", rank=14, targets="point")

    def test_narrow_layers_under_energy(self, base: Path, tmp_path: Path) -> None:
        tuned = save(tmp_path / "noisy.safetensors", noisy(model()))
        with pytest.raises(TargetError, match=r"PEFT has one rank for all: point is only 12 wide") as caught:
            extract(base, tuned, tmp_path / "found", energy=0.99)
        assert "--exclude point" in str(caught.value.hint)

    def test_outputs(self, base: Path, tuned: Path, tmp_path: Path) -> None:
        extract(base, tuned, tmp_path / "found")
        with pytest.raises(OutputError, match="output exists"):
            extract(base, tuned, tmp_path / "found")
        extract(base, tuned, tmp_path / "found", force=True)


def test_dry_run_is_an_upper_bound(base: Path, tmp_path: Path) -> None:
    tuned = save(tmp_path / "tuned.safetensors", turned(model(), layers=["block.to_q", "conv"]))
    for kind in ("hra", "lora", "both"):
        planned = extract(base, tuned, tmp_path / kind, kind=kind, dry_run=True)
        assert not (tmp_path / kind).exists()
        done = extract(base, tuned, tmp_path / kind, kind=kind)
        assert (planned.layers, done.layers) == (5, 2)
        assert planned.parameters >= done.parameters
        assert planned.totals["bytes_out"] >= sum(item["bytes"] for item in done.outputs)
        assert any("upper bounds" in note for note in planned.notes)
        assert not any("upper bounds" in note for note in done.notes)
    unknown = extract(base, tuned, tmp_path / "energy", energy=0.9, dry_run=True)
    assert (unknown.layers, unknown.parameters) == (5, 0)
    assert all(entry["rank"] is None for entry in unknown.details)


def test_the_same_inputs_give_the_same_bytes(base: Path, tmp_path: Path) -> None:
    tuned = save(tmp_path / "tuned.safetensors", noisy(turned(model())))
    files = []
    for workers in (1, 3):
        output = tmp_path / str(workers) / "found"
        extract(base, tuned, output, kind="both", workers=workers)
        files.append({path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()})
    assert files[0] == files[1]
    assert len(files[0]) == 6


def test_pickles_on_either_side(base: Path, tuned: Path, tmp_path: Path) -> None:
    extract(base, tuned, tmp_path / "wanted")
    for number, (first, second) in enumerate([(model(), turned(model()))] * 2):
        torch.save({"state_dict": first}, tmp_path / "a.ckpt")
        strided = {name: tensor.T.contiguous().T if tensor.dim() == 2 else tensor for name, tensor in second.items()}
        torch.save(strided, tmp_path / "b.bin")
        pair = [(tmp_path / "a.ckpt", tuned), (base, tmp_path / "b.bin")][number]
        extract(*pair, tmp_path / f"found-{number}")
        wanted, found = read(tmp_path / "wanted"), read(tmp_path / f"found-{number}")
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


class TestCommand:
    def test_json_and_recipe(self, base: Path, tuned: Path, tmp_path: Path) -> None:
        recipe = tmp_path / "again.yaml"
        report = ran(base, tuned, "-o", tmp_path / "found", "--kind", "both", "--rank", 4, "--rank", "conv=6",
                     "--exclude", "point", "--save-recipe", recipe)  # fmt: skip
        assert (report["ok"], report["command"], report["layers"]) == (True, "extract", 4)
        assert report["inputs"] == ["base.safetensors", "tuned.safetensors"]
        assert {"explained", "explained_by_rotation", "explained_by_lora", "largest_angle"} <= report["totals"].keys()
        assert {"rank", "explained", "relative_change"} <= report["details"][0].keys()
        assert "kind: both" in recipe.read_text()
        again = ran("--recipe", recipe, "-o", tmp_path / "again")
        assert again["details"] == report["details"]
        other = ran("--recipe", recipe, "-o", tmp_path / "other", "--energy", 0.9, "--kind", "lora")
        assert other["ok"] and other["details"][0]["rank"] != report["details"][0]["rank"]

    def test_errors(self, base: Path, tmp_path: Path) -> None:
        failed = ran(base, base, "-o", tmp_path / "found")
        assert (failed["ok"], failed["error"]["exit_code"]) == (False, 4)
        assert "missing: TUNED, -o/--output" in ran(base)["error"]["message"]
        recipe = tmp_path / "bad.yaml"
        recipe.write_text("version: 1\nverb: extract\nbase: a\ntuned: b\nrank: 4\nenergy: 0.5\n")
        assert "bad.yaml:6: energy: says how much to keep" in ran("--recipe", recipe)["error"]["message"]

    def test_table(self, base: Path, tuned: Path, tmp_path: Path) -> None:
        shown = CliRunner().invoke(app, ["extract", str(base), str(tuned), "-o", str(tmp_path / "found")])
        assert shown.exit_code == 0
        assert "explained by rotation" in shown.stdout and "largest angle" in shown.stdout
