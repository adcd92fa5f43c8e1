"""Names of adapters, in every spelling in use, find their layers; what is doubtful is refused by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ortho_cli.checkpoints.layouts import (
    LayerIndex,
    canonical_to_ldm,
    component_name,
    filed_name,
    fingerprint_name,
    from_canonical,
    sd15_layers,
)
from ortho_cli.errors import TargetError

SD15 = sd15_layers()
BERT = [f"encoder.layer.{i}.attention.self.{part}" for i in range(3) for part in ("query", "key", "value")]


def spelled(layout: str) -> list[str]:
    return [name for layer in SD15 if (name := from_canonical(layer, layout)) is not None]


class TestStableDiffusion:
    @pytest.mark.parametrize("base", ["sd15-ldm", "sd15-diffusers"])
    @pytest.mark.parametrize("adapter", ["sd15-ldm", "sd15-diffusers"])
    def test_either_naming_fits_either_base(self, base: str, adapter: str) -> None:
        index = LayerIndex(spelled(base), base)
        resolved = index.resolve_all(spelled(adapter))
        assert list(resolved.values()) == spelled(base)
        assert [index.canonical(layer) for layer in resolved.values()] == list(SD15)

    @pytest.mark.parametrize("base", ["sd15-ldm", "sd15-diffusers", "sd15-unet"])
    def test_an_adapter_of_the_bare_unet(self, base: str) -> None:
        names = [component_name(layer)[1] for layer in SD15 if layer.startswith("unet.")]
        resolved = LayerIndex(spelled(base), base).resolve_all(names)
        assert len(set(resolved.values())) == len(names)

    @pytest.mark.parametrize("flat", [True, False])
    @pytest.mark.parametrize("prefix", ["", "text_encoder.", "text_model.", "text_encoder.text_model."])
    def test_a_text_encoder_with_and_without_text_model(self, prefix: str, flat: bool) -> None:
        layers = [
            layer.replace("text_model.", "" if flat else "text_model.") for layer in SD15 if "text_model" in layer
        ]
        index = LayerIndex(layers, "sd15-diffusers")
        name = prefix + "encoder.layers.11.mlp.fc2"
        assert index.resolve(name) == layers[-1]
        assert index.resolve_all([name]) == {name: layers[-1]}

    def test_old_names_of_the_autoencoder(self) -> None:
        name = "vae.encoder.mid_block.attentions.0.query"
        new = "vae.encoder.mid_block.attentions.0.to_q"
        assert LayerIndex([new], "sd15-diffusers").resolve(name) == new
        assert LayerIndex([name], "sd15-diffusers").resolve(canonical_to_ldm(new) or "") == name

    def test_an_adapter_with_a_text_encoder_does_not_fit_a_bare_unet(self) -> None:
        index = LayerIndex(spelled("sd15-unet"), "sd15-unet")
        text = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
        with pytest.raises(TargetError, match="1 of 2 layer names fit no layer"):
            index.resolve_all(["unet.conv_in", text])

    def test_components_are_not_mixed_up(self) -> None:
        layers = [f"text_encoder{n}.text_model.encoder.layers.0.mlp.fc1" for n in ("", "_2")]
        index = LayerIndex(layers, "plain")
        assert [index.resolve(layer) for layer in layers] == layers
        assert LayerIndex(layers[:1], "plain").resolve(layers[1]) is None
        with pytest.raises(TargetError, match="fits more than one layer"):
            index.resolve("encoder.layers.0.mlp.fc1")


class TestWrappers:
    @pytest.mark.parametrize("wrapper", ["bert.", "model.", "model.language_model.", "base.model.inner."])
    def test_on_either_side(self, wrapper: str) -> None:
        wrapped = [wrapper + name for name in BERT]
        assert list(LayerIndex(BERT, "plain").resolve_all(wrapped).values()) == BERT
        assert list(LayerIndex(wrapped, "plain").resolve_all(BERT).values()) == wrapped
        assert LayerIndex(BERT, "plain").resolve(wrapped[4]) == BERT[4]
        assert LayerIndex(wrapped, "plain").resolve(BERT[4]) == wrapped[4]

    def test_must_be_the_same_for_all_names(self) -> None:
        index = LayerIndex([*BERT, "pooler.dense"], "plain")
        names = ["bert." + BERT[0], "roberta." + BERT[1]]
        assert all(index.resolve(name) for name in names)
        with pytest.raises(TargetError, match="1 of 2 layer names fit no layer of the checkpoint: 'roberta"):
            index.resolve_all(names)
        with pytest.raises(TargetError, match="1 of 2 layer names"):
            index.resolve_all(["bert." + BERT[0], BERT[1]])

    def test_is_no_index_and_not_deep(self) -> None:
        assert LayerIndex(["q"], "plain").resolve("layers.0.q") is None
        assert LayerIndex(["layers.0.q"], "plain").resolve("q") is None
        assert LayerIndex(["q.b"], "plain").resolve("a.b.c.d.q.b") is None

    def test_may_not_be_ambiguous(self) -> None:
        towers = LayerIndex(["vision.layers.0.q", "text.layers.0.q"], "plain")
        for ask in (towers.resolve, lambda name: towers.resolve_all([name])):
            with pytest.raises(TargetError, match=r"'layers\.0\.q' fits more than one layer: 'text\..*', 'vision"):
                ask("layers.0.q")

    def test_of_one_tower_is_told_by_the_other_names(self) -> None:
        towers = LayerIndex(["vision.layers.0.q", "text.layers.0.q", "text.layers.1.q"], "plain")
        resolved = towers.resolve_all(["layers.0.q", "layers.1.q"])
        assert list(resolved.values()) == ["text.layers.0.q", "text.layers.1.q"]

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.lists(st.sampled_from("abc0"), min_size=1, max_size=4).map(".".join), min_size=1, unique=True))
    def test_an_exact_name_is_never_shifted(self, layers: list[str]) -> None:
        index = LayerIndex(layers, "plain")
        assert index.resolve_all(layers) == {layer: layer for layer in layers}


class TestErrors:
    def test_unresolved_names_come_with_the_nearest(self) -> None:
        index = LayerIndex(BERT, "plain")
        names = [*BERT, *(name.replace("query", "query_proj") for name in BERT)]
        with pytest.raises(TargetError) as caught:
            index.resolve_all(names)
        assert caught.value.message == (
            "3 of 12 layer names fit no layer of the checkpoint: 'encoder.layer.0.attention.self.query_proj', "
            "'encoder.layer.1.attention.self.query_proj', 'encoder.layer.2.attention.self.query_proj'"
        )
        assert caught.value.hint is not None
        assert caught.value.hint.startswith("nearest names: encoder.layer.0.attention.self.query, ")
        assert caught.value.hint.endswith("list them with: ortho inspect CHECKPOINT --layers")
        assert caught.value.exit_code == 4

    def test_a_name_like_nothing(self) -> None:
        with pytest.raises(TargetError) as caught:
            LayerIndex(BERT, "plain").resolve_all(["zzz"])
        assert caught.value.hint == "list them with: ortho inspect CHECKPOINT --layers"

    def test_two_names_of_one_layer(self) -> None:
        index = LayerIndex(spelled("sd15-ldm"), "sd15-ldm")
        with pytest.raises(TargetError, match=r"'unet\.conv_in' and 'conv_in' are both layer 'model\.diffusion_model"):
            index.resolve_all(["unet.conv_in", "conv_in"])

    def test_nearest(self) -> None:
        index = LayerIndex(BERT, "plain")
        assert index.nearest("encoder.layer.1.attention.self.qury", 1) == ["encoder.layer.1.attention.self.query"]
        assert len(index.nearest("encoder.layer.1.attention.self.query")) == 3
        assert index.nearest("zzz") == []


VIT_FILE = [
    f"vit.encoder.layer.{block}.{layer}"
    for block in (0, 1)
    for layer in (
        "attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense",
        "intermediate.dense", "output.dense",
    )
]  # fmt: skip
VIT_MEMORY = [
    f"vit.layers.{block}.{layer}"
    for block in (0, 1)
    for layer in (
        "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2",
    )
]  # fmt: skip


@pytest.mark.parametrize("wrapper", ["", "model.", "vit."])
def test_vision_layers_as_transformers_names_them_in_memory(wrapper: str) -> None:
    """Files and memory find each other's layers, also without or behind a wrapper."""

    def wrapped(names: list[str]) -> list[str]:
        return [name.removeprefix("vit.") if wrapper == "vit." else wrapper + name for name in names]

    for held, asked in ((VIT_FILE, VIT_MEMORY), (VIT_MEMORY, VIT_FILE)):
        assert LayerIndex(held, "plain").resolve_all(wrapped(asked)) == dict(zip(wrapped(asked), held, strict=True))
        assert LayerIndex(wrapped(held), "plain").resolve_all(asked) == dict(zip(asked, wrapped(held), strict=True))
    assert [fingerprint_name(name) for name in VIT_MEMORY] == [fingerprint_name(name) for name in VIT_FILE] == VIT_FILE


def test_names_of_other_models_are_left_alone() -> None:
    for name in (
        "text_model.encoder.layers.0.mlp.fc1", "encoder.layers.0.attention.q_proj", "decoder.layers.3.mlp.fc2",
        "bert.encoder.layer.0.attention.output.dense", "encoder.layer.0.mlp.fc1", "model.layers.0.self_attn.q_proj",
    ):  # fmt: skip
        assert filed_name(name) == name
    assert filed_name("dinov2.encoder.layer.1.attention.o_proj") == "dinov2.encoder.layer.1.attention.output.dense"


@pytest.mark.filterwarnings("ignore")  # transformers' own, while it is imported
def test_the_table_is_transformers_own() -> None:
    transformers = pytest.importorskip("transformers")
    loading = pytest.importorskip("transformers.core_model_loading", reason="transformers 5 renames")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    for kind in ("ViT", "DeiT", "Dinov2", "Beit"):
        with torch.device("meta"):
            config = getattr(transformers, f"{kind}Config")(**sizes)
            model = getattr(transformers, f"{kind}ForImageClassification")(config)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                (filed,) = loading.revert_weight_conversion(model, {f"{name}.weight": module.weight})
                assert filed_name(name) == filed.removesuffix(".weight")
