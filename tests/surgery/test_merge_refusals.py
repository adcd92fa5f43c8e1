"""What merge refuses, with exit codes and reasons, and that a refusal leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_folders import metadata, peft_folder, read, rewrite, train
from safetensors.torch import save_file

from ortho_cli.errors import CheckpointError, NumericsError, OutputError, TargetError
from ortho_cli.surgery.add_hra import add_hra
from ortho_cli.surgery.convert import convert
from ortho_cli.surgery.merge import merge


def base_model(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"net.a.weight": torch.randn(6, 8), "net.b.weight": torch.randn(8, 6), "net.b.bias": torch.randn(8)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file(base_model(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The same names and shapes, other values."""
    save_file(base_model(seed=1), tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """HRA on both layers, with the base's fingerprint."""
    add_hra(base, tmp_path / "hra", targets=["net.*"], rank=2)
    return train(tmp_path / "hra")


def left_behind(folder: Path) -> set[str]:
    """Files beside the inputs of these tests, hidden ones too."""
    inputs = ("base", "other", "hra", "lora", "broken", "quantised")
    return {path.name for path in folder.iterdir() if not path.name.startswith(inputs)}


@pytest.mark.parametrize("adapters", [["base.safetensors"], []])
def test_an_adapter_in_the_place_of_the_base(adapter: Path, base: Path, tmp_path: Path, adapters: list[str]) -> None:
    with pytest.raises(TargetError, match=f"{adapter.name} is an adapter, without the weights") as caught:
        merge(adapter, [tmp_path / name for name in adapters], tmp_path / "out")
    assert "the base comes first" in (caught.value.hint or "")
    assert left_behind(tmp_path) == set()


class TestNames:
    def test_a_layer_the_base_does_not_have(self, base: Path, tmp_path: Path) -> None:
        broken = peft_folder(
            tmp_path / "broken", {"net.bb.hra_u": torch.randn(6, 2)}, peft_type="HRA", r=2, target_modules=["bb"]
        )
        with pytest.raises(
            TargetError, match=r"1 of 1 layer names fit no layer of the checkpoint: 'net\.bb'"
        ) as caught:
            merge(base, [broken], tmp_path / "out.safetensors")
        assert "net.b" in (caught.value.hint or "")
        assert left_behind(tmp_path) == set()

    @pytest.mark.parametrize("shape", [(7, 2), (6, 2)])
    def test_a_layer_of_another_width(self, base: Path, tmp_path: Path, shape: tuple[int, int]) -> None:
        broken = peft_folder(
            tmp_path / "broken", {"net.a.hra_u": torch.randn(shape)}, peft_type="HRA", r=2, target_modules=["a"]
        )
        with pytest.raises(CheckpointError, match=rf"net\.a .* does not fit base\.safetensors: .*{shape[0]} columns"):
            merge(base, [broken], tmp_path / "out.safetensors")
        assert left_behind(tmp_path) == set()

    def test_a_base_whose_numbers_are_packed(self, tmp_path: Path) -> None:
        packed = {"net.a.weight": torch.ones(6, 8, dtype=torch.uint8)}
        save_file(packed, tmp_path / "quantised.safetensors")
        hra = peft_folder(
            tmp_path / "hra", {"net.a.hra_u": torch.randn(8, 2)}, peft_type="HRA", r=2, target_modules=["a"]
        )
        with pytest.raises(TargetError, match=r"net\.a of quantised\.safetensors is stored as U8"):
            merge(tmp_path / "quantised.safetensors", [hra], tmp_path / "out.safetensors")

    def test_a_saved_bias_of_an_adapted_layer_is_no_misfit(self, base: Path, tmp_path: Path) -> None:
        """Its one dimension was once taken for the layer's shape."""
        tensors = {"net.b.hra_u": torch.randn(6, 2), "net.b.base_layer.bias": torch.arange(8.0)}
        hra = peft_folder(tmp_path / "hra", tensors, peft_type="HRA", r=2, bias="hra_only", target_modules=["b"])
        report = merge(base, [hra], tmp_path / "out.safetensors")
        assert torch.equal(read(tmp_path / "out.safetensors")["net.b.bias"], torch.arange(8.0))
        assert (report.layers, report.totals["replaced"]) == (1, 1)


class TestFingerprint:
    """A rotation fits any fine-tune; an exported LoRA only the base it was computed from."""

    def test_hra_on_another_base_is_a_note(self, adapter: Path, other: Path, tmp_path: Path) -> None:
        report = merge(other, [adapter], tmp_path / "out.safetensors")
        (note,) = report.notes
        assert "hra was made for another base; a rotation" in note

    def test_hra_on_its_own_base_is_silent(self, adapter: Path, base: Path, tmp_path: Path) -> None:
        assert merge(base, [adapter], tmp_path / "out.safetensors").notes == []

    def test_an_exported_lora_is_refused(self, adapter: Path, base: Path, other: Path, tmp_path: Path) -> None:
        convert(adapter, tmp_path / "lora", "peft-lora", base=str(base))
        merge(base, [tmp_path / "lora"], tmp_path / "right.safetensors")
        (tmp_path / "right.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"lora is only right on the base it was made for; other") as caught:
            merge(other, [tmp_path / "lora"], tmp_path / "out.safetensors")
        assert caught.value.exit_code == 4
        assert "--force" in (caught.value.hint or "")
        assert left_behind(tmp_path) == set()

    def test_force_turns_it_into_a_note(self, adapter: Path, base: Path, other: Path, tmp_path: Path) -> None:
        convert(adapter, tmp_path / "lora", "peft-lora", base=str(base))
        report = merge(other, [tmp_path / "lora"], tmp_path / "out.safetensors", force=True)
        assert any("made for another base (forced)" in note for note in report.notes)
        assert (tmp_path / "out.safetensors").is_file()

    def test_a_bound_adapter_that_does_not_say_to_what(self, adapter: Path, base: Path, tmp_path: Path) -> None:
        convert(adapter, tmp_path / "lora", "peft-lora", base=str(base))
        path = tmp_path / "lora" / "adapter_model.safetensors"
        kept = {key: text for key, text in metadata(path).items() if key != "ortho.base_fingerprint"}
        save_file(read(path), path, metadata=kept)
        report = merge(base, [tmp_path / "lora"], tmp_path / "out.safetensors")
        assert any("does not say which" in note for note in report.notes)


class TestNumerics:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("output", ["out.safetensors", "out"])
    def test_an_adapter_that_diverged(
        self, adapter: Path, base: Path, tmp_path: Path, value: float, output: str
    ) -> None:
        path = adapter / "adapter_model.safetensors"
        tensors = read(path)
        tensors["base_model.model.net.b.hra_u"][1, 1] = value
        rewrite(path, tensors)
        with pytest.raises(NumericsError, match=r"layer 'net\.b'.* vector.*finite") as caught:
            merge(base, [adapter], tmp_path / output)
        assert caught.value.exit_code == 5
        assert left_behind(tmp_path) == set()

    def test_a_result_that_overflows_half_precision(self, base: Path, tmp_path: Path) -> None:
        tensors = {"net.a.lora_A.weight": torch.ones(1, 8), "net.a.lora_B.weight": torch.full((6, 1), 1e5)}
        lora = peft_folder(tmp_path / "lora", tensors, peft_type="LORA", r=1, lora_alpha=1, target_modules=["a"])
        merge(base, [lora], tmp_path / "fits.safetensors", dtype="bf16")
        (tmp_path / "fits.safetensors").unlink()
        with pytest.raises(NumericsError, match=r"net\.a\.weight is not finite after merging \(F16\)") as caught:
            merge(base, [lora], tmp_path / "out.safetensors", dtype="fp16")
        assert "bf16" in (caught.value.hint or "")
        assert left_behind(tmp_path) == set()

    def test_an_untouched_tensor_that_overflows(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        save_file({**base_model(), "big": torch.full((3,), 1e6)}, base)
        with pytest.raises(NumericsError, match="tensor big does not fit F16"):
            merge(base, [adapter], tmp_path / "out.safetensors", dtype="fp16")
        assert left_behind(tmp_path) == set()


class TestOutput:
    def test_never_over_an_input(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        before = base.read_bytes()
        (tmp_path / "base-link.safetensors").symlink_to(base)
        for output in (base, adapter, tmp_path / "base-link.safetensors"):
            with pytest.raises(OutputError, match="is an input"):
                merge(base, [adapter], output, force=True)
        assert base.read_bytes() == before
        assert (adapter / "adapter_config.json").is_file()

    def test_never_over_an_adapter_of_whole_tensors_only(self, base: Path, tmp_path: Path) -> None:
        flat = "lora_unet_mid_block_attentions_0_proj_in"
        save_file({f"{flat}.diff": torch.ones(4, 4, 1, 1)}, tmp_path / "lora.safetensors")
        weight = {"mid_block.attentions.0.proj_in.weight": torch.ones(4, 4, 1, 1)}
        save_file(weight, tmp_path / "base-unet.safetensors")
        with pytest.raises(OutputError, match="is an input"):
            merge(
                tmp_path / "base-unet.safetensors",
                [tmp_path / "lora.safetensors"],
                tmp_path / "lora.safetensors",
                force=True,
            )

    def test_an_existing_output_stays_unless_forced(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        (tmp_path / "out.safetensors").write_text("precious")
        with pytest.raises(OutputError, match="output exists"):
            merge(base, [adapter], tmp_path / "out.safetensors")
        assert (tmp_path / "out.safetensors").read_text() == "precious"
        merge(base, [adapter], tmp_path / "out.safetensors", force=True)
        assert read(tmp_path / "out.safetensors").keys() == base_model().keys()

    def test_a_dry_run_checks_and_writes_nothing(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        report = merge(base, [adapter], tmp_path / "out.safetensors", dry_run=True)
        assert left_behind(tmp_path) == set()
        assert report.dry_run and report.layers == 2
        assert report.totals["bytes_out"] > sum(tensor.nbytes for tensor in base_model().values())

    def test_a_dry_run_refuses_what_the_run_would(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        rewrite(path, {name.replace(".net.b", ".net.c"): tensor for name, tensor in read(path).items()})
        with pytest.raises(TargetError, match=r"net\.c"):
            merge(base, [adapter], tmp_path / "out.safetensors", dry_run=True)


def test_reports_are_json(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge(base, [adapter], tmp_path / "out.safetensors").as_dict()
    assert json.loads(json.dumps(report))["ok"] is True
    assert {"schema", "ok", "command", "inputs", "outputs", "layers", "parameters", "details", "totals", "notes"} < set(
        report
    )
    assert report["inputs"] == ["base.safetensors", "adapter_model.safetensors"]
