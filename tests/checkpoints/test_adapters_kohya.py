"""kohya and LyCORIS files written by hand: our operators equal the formulas of their papers, spelled out densely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ortho_cli.checkpoints.adapters import Adapter, read_adapter
from ortho_cli.errors import CheckpointError

LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
LINEAR_LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
CONV_LAYER = "unet.down_blocks.0.resnets.0.conv1"
OUT, IN, RANK = 12, 8, 3


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def read(tmp_path: Path, name: str, tensors: dict[str, Any]) -> Adapter:
    torch.manual_seed(1)
    content = {f"{name}.{role}": torch.as_tensor(tensor).clone() for role, tensor in tensors.items()}
    save_file(content, tmp_path / "any name.safetensors")
    return read_adapter(tmp_path / "any name.safetensors")


def check(adapter: Adapter, layer: str, weight: Tensor, expected: Tensor) -> None:
    """The operator in float64 on the matricised weight, against the dense formula."""
    assert adapter.dialect == "kohya" and list(adapter.layers) == [layer]
    assert adapter.layers[layer].expects(weight.shape) is None
    merged = adapter.operator(layer, "float64").apply(weight.flatten(1)).reshape(weight.shape)
    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("alpha", "scale"), [(6.0, 2.0), (None, 1.0), (0.0, 1.0)])
def test_lora(alpha: float | None, scale: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight, up, down = random(OUT, IN), random(OUT, RANK), random(RANK, IN)
    tensors: dict[str, Any] = {"lora_up.weight": up, "lora_down.weight": down}
    if alpha is not None:
        tensors["alpha"] = torch.tensor(alpha, dtype=torch.float64)
    adapter = read(tmp_path, LINEAR, tensors)
    assert (adapter.kind, adapter.layers[LINEAR_LAYER].rank) == ("lora", RANK)
    check(adapter, LINEAR_LAYER, weight, weight + scale * up @ down)


def test_locon_and_its_mid_factor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight, up, down = random(OUT, IN, 3, 3), random(OUT, RANK, 1, 1), random(RANK, IN, 3, 3)
    adapter = read(tmp_path, CONV, {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(1.5)})
    check(adapter, CONV_LAYER, weight, weight + 0.5 * torch.einsum("orxy,rikl->oikl", up, down))
    mid, down = random(RANK, 5, 3, 3), random(5, IN, 1, 1)
    adapter = read(tmp_path, CONV, {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid})
    expected = weight + torch.einsum("or,rskl,si->oikl", up[..., 0, 0], mid, down[..., 0, 0])
    check(adapter, CONV_LAYER, weight, expected)


@pytest.mark.parametrize("tucker", [False, True])
def test_loha(tucker: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = random(OUT, IN, 3, 3)
    if tucker:
        parts = {f"hada_w{k}_{ab}": random(RANK, OUT if ab == "a" else IN) for k in (1, 2) for ab in "ab"}
        cores = {f"hada_t{k}": random(RANK, RANK, 3, 3) for k in (1, 2)}
        halves = [
            torch.einsum("rskl,ro,si->oikl", cores[f"hada_t{k}"], parts[f"hada_w{k}_a"], parts[f"hada_w{k}_b"])
            for k in (1, 2)
        ]
        parts |= cores
    else:
        parts = {f"hada_w{k}_a": random(OUT, RANK) for k in (1, 2)}
        parts |= {f"hada_w{k}_b": random(RANK, IN * 9) for k in (1, 2)}
        halves = [(parts[f"hada_w{k}_a"] @ parts[f"hada_w{k}_b"]).view_as(weight) for k in (1, 2)]
    adapter = read(tmp_path, CONV, {**parts, "alpha": torch.tensor(1.0)})
    assert adapter.kind == "loha"
    check(adapter, CONV_LAYER, weight, weight + halves[0] * halves[1] / RANK)


LOKR = {
    "both whole, alpha says nothing": ({"lokr_w1": (3, 2), "lokr_w2": (4, 4)}, 1.0),
    "second factored": ({"lokr_w1": (3, 2), "lokr_w2_a": (4, RANK), "lokr_w2_b": (RANK, 4)}, 5 / RANK),
    "both factored": (
        {"lokr_w1_a": (3, RANK), "lokr_w1_b": (RANK, 2), "lokr_w2_a": (4, RANK), "lokr_w2_b": (RANK, 4)}, 5 / RANK,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOKR)
def test_lokr(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes, scale = LOKR[case]
    parts = {role: random(*shape) for role, shape in shapes.items()}
    factors = [
        parts[f"lokr_w{k}"] if f"lokr_w{k}" in parts else parts[f"lokr_w{k}_a"] @ parts[f"lokr_w{k}_b"] for k in (1, 2)
    ]
    weight = random(OUT, IN)
    adapter = read(tmp_path, LINEAR, {**parts, "alpha": torch.tensor(5.0)})
    check(adapter, LINEAR_LAYER, weight, weight + scale * torch.kron(*factors))


def test_lokr_on_a_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight, w1 = random(OUT, IN, 3, 3), random(3, 2)
    w2 = random(4, 4, 3, 3)
    adapter = read(tmp_path, CONV, {"lokr_w1": w1, "lokr_w2": w2})
    check(adapter, CONV_LAYER, weight, weight + torch.kron(w1[..., None, None], w2))
    core, a, b = random(RANK, RANK, 3, 3), random(RANK, 4), random(RANK, 4)
    parts = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(2.0)}
    adapter = read(tmp_path, CONV, parts)
    w2 = torch.einsum("rskl,ro,si->oikl", core, a, b).contiguous()
    check(adapter, CONV_LAYER, weight, weight + 2 / RANK * torch.kron(w1[..., None, None], w2))


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("conv", [False, True])
def test_dora_scale_on_either_axis(axis: str, conv: bool, tmp_path: Path) -> None:
    """Its shape says which: (out, 1, ...) or, LyCORIS's older default, (1, in, ...)."""
    torch.manual_seed(0)
    kernel = (3, 3) if conv else ()
    weight, up, down = random(OUT, IN, *kernel), random(OUT, RANK), random(RANK, IN * (9 if conv else 1))
    kept = 0 if axis == "output" else 1
    magnitude = random(*(size if dim == kept else 1 for dim, size in enumerate(weight.shape)))
    name, layer = (CONV, CONV_LAYER) if conv else (LINEAR, LINEAR_LAYER)
    parts = {
        "lora_up.weight": up.reshape(OUT, RANK, *(1 for _ in kernel)),
        "lora_down.weight": down.reshape(RANK, IN, *kernel),
        "dora_scale": magnitude,
    }
    moved = weight + (up @ down).view_as(weight)
    norms = moved.pow(2).sum(dim=[dim for dim in range(weight.dim()) if dim != kept], keepdim=True).sqrt()
    adapter = read(tmp_path, name, parts)
    assert adapter.layers[layer].options["dora_axis"] == axis
    check(adapter, layer, weight, moved * magnitude / norms)
    if IN != OUT:
        wrong = tuple(reversed(weight.shape[:2])) + tuple(weight.shape[2:])
        assert adapter.layers[layer].expects(wrong) is not None


