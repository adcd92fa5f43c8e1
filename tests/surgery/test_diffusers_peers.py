"""A small Stable Diffusion that diffusers made: what we write draws, in diffusers, what our merged weights draw."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import Tensors, read, relative_error, train
from tiny_sd import paint, save_pipeline

from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.surgery.add_hra import add_hra
from ortho_cli.surgery.convert import convert
from ortho_cli.surgery.diff import diff
from ortho_cli.surgery.merge import merge

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own imports warn about packages they look for
    peft = pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")

DATA = Path(__file__).parent.parent / "data"
SAME = 1e-4  # of what a pipeline draws
TARGETS = {
    "unet": ["sd15-control"],
    "both": ["sd15-control", "**.self_attn.{q,k,v,out}_proj", "unet.**.resnets.*.conv1"],
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),  # PEFT asks transformers for it
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diffusers")


@pytest.fixture(scope="module")
def base(work: Path) -> Path:
    return save_pipeline(work / "sd")


@pytest.fixture(scope="module")
def ldm(work: Path, base: Path) -> Path:
    convert(base, work / "sd-ldm.safetensors", "ldm")
    return work / "sd-ldm.safetensors"


@pytest.fixture(scope="module", params=list(TARGETS))
def adapter(request: pytest.FixtureRequest, work: Path, base: Path) -> Path:
    """A trained HRA adapter, on the UNet or on UNet, its convolutions and the text encoder."""
    folder = work / f"hra-{request.param}"
    add_hra(base, folder, targets=TARGETS[request.param], rank=4)
    return train(folder)


@pytest.fixture(scope="module")
def merged(work: Path, base: Path, adapter: Path) -> Path:
    """The base with the adapter folded in, as a diffusers folder."""
    merge(base, [adapter], work / f"merged-{adapter.name}")
    return work / f"merged-{adapter.name}"


def pipeline(folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def painting(merged: Path, base: Path) -> torch.Tensor:
    """What the merged weights draw: the measure of everything else."""
    drawn = paint(pipeline(merged))
    assert bool(torch.isfinite(drawn).all())
    assert float((drawn - paint(pipeline(base))).abs().max()) > 1000 * SAME, "the adapter hardly shows"
    return drawn


def assert_paints(loaded: Any, painting: torch.Tensor) -> None:
    assert float((paint(loaded) - painting).abs().max()) < SAME


class TestAdapters:
    def test_our_folder_loads_in_peft(self, base: Path, adapter: Path, painting: torch.Tensor) -> None:
        loaded = pipeline(base)
        several = (adapter / "unet").is_dir()
        loaded.unet = peft.PeftModel.from_pretrained(loaded.unet, adapter / "unet" if several else adapter)
        if several:
            loaded.text_encoder = peft.PeftModel.from_pretrained(loaded.text_encoder, adapter / "text_encoder")
        assert_paints(loaded, painting)

    def test_the_text_encoders_names_are_those_of_today(self, base: Path, work: Path) -> None:
        report = add_hra(base, work / "dry", targets=TARGETS["both"], dry_run=True)
        assert any("transformers 5.6" in note for note in report.notes)
        assert not any("transformers" in note for note in add_hra(base, work / "dry", dry_run=True).notes)

    def test_an_untrained_one_is_the_identity(self, base: Path, work: Path) -> None:
        add_hra(base, work / "untrained", targets=["sd15-control", "unet.**.resnets.*.conv1"])
        loaded = pipeline(base)
        loaded.unet = peft.PeftModel.from_pretrained(loaded.unet, work / "untrained")
        assert_paints(loaded, paint(pipeline(base)))

    @pytest.mark.parametrize("form", ["kohya-lora", "diffusers-lora"])
    def test_exports_load_with_load_lora_weights(
        self, base: Path, adapter: Path, painting: torch.Tensor, work: Path, form: str
    ) -> None:
        output = work / f"{adapter.name}-{form}.safetensors"
        convert(adapter, output, form, base=str(base))
        loaded = pipeline(base)
        loaded.load_lora_weights(str(output))
        assert_paints(loaded, painting)

    def test_a_folder_of_diffusers_lora_loads_by_its_folder(
        self, base: Path, adapter: Path, painting: torch.Tensor, work: Path
    ) -> None:
        convert(adapter, work / f"{adapter.name}-folder", "diffusers-lora", base=str(base))
        loaded = pipeline(base)
        loaded.load_lora_weights(work / f"{adapter.name}-folder")
        assert_paints(loaded, painting)

    @pytest.mark.parametrize("form", ["kohya-lora", "diffusers-lora", "peft-lora"])
    def test_exports_merge_to_the_same_weights(
        self, base: Path, adapter: Path, merged: Path, work: Path, form: str
    ) -> None:
        output = work / f"{adapter.name}-again-{form}{'' if form == 'peft-lora' else '.safetensors'}"
        convert(adapter, output, form, base=str(base))
        merge(base, [output], work / f"from-{output.stem}")
        diff(merged, work / f"from-{output.stem}", fail_above=1e-6)

    def test_a_lora_of_diffusers_merges_to_its_numbers(self, base: Path, work: Path) -> None:
        loaded = pipeline(base)
        loaded.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv1"]))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in loaded.unet.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        from peft.utils import get_peft_model_state_dict

        loaded.save_lora_weights(work / "theirs", unet_lora_layers=get_peft_model_state_dict(loaded.unet))
        merge(base, [work / "theirs"], work / "theirs-merged")
        # Without metadata diffusers itself takes alpha to be the rank.
        loaded = pipeline(base)
        loaded.load_lora_weights(work / "theirs")
        assert_paints(pipeline(work / "theirs-merged"), paint(loaded))


class TestLayouts:
    def test_all_names_make_the_round_trip(self, base: Path, ldm: Path, work: Path) -> None:
        table = json.loads((DATA / "sd15_ldm_keys.json").read_text())
        assert open_checkpoint(ldm).tensors.keys() == table.keys()
        report = convert(ldm, work / "back", "diffusers", base=str(base))
        assert report.totals["tensors"] == 1130
        assert report.totals["dropped"] == 15
        same = diff(base, work / "back", fail_above=0)
        assert (same.totals["tensors"], same.totals["equal"]) == (1130, 1130)
        for component in ("unet", "vae", "text_encoder"):
            assert flat(read(work / "back" / component)).keys() == flat(read(base / component)).keys()

    def test_the_folder_that_comes_back_draws_the_same(self, base: Path, ldm: Path, work: Path) -> None:
        convert(ldm, work / "drawn", "diffusers", base=str(base))
        loaded = pipeline(work / "drawn")
        assert type(loaded.scheduler).__name__ == "DDIMScheduler"  # the base's, not the table's
        assert torch.equal(paint(loaded), paint(pipeline(base)))

    def test_an_ldm_file_loads_whole(self, base: Path, ldm: Path) -> None:
        loaded = diffusers.StableDiffusionPipeline.from_single_file(str(ldm), config=str(base), local_files_only=True)
        assert_paints(loaded, paint(pipeline(base)))

    def test_a_merged_ldm_file_loads_whole(
        self, base: Path, ldm: Path, adapter: Path, painting: torch.Tensor, work: Path
    ) -> None:
        output = work / f"{adapter.name}-merged.safetensors"
        report = merge(ldm, [adapter], output)
        assert not any("another base" in note for note in report.notes)  # one fingerprint in both namings
        loaded = diffusers.StableDiffusionPipeline.from_single_file(
            str(output), config=str(base), local_files_only=True
        )
        assert_paints(loaded, painting)

    def test_the_unet_of_a_merged_ldm_file_loads_alone(
        self, base: Path, ldm: Path, adapter: Path, merged: Path, work: Path
    ) -> None:
        output = work / f"{adapter.name}-unet.safetensors"
        merge(ldm, [adapter], output)
        loaded = diffusers.UNet2DConditionModel.from_single_file(
            str(output), config=str(base), subfolder="unet", local_files_only=True
        )
        wanted = read(merged / "unet")
        found = loaded.state_dict()
        assert found.keys() == wanted.keys()
        assert all(relative_error(found[name], wanted[name]) < 1e-6 for name in wanted if wanted[name].any())

    def test_one_component_becomes_a_part_of_an_ldm_file(self, base: Path, work: Path) -> None:
        report = convert(base / "unet", work / "unet-ldm.safetensors", "ldm")
        names = set(open_checkpoint(work / "unet-ldm.safetensors").tensors)
        assert sum(name.startswith("model.diffusion_model.") for name in names) == 686
        assert not any(name.startswith(("cond_stage_model.", "first_stage_model.")) for name in names)
        assert any("VAE and text encoder missing" in note for note in report.notes)

    def test_hra_travels_between_the_layouts(self, base: Path, ldm: Path, work: Path) -> None:
        add_hra(base, work / "hra-folder", form="checkpoint")
        add_hra(ldm, work / "hra-ldm.safetensors")
        convert(work / "hra-folder", work / "hra-converted.safetensors", "ldm")
        found, wanted = read(work / "hra-converted.safetensors"), read(work / "hra-ldm.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    def test_hra_inside_a_diffusers_folder_folds(self, base: Path, work: Path) -> None:
        add_hra(base, work / "inside", form="checkpoint")
        report = merge(work / "inside", [], work / "folded")
        assert report.layers == 144
        assert_paints(pipeline(work / "folded"), paint(pipeline(base)))


def flat(tensors: Tensors) -> Tensors:
    """CLIP's names without `text_model.`, which transformers no longer writes and still reads."""
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
