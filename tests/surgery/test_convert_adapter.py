"""convert of adapters: the same change of the same layers in every dialect, or a refusal that says why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import Tensors, metadata, peft_folder, read, relative_error, train
from safetensors.torch import save_file

from ortho_cli.checkpoints.adapters import base_bound, read_adapter
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.errors import CheckpointError, UsageError
from ortho_cli.surgery.adapter_factors import lora_factors
from ortho_cli.surgery.add_hra import add_hra
from ortho_cli.surgery.convert import convert
from ortho_cli.surgery.convert_adapter import named_layers
from ortho_cli.surgery.diff import diff
from ortho_cli.surgery.inspect import inspect
from ortho_cli.surgery.merge import merge

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
LORA_FORMS = ("peft-lora", "kohya-lora", "diffusers-lora")


def unet() -> Tensors:
    """A few layers with the names of a UNet of diffusers, one of them a convolution."""
    torch.manual_seed(0)
    return {
        f"{ATTENTION}.to_q.weight": torch.randn(12, 12), f"{ATTENTION}.to_out.0.weight": torch.randn(12, 12),
        f"{CROSS}.to_q.weight": torch.randn(12, 12), f"{CROSS}.to_k.weight": torch.randn(12, 20),
        "conv_in.weight": torch.randn(12, 4, 3, 3), "conv_in.bias": torch.randn(12),
        "down_blocks.0.attentions.0.proj_in.weight": torch.randn(12, 12, 1, 1),
    }  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pipeline of a UNet and a text encoder."""
    for component, tensors in (("unet", unet()), ("text_encoder", {f"{TEXT}.weight": torch.randn(10, 10)})):
        (tmp_path / "sd" / component).mkdir(parents=True)
        name = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        save_file(tensors, tmp_path / "sd" / component / f"{name}.safetensors")
    (tmp_path / "sd" / "model_index.json").write_text("{}")
    return tmp_path / "sd"


@pytest.fixture
def hra(base: Path, tmp_path: Path) -> Path:
    """HRA on every layer of both components."""
    add_hra(base, tmp_path / "hra", targets=["**"], rank=4)
    return train(tmp_path / "hra")


def output(folder: Path, form: str) -> Path:
    return folder / (f"{form}.safetensors" if form in ("kohya-lora", "diffusers-lora") else form)