@pytest.mark.parametrize("prefix", ["oft_unet_", "lora_unet_"])
@pytest.mark.parametrize("alpha", [1e-3, 10.0])
def test_diag_oft_turns_the_outputs(prefix: str, alpha: float, tmp_path: Path) -> None:
    """kohya (`oft_unet_`) and LyCORIS: R = (I + Q)(I - Q)^-1, Q = B - B^T of norm at most alpha * out, W' = R^T W."""
    torch.manual_seed(0)
    blocks, weight, rescale = random(3, 4, 4), random(OUT, IN, 3, 3), random(OUT, 1, 1, 1)
    skew = blocks - blocks.mT
    skew = skew * min(1.0, alpha * OUT / float(skew.norm()))
    eye = torch.eye(4, dtype=torch.float64)
    rotation = torch.block_diag(*((eye + q) @ torch.linalg.inv(eye - q) for q in skew))  # type: ignore[no-untyped-call]
    expected = (rotation.T @ weight.flatten(1)).view_as(weight)
    parts = {"oft_blocks": blocks, "alpha": torch.tensor(alpha, dtype=torch.float64)}
    name = CONV.replace("lora_unet_", prefix)
    check(read(tmp_path, name, parts), CONV_LAYER, weight, expected)
    check(read(tmp_path, name, {**parts, "rescale": rescale}), CONV_LAYER, weight, rescale * expected)


