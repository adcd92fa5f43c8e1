"""Presets at the papers' counts of layers and parameters, and the preset each kind of checkpoint gets."""

from __future__ import annotations

from math import prod

import pytest
import sd15_shapes
from language_model_shapes import deberta, llama, minilm
from sd15_shapes import Shapes, hra_targets, layers_of

from ortho_cli.checkpoints.layouts import to_canonical
from ortho_cli.checkpoints.targets import PRESETS, default_preset, select
from ortho_cli.errors import TargetError

LDM = layers_of(sd15_shapes.LDM)
UNET = layers_of(sd15_shapes.UNET)
PIPELINE = layers_of(sd15_shapes.PIPELINE)
LAYOUTS = {"sd15-ldm": LDM, "sd15-diffusers": PIPELINE, "sd15-unet": UNET}


def parameters(chosen: tuple[str, ...], layers: Shapes, rank: int = 8) -> int:
    return sum(rank * prod(layers[name][1:]) for name in chosen)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("preset", "count", "added"),
    [("sd15-control", 144, 895_488), ("sd15-attention", 128, 795_648), ("all-linear", 184, None)],
)
def test_sd15(layout: str, preset: str, count: int, added: int | None) -> None:
    layers = LAYOUTS[layout]
    selection = select([preset], layers, layout)
    assert len(selection.layers) == count
    assert selection.counts == {preset: count}
    assert all(to_canonical(name, layout).startswith("unet.") for name in selection.layers)
    if added is not None:
        assert parameters(selection.layers, layers) == added


def test_sd15_control_is_what_the_authors_adapt_in_file_order() -> None:
    authors = hra_targets()
    assert set(select(["sd15-control"], LDM, "sd15-ldm").layers) == set(authors)
    in_their_order = {name: LDM[name] for name in authors}
    assert list(select(["sd15-control"], in_their_order, "sd15-ldm").layers) == authors
    reversed_file = dict(reversed(LDM.items()))
    chosen = select(["sd15-control"], reversed_file, "sd15-ldm").layers
    assert list(chosen) == [name for name in reversed_file if name in set(authors)]


@pytest.mark.parametrize(
    ("preset", "layers", "count", "added"),
    [
        ("deberta-all", deberta(), 72, 663_552),
        ("llama-qv", llama(), 64, 2_097_152),
        ("llama-all", llama(), 224, 8 * 32 * (6 * 4096 + 11008)),
        ("bert-all", minilm(), 36, 8 * 6 * (5 * 384 + 1536)),
    ],
)
def test_language_models(preset: str, layers: Shapes, count: int, added: int) -> None:
    chosen = select([preset], layers, "plain").layers
    assert (len(chosen), parameters(chosen, layers)) == (count, added)


def test_all_linear_leaves_embeddings_and_heads() -> None:
    assert len(select(["all-linear"], llama(), "plain").layers) == 32 * 7
    assert set(deberta()) - set(select(["all-linear"], deberta(), "plain").layers) == {
        "deberta.embeddings.word_embeddings", "deberta.encoder.rel_embeddings", "lm_predictions.lm_head.dense",
        "mask_predictions.dense", "classifier",
    }  # fmt: skip
    chosen = select(["all-linear"], minilm(), "plain").layers
    assert len(chosen) == 37
    assert "pooler.dense" in chosen


@pytest.mark.parametrize(
    "left_out",
    [
        "transformer.wte", "transformer.wpe", "shared", "decoder.embed_tokens", "decoder.embed_positions",
        "gpt_neox.embed_in", "embed_out", "lm_head", "lm_head.dense", "classifier.out_proj", "score",
        "block.0.layer.0.SelfAttention.relative_attention_bias", "decoder.output_projection",
        "text_model.embeddings.token_embedding", "cls.predictions.transform.dense", "cls.predictions.decoder",
    ],
)  # fmt: skip
def test_all_linear_leaves_out(left_out: str) -> None:
    layers = {left_out: (16, 8), "time_embed.0": (8, 8), "shared_expert.up": (8, 8), "conv": (8, 8, 1, 1)}
    assert select(["all-linear"], layers, "plain").layers == ("time_embed.0", "shared_expert.up")


@pytest.mark.parametrize(
    ("layers", "layout", "preset"),
    [
        (LDM, "sd15-ldm", "sd15-control"),
        (PIPELINE, "sd15-diffusers", "sd15-control"),
        (UNET, "sd15-unet", "sd15-control"),
        (llama(2), "plain", "llama-qv"),
        (deberta(2), "plain", "deberta-all"),
        (minilm(), "plain", None),
        (["encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.v_proj"], "sd15-text-encoder", None),
        (["encoder.mid_block.attentions.0.to_q"], "sd15-vae", None),
        ([], "plain", None),
    ],
)
def test_defaults(layers: list[str], layout: str, preset: str | None) -> None:
    assert default_preset(layers, layout) == preset
    if preset is not None:
        assert preset in PRESETS


def test_each_has_a_line_of_help() -> None:
    assert list(PRESETS) == [
        "sd15-control", "sd15-attention", "llama-qv", "llama-all", "gpt2-all", "t5-all", "bert-all", "deberta-all",
        "all-linear",
    ]  # fmt: skip
    assert all(20 < len(preset.description) < 120 for preset in PRESETS.values())


def test_a_preset_for_another_model() -> None:
    with pytest.raises(TargetError) as caught:
        select(["llama-qv"], LDM, "sd15-ldm")
    assert caught.value.message == (
        "preset 'llama-qv' does not fit this checkpoint: 'self_attn.q_proj' matched 0 of 428 layers"
    )
    assert caught.value.hint is not None and "--targets sd15-control" in caught.value.hint
    with pytest.raises(TargetError, match="preset 'sd15-control' does not fit"):
        select(["sd15-control"], minilm(), "plain")
    with pytest.raises(TargetError, match="preset 'all-linear' matched 0 of 1 layers"):
        select(["all-linear"], {"lm_head": (8, 8)}, "plain")