class TestHraToLora:
    @pytest.mark.parametrize("form", LORA_FORMS)
    def test_merges_to_the_same_weights(self, base: Path, hra: Path, tmp_path: Path, form: str) -> None:
        report = convert(hra, output(tmp_path, form), form, base=str(base))
        merge(base, [hra], tmp_path / "wanted")
        merge(base, [output(tmp_path, form)], tmp_path / "found")
        diff(tmp_path / "wanted", tmp_path / "found", fail_above=1e-6)
        assert diff(base, tmp_path / "found").totals["max_relative_difference"] > 0.1
        assert report.layers == 7
        assert report.totals == {"from": "peft (hra)", "to": form}

    @pytest.mark.parametrize("form", LORA_FORMS)
    def test_is_bound_to_its_base_and_says_so(self, base: Path, hra: Path, tmp_path: Path, form: str) -> None:
        convert(hra, output(tmp_path, form), form, base=str(base))
        adapter = read_adapter(output(tmp_path, form))
        assert base_bound(adapter)
        assert adapter.metadata["ortho.base_fingerprint"] == read_adapter(hra).metadata["ortho.base_fingerprint"]
        assert inspect(output(tmp_path, form), base=base).totals["adapter"]["fits_base"]["fingerprint"] is True

    def test_alpha_is_the_rank_in_every_dialect(self, base: Path, hra: Path, tmp_path: Path) -> None:
        for form in LORA_FORMS:
            convert(hra, output(tmp_path, form), form, base=str(base))
        kohya = read(output(tmp_path, "kohya-lora"))
        alphas = {name: tensor for name, tensor in kohya.items() if name.endswith(".alpha")}
        assert len(alphas) == 7
        assert all(tensor.shape == () and tensor.item() == 4.0 for tensor in alphas.values())
        marks = metadata(output(tmp_path, "kohya-lora"))
        assert (marks["ss_network_dim"], marks["ss_network_alpha"]) == ("4", "4")
        assert (marks["ss_network_module"], marks["ss_base_model_version"]) == ("networks.lora", "sd_v1")
        config = json.loads((tmp_path / "peft-lora" / "unet" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
        flat = json.loads(metadata(output(tmp_path, "diffusers-lora"))["lora_adapter_metadata"])
        assert (flat["unet.r"], flat["unet.lora_alpha"], flat["text_encoder.r"]) == (4, 4, 4)

    def test_convolutions_keep_their_kernels(self, base: Path, hra: Path, tmp_path: Path) -> None:
        convert(hra, tmp_path / "k.safetensors", "kohya-lora", base=str(base))
        kohya = read(tmp_path / "k.safetensors")
        assert kohya["lora_unet_conv_in.lora_down.weight"].shape == (4, 4, 3, 3)
        assert kohya["lora_unet_conv_in.lora_up.weight"].shape == (12, 4, 1, 1)
        assert kohya["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"].shape == (4, 12, 1, 1)
        linear = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
        assert kohya[f"{linear}.lora_down.weight"].shape == (4, 12)
        assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in kohya

    @pytest.mark.parametrize("strength", [1.0, 0.5])
    def test_down_needs_no_weight_of_the_base(self, base: Path, hra: Path, strength: float) -> None:
        adapter = read_adapter(hra)
        layer = named_layers(adapter, open_checkpoint(base), print)[0]
        assert layer.weight is not None
        _, down = lora_factors(adapter, replace(layer, strength=strength))
        gone = replace(layer, strength=strength, weight=replace(layer.weight, path=base / "gone"))
        unread = lora_factors(adapter, gone)
        assert torch.equal(unread[1].make(), down.make())
        with pytest.raises(CheckpointError, match="cannot be read"):
            unread[0].make()

    def test_a_rank_above_the_outputs_is_still_exact(self, tmp_path: Path) -> None:
        """`conv_out` has 4 outputs; its adapter may have 8 reflections."""
        save_file({"conv_out.weight": torch.randn(4, 12, 3, 3), **unet()}, tmp_path / "unet.safetensors")
        add_hra(tmp_path / "unet.safetensors", tmp_path / "hra", targets=["conv_out"], rank=8)
        train(tmp_path / "hra")
        convert(tmp_path / "hra", tmp_path / "k.safetensors", "kohya-lora", base=str(tmp_path / "unet.safetensors"))
        for adapter, name in (("hra", "a"), ("k.safetensors", "b")):
            merge(tmp_path / "unet.safetensors", [tmp_path / adapter], tmp_path / f"{name}.safetensors")
        diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", fail_above=1e-6)


class TestLoraToLora:
    """Scales go into the factors; names through the tables, so no base is needed."""

    @pytest.mark.parametrize("form", LORA_FORMS)
    @pytest.mark.parametrize("config", [{"lora_alpha": 10}, {"lora_alpha": 3, "use_rslora": True}])
    def test_scale_and_names(self, base: Path, tmp_path: Path, form: str, config: dict[str, Any]) -> None:
        torch.manual_seed(1)
        layers = {f"{ATTENTION}.to_q": (12, 12), f"{CROSS}.to_k": (12, 20)}
        factors = {}
        for layer, (rows, columns) in layers.items():
            factors[f"{layer}.lora_A.weight"] = torch.randn(2, columns)
            factors[f"{layer}.lora_B.weight"] = torch.randn(rows, 2)
        settings = {"peft_type": "LORA", "r": 2, "target_modules": ["to_q", "to_k"], **config}
        lora = peft_folder(tmp_path / "lora", factors, **settings)
        convert(lora, output(tmp_path, form), form)
        assert not base_bound(read_adapter(output(tmp_path, form)))
        merge(base, [output(tmp_path, form)], tmp_path / "merged")
        scale = config["lora_alpha"] / (2**0.5 if config.get("use_rslora") else 2)
        merged = read(tmp_path / "merged" / "unet")
        for layer in layers:
            up, down = factors[f"{layer}.lora_B.weight"].double(), factors[f"{layer}.lora_A.weight"].double()
            wanted = unet()[f"{layer}.weight"].double() + scale * up @ down
            assert relative_error(merged[f"{layer}.weight"], wanted) < 1e-6

    def test_ranks_that_differ(self, base: Path, tmp_path: Path) -> None:
        factors = {}
        for layer, rank in ((f"{ATTENTION}.to_q", 2), (f"{CROSS}.to_q", 3), (f"{ATTENTION}.to_out.0", 3)):
            factors[f"{layer}.lora_A.weight"] = torch.randn(rank, 12)
            factors[f"{layer}.lora_B.weight"] = torch.randn(12, rank)
        lora = peft_folder(
            tmp_path / "lora", factors, peft_type="LORA", r=3, lora_alpha=6, target_modules=["to_q", "to_out.0"],
            rank_pattern={f"{ATTENTION}.to_q": 2},
        )  # fmt: skip
        merge(base, [lora], tmp_path / "wanted")
        for form in LORA_FORMS:
            convert(lora, output(tmp_path, form), form, base=str(base))
            merge(base, [output(tmp_path, form)], tmp_path / f"from-{form}")
            diff(tmp_path / "wanted", tmp_path / f"from-{form}", fail_above=1e-6)
        assert metadata(output(tmp_path, "kohya-lora"))["ss_network_dim"] == "Dynamic"
        config = json.loads((tmp_path / "peft-lora" / "adapter_config.json").read_text())
        assert (config["r"], config["rank_pattern"]) == (3, {f"{ATTENTION}.to_q": 2})

    def test_a_lora_bound_to_its_base_stays_so(self, base: Path, hra: Path, tmp_path: Path) -> None:
        convert(hra, tmp_path / "one.safetensors", "kohya-lora", base=str(base))
        convert(tmp_path / "one.safetensors", tmp_path / "two", "peft-lora")
        assert base_bound(read_adapter(tmp_path / "two"))
        factors = {f"{ATTENTION}.to_q.lora_A.weight": torch.randn(2, 12)}
        factors[f"{ATTENTION}.to_q.lora_B.weight"] = torch.randn(12, 2)
        settings = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q"], "init_lora_weights": "pissa"}
        pissa = peft_folder(tmp_path / "pissa", factors, peft_type="LORA", **settings)
        convert(pissa, tmp_path / "three.safetensors", "kohya-lora")
        assert base_bound(read_adapter(tmp_path / "three.safetensors"))


class TestHraToHra:
    @pytest.mark.parametrize("gram_schmidt", [False, True])
    def test_a_folder_of_a_checkpoints_own_adapter(self, tmp_path: Path, gram_schmidt: bool) -> None:
        save_file({f"unet.{name}": tensor for name, tensor in unet().items()}, tmp_path / "base.safetensors")
        options: dict[str, Any] = {"targets": ["to_q", "conv_in"], "rank": 4, "gram_schmidt": gram_schmidt}
        add_hra(tmp_path / "base.safetensors", tmp_path / "inside.safetensors", **options)
        add_hra(tmp_path / "base.safetensors", tmp_path / "beside", **options)
        convert(tmp_path / "inside.safetensors", tmp_path / "out", "peft-hra", base=str(tmp_path / "base.safetensors"))
        found, wanted = read(tmp_path / "out"), read(tmp_path / "beside")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("out", "beside")]
        assert configs[0] == configs[1]

    def test_the_llama_variant_goes_to_lora_with_its_vectors_beside(self, tmp_path: Path) -> None:
        weights = {"model.layers.0.self_attn.q_proj.weight": torch.randn(8, 6)}
        save_file(weights, tmp_path / "llama.safetensors")
        tensors = {"model.layers.0.self_attn.q_proj.oft_r": torch.randn(8, 2)}
        theirs = peft_folder(tmp_path / "hra", tensors, peft_type="OFT", r=2, target_modules=["q_proj"])
        convert(theirs, tmp_path / "lora", "peft-lora", base=str(tmp_path / "llama.safetensors"))
        assert read(tmp_path / "lora" / "hra.safetensors").keys() == {"model.layers.0.self_attn.q_proj.hra_u"}
        resumed = read_adapter(tmp_path / "lora")
        assert (resumed.dialect, resumed.kind, base_bound(resumed)) == ("ortho", "hra", False)
        (layer,) = resumed.layers.values()
        assert (layer.options["side"], layer.options["eps"]) == ("output", 1e-4)
        (tmp_path / "bare").mkdir()
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (tmp_path / "bare" / name).write_bytes((tmp_path / "lora" / name).read_bytes())
        for adapter in ("hra", "lora", "bare"):
            merge(tmp_path / "llama.safetensors", [tmp_path / adapter], tmp_path / f"{adapter}.safetensors")
            diff(tmp_path / "hra.safetensors", tmp_path / f"{adapter}.safetensors", fail_above=1e-6)


def test_outputs_must_suit_the_dialect(base: Path, hra: Path, tmp_path: Path) -> None:
    for form, name, message in (
        ("peft-lora", "x.safetensors", "a PEFT adapter is a folder"),
        ("kohya-lora", "x", "a kohya LoRA is one file"),
        ("kohya-lora", "x.pt", "does not write .pt"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(hra, tmp_path / name, form, base=str(base))


def test_loha_with_its_base_becomes_an_exact_lora(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    roles = {"hada_w1_a": (12, 2), "hada_w1_b": (2, 36), "hada_w2_a": (12, 2), "hada_w2_b": (2, 36)}
    source = tmp_path / "loha.safetensors"
    save_file({f"lora_unet_conv_in.{role}": torch.randn(shape) for role, shape in roles.items()}, source)
    convert(source, tmp_path / "lora", "peft-lora", base=str(base))
    assert read(tmp_path / "lora")["base_model.model.conv_in.lora_A.weight"].shape == (4, 4, 3, 3)
    merge(base, [source], tmp_path / "wanted")
    merge(base, [tmp_path / "lora"], tmp_path / "found")
    diff(tmp_path / "wanted", tmp_path / "found", fail_above=1e-6)


@pytest.mark.parametrize("form", LORA_FORMS)
def test_another_strength_in_every_form(base: Path, hra: Path, tmp_path: Path, form: str) -> None:
    strength = [0.4, "**.attn1.**=0.9", f"{TEXT}=0"]
    convert(hra, output(tmp_path, form), form, base=base, strength=strength)
    merge(base, hra, tmp_path / "wanted", strength=strength, exact=True)
    merge(base, output(tmp_path, form), tmp_path / "found", exact=True)
    found = read(tmp_path / "found")
    for name, tensor in read(tmp_path / "wanted").items():
        assert relative_error(found[name], tensor) < 2e-6, name
