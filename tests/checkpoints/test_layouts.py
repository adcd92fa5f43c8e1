"""The SD1.x tables against the real files' names and shapes, and names translated both ways."""

from __future__ import annotations

import subprocess
import sys

import pytest
from sd15_shapes import CLIP, CLIP_FLAT, LDM, LDM_TABLE, PIPELINE, UNET, VAE, old_vae

from ortho_cli.checkpoints import layouts
from ortho_cli.checkpoints.layouts import (
    LDM_ONLY,
    canonical_shape,
    canonical_to_ldm,
    component_name,
    ema_name,
    fingerprint_name,
    from_canonical,
    kohya_layers,
    kohya_name,
    ldm_shape,
    ldm_to_canonical,
    sd15_layers,
    sd15_tensors,
    to_canonical,
)
from ortho_cli.errors import TargetError

COMPONENTS = {"sd15-unet": ("unet.", UNET), "sd15-vae": ("vae.", VAE), "sd15-text-encoder": ("text_encoder.", CLIP)}


class TestTables:
    def test_every_shared_name_is_translated_one_to_one(self) -> None:
        assert (len(UNET), len(VAE), len(CLIP), len(PIPELINE)) == (686, 248, 196, 1130)
        translated = {name: ldm_to_canonical(name) for name in LDM}
        shared = {name: canonical for name, canonical in translated.items() if canonical is not None}
        assert set(shared.values()) == set(PIPELINE)
        assert len(shared) == 1130
        assert {canonical_to_ldm(canonical): canonical for canonical in PIPELINE} == shared

    def test_names_that_only_ldm_has_are_the_other_fifteen(self) -> None:
        assert {name for name in LDM if ldm_to_canonical(name) is None} == set(LDM_ONLY)
        assert {name: (kind, tuple(shape)) for name, (kind, shape) in LDM_TABLE.items() if name in LDM_ONLY} == LDM_ONLY
        assert len(LDM_ONLY) == 15

    def test_shapes_differ_for_eight_projections_of_the_autoencoder_only(self) -> None:
        differing = []
        for canonical, shape in PIPELINE.items():
            stored = LDM[canonical_to_ldm(canonical) or ""]
            assert ldm_shape(canonical, shape) == stored
            assert canonical_shape(canonical, stored) == shape
            if stored != shape:
                differing.append(canonical)
        assert len(differing) == 8
        assert all(".mid_block.attentions.0.to_" in name and name.endswith(".weight") for name in differing)

    def test_a_shape_may_be_asked_by_layer_and_vectors_keep_theirs(self) -> None:
        layer = "vae.decoder.mid_block.attentions.0.to_out.0"
        assert ldm_shape(layer, (512, 512)) == (512, 512, 1, 1)
        assert canonical_shape(layer + ".fixed_linear.weight", (512, 512, 1, 1)) == (512, 512)
        assert ldm_shape(layer + ".hra_u", (512, 8)) == (512, 8)
        assert canonical_shape("unet.conv_out", (4, 4, 1, 1)) == (4, 4, 1, 1)

    def test_layers_and_their_adapted_tensors_are_translated_too(self) -> None:
        layer = "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_k"
        canonical = "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k"
        for end in ("", ".weight", ".fixed_linear.weight", ".hra_u"):
            assert ldm_to_canonical(layer + end) == canonical + end
            assert canonical_to_ldm(canonical + end) == layer + end

    @pytest.mark.parametrize(
        "name",
        [
            "model.diffusion_model.input_blocks.1.1",  # a block, not a layer
            "model.diffusion_model.input_blocks.12.0.in_layers.0.weight",
            "model.diffusion_model.output_blocks.0.1.proj_in.weight",  # SDXL
            "control_model.time_embed.0.weight",
            "model_ema.diffusion_modelinput_blocks00weight",
            "conv_in.weight",
            "",
        ],
    )
    def test_other_names_have_no_translation(self, name: str) -> None:
        assert ldm_to_canonical(name) is None

    def test_no_layer_lies_inside_another(self) -> None:
        layers = {name.rpartition(".")[0] for name in PIPELINE}
        assert not any(layer.rpartition(".")[0] in layers for layer in layers)

    def test_the_text_encoder_of_old_merges_has_no_text_model(self) -> None:
        flat = "cond_stage_model.transformer.encoder.layers.3.mlp.fc1.bias"
        assert ldm_to_canonical(flat) == "text_encoder.text_model.encoder.layers.3.mlp.fc1.bias"

    def test_ema_names_are_those_of_the_full_file(self) -> None:
        names = [ema_name(name) for name in LDM if name.startswith("model.diffusion_model.")]
        assert len(set(names)) == 686
        assert names[0] == "model_ema.diffusion_modelinput_blocks00weight"
        assert all("." not in name.removeprefix("model_ema.") for name in names)
        with pytest.raises(ValueError, match="first_stage_model"):
            ema_name("first_stage_model.quant_conv.weight")

    def test_generated_lists_equal_the_files(self) -> None:
        assert sorted(sd15_tensors()) == sorted(PIPELINE)
        matrices = {name.removesuffix(".weight") for name, shape in PIPELINE.items() if len(shape) >= 2}
        assert set(sd15_layers()) == matrices
        assert len(sd15_layers()) == len(matrices)