def test_lycoris_alpha_zero_bounds_nothing_kohyas_everything(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = {"oft_blocks": random(3, 4, 4), "alpha": torch.tensor(0.0)}
    weight = random(OUT, IN)
    adapter = read(tmp_path, LINEAR.replace("lora_unet", "oft_unet"), parts)
    check(adapter, LINEAR_LAYER, weight, weight)
    free = read(tmp_path, LINEAR, parts).operator(LINEAR_LAYER, "float64").apply(weight)
    assert torch.linalg.vector_norm(free - weight) > 1


def test_full_differences_norms_and_biases_are_added(tmp_path: Path) -> None:
    tensors = {
        f"{LINEAR}.diff": torch.ones(4, 4),
        f"{CONV}.diff_b": torch.ones(4),
        f"{CONV}.lora_up.weight": torch.ones(4, 1, 1, 1),
        f"{CONV}.lora_down.weight": torch.ones(1, 4, 3, 3),
        "lora_unet_down_blocks_0_resnets_0_norm1.w_norm": torch.ones(4),
        "lora_unet_down_blocks_0_resnets_0_norm1.b_norm": torch.ones(4),
        "lora_te_text_model_final_layer_norm.w_norm": torch.ones(4),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = read_adapter(tmp_path / "x.safetensors")
    assert list(adapter.layers) == [CONV_LAYER]
    assert set(adapter.additions) == {
        f"{LINEAR_LAYER}.weight",
        f"{CONV_LAYER}.bias",
        "unet.down_blocks.0.resnets.0.norm1.weight",
        "unet.down_blocks.0.resnets.0.norm1.bias",
        "text_encoder.text_model.final_layer_norm.weight",
    }
    assert all(addition.scale == 1.0 for addition in adapter.additions.values())
    assert read(tmp_path, LINEAR, {"diff": torch.ones(2, 2)}).kind == "full"


LORA = {"lora_up.weight": torch.ones(4, 2), "lora_down.weight": torch.ones(2, 4)}


@pytest.mark.parametrize(
    ("name", "layer"),
    {
        "lycoris_mid_block_attentions_0_proj_in": "unet.mid_block.attentions.0.proj_in",
        "lycoris_text_model_encoder_layers_3_mlp_fc1": "text_encoder.text_model.encoder.layers.3.mlp.fc1",
        "lora_te_text_model_encoder_layers_3_mlp_fc1": "text_encoder.text_model.encoder.layers.3.mlp.fc1",
        "lora_te_encoder_layers_3_mlp_fc1": "text_encoder.text_model.encoder.layers.3.mlp.fc1",
        "lora_unet_time_embedding_linear_1": "unet.time_embedding.linear_1",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0":
            "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0",
    }.items(),
)  # fmt: skip
def test_prefixes_and_names(name: str, layer: str, tmp_path: Path) -> None:
    assert list(read(tmp_path, name, LORA).layers) == [layer]


BLOCKS = torch.ones(2, 2, 3, 3)
REFUSALS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "no such layer": (
        "lora_unet_mid_block_attentions_0_proj_inn", LORA, "is no layer of Stable Diffusion", "attentions_0_proj_in",
    ),
    "sdxl": ("lora_te1_text_model_encoder_layers_0_mlp_fc1", LORA, "is no layer of Stable Diffusion", "SDXL"),
    "unknown role": (LINEAR, {**LORA, "lora_middle.weight": BLOCKS}, "unknown tensor .*lora_middle", "lora_mid.weight"),
    "alpha alone": (LINEAR, {"alpha": torch.tensor(1.0)}, "unknown tensor .*alpha", ""),
    "boft": (LINEAR, {"oft_blocks": BLOCKS}, "LyCORIS BOFT .4-D oft_blocks, .* is not read", ""),
    "first diag-oft": (LINEAR, {"oft_diag": BLOCKS}, "diag-OFT of LyCORIS before 2.0 is not read", ""),
    "glora": (LINEAR, {"a1.weight": BLOCKS}, "GLoRA is not read", ""),
    "ia3": (LINEAR, {"weight": BLOCKS, "on_input": BLOCKS}, "IA3 is not read", ""),
    "two kinds": (LINEAR, {**LORA, "lokr_w1": BLOCKS}, "tensors of two kinds: lokr and lora", ""),
    "half a lora": (LINEAR, {"lora_up.weight": torch.ones(4, 2)}, "lacks its tensor 'down'", ""),
    "lokr factor twice": (
        LINEAR, {"lokr_w1": torch.ones(2, 2), "lokr_w1_a": torch.ones(2, 1), "lokr_w2": torch.ones(2, 2)},
        "w1 is there whole and in factors", "",
    ),
    "half a lokr": (LINEAR, {"lokr_w1": torch.ones(4, 2)}, "neither w2 nor both of w2_a and w2_b", ""),
    "kohya oft without bound": ("oft_unet_conv_in", {"oft_blocks": torch.ones(2, 3, 3)}, "has no alpha", ""),
    "rescale of another size": (
        LINEAR, {"oft_blocks": torch.ones(2, 3, 3), "rescale": torch.ones(5, 1)}, "rescale has 5 numbers for 6", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_reason(case: str, tmp_path: Path) -> None:
    name, tensors, message, hint = REFUSALS[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, name, tensors)
    assert hint in (caught.value.hint or "")