class TestNames:
    @pytest.mark.parametrize("layout", COMPONENTS)
    def test_a_component_there_and_back(self, layout: str) -> None:
        prefix, tensors = COMPONENTS[layout]
        for name in tensors:
            assert to_canonical(name, layout) == prefix + name
            assert from_canonical(prefix + name, layout) == name
        others = [name for name in PIPELINE if not name.startswith(prefix)]
        assert all(from_canonical(name, layout) is None for name in others)

    def test_the_layouts_of_a_whole_model(self) -> None:
        for canonical in PIPELINE:
            assert to_canonical(canonical, "sd15-diffusers") == from_canonical(canonical, "sd15-diffusers") == canonical
            ldm = from_canonical(canonical, "sd15-ldm")
            assert ldm is not None
            assert to_canonical(ldm, "sd15-ldm") == canonical
        assert to_canonical("betas", "sd15-ldm") == "betas"
        assert from_canonical("unet.add_embedding.linear_1.weight", "sd15-ldm") is None

    def test_old_spellings_become_new_ones(self) -> None:
        assert [to_canonical(old_vae(name), "sd15-vae") for name in VAE] == ["vae." + name for name in VAE]
        assert {old_vae(name) for name in VAE} != set(VAE)
        assert [to_canonical(name, "sd15-text-encoder") for name in CLIP_FLAT] == ["text_encoder." + n for n in CLIP]
        flat = ["text_encoder." + name for name in CLIP_FLAT]
        assert [to_canonical(name, "sd15-diffusers") for name in flat] == ["text_encoder." + name for name in CLIP]
        layer = "vae.encoder.mid_block.attentions.0.proj_attn"
        assert to_canonical(layer, "sd15-diffusers") == "vae.encoder.mid_block.attentions.0.to_out.0"

    def test_plain_names_are_themselves(self) -> None:
        for name in ("model.diffusion_model.out.2.weight", "encoder.layers.0.mlp.fc1", "lm_head"):
            assert to_canonical(name, "plain") == from_canonical(name, "plain") == name

    def test_an_unknown_layout_is_a_programmers_mistake(self) -> None:
        with pytest.raises(ValueError, match="no layout 'sdxl'"):
            to_canonical("a", "sdxl")
        with pytest.raises(ValueError, match="no layout 'sdxl'"):
            from_canonical("a", "sdxl")

    @pytest.mark.parametrize(
        ("canonical", "component", "local"),
        [
            ("unet.conv_in", "unet", "conv_in"),
            ("vae.quant_conv", "vae", "quant_conv"),
            ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder", "encoder.layers.0.mlp.fc1"),
            ("text_encoder_2.text_model.final_layer_norm", "text_encoder_2", "final_layer_norm"),
            ("transformer.transformer_blocks.0.attn.to_q", "transformer", "transformer_blocks.0.attn.to_q"),
            ("transformer.h.0.attn.c_attn", "", "transformer.h.0.attn.c_attn"),  # GPT-2
            ("transformer.layer.0.attention.q_lin", "", "transformer.layer.0.attention.q_lin"),  # DistilBERT
            ("text_model.encoder.layers.0.mlp.fc1", "", "encoder.layers.0.mlp.fc1"),
            ("model.layers.0.mlp.up_proj", "", "model.layers.0.mlp.up_proj"),
        ],
    )
    def test_components(self, canonical: str, component: str, local: str) -> None:
        assert component_name(canonical) == (component, local)
        assert fingerprint_name(canonical) == local

    def test_a_fingerprint_name_is_the_same_in_every_layout(self) -> None:
        for layout, (prefix, tensors) in COMPONENTS.items():
            for name in tensors:
                ldm = to_canonical(from_canonical(prefix + name, "sd15-ldm") or "", "sd15-ldm")
                assert fingerprint_name(ldm) == fingerprint_name(to_canonical(name, layout))


class TestKohya:
    def test_the_full_set_of_sd15_resolves_without_a_base(self) -> None:
        table = kohya_layers(sd15_layers())
        blocks = [name for name in table if "_attentions_" in name and name.startswith("lora_unet_")]
        text = [name for name in table if name.startswith("lora_te_text_model_encoder_layers_")]
        assert (len(blocks), len(text)) == (192, 72)
        assert all(kohya_name(layer) == name for name, layer in table.items())
        expected = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
        assert table["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"] == expected
        assert table["lora_te_text_model_encoder_layers_0_mlp_fc1"].endswith("text_model.encoder.layers.0.mlp.fc1")

    def test_two_layers_with_one_flattened_name(self) -> None:
        with pytest.raises(TargetError, match=r"'unet\.to_out\.0' and 'unet\.to_out_0' are both 'lora_unet_to_out_0'"):
            kohya_layers(["unet.to_out.0", "unet.to_out_0"])

    def test_a_layer_kohya_has_no_name_for(self) -> None:
        with pytest.raises(TargetError, match=r"'vae\.quant_conv' has no name in kohya's format"):
            kohya_name("vae.quant_conv")
        assert kohya_layers(["vae.quant_conv", "model.layers.0.mlp"]) == {}


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; import ortho_cli.checkpoints.layouts, ortho_cli.checkpoints.targets; "
        "print([m for m in ('torch', 'numpy', 'pydantic', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    assert all(hasattr(layouts, name) for name in layouts.__all__)
