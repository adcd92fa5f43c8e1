"""The vision transformer against published counts, timm's names, and torch's own encoder layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ortho_cli.errors import RecipeError
from ortho_cli.models.vit import VisionTransformer, build
from ortho_cli.recipe.models import VitB16, VitMini


def small(**changes: object) -> VisionTransformer:
    settings = {"patch": 4, "depth": 2, "heads": 2, "dim": 8, **changes}
    return VisionTransformer(5, 3, 8, **settings)  # type: ignore[arg-type]


def test_counts_of_the_papers() -> None:
    with torch.device("meta"):
        mini = build(VitMini.model_validate({"name": "vit-mini"}), 10, 3, 32)
        large = build(VitB16.model_validate({"name": "vit-b16"}), 1000, 3, 224)
    assert sum(parameter.numel() for parameter in mini.parameters()) == 42_684_682  # facts/oialr.md 3.3
    assert sum(parameter.numel() for parameter in large.parameters()) == 86_567_656  # timm's vit_base_patch16_224


def test_names_are_timms() -> None:
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    layers = ["patch_embed.proj", *(f"blocks.{number}.{layer}" for number in (0, 1) for layer in block), "norm", "head"]
    expected = {"cls_token", "pos_embed", *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))}
    assert set(small().state_dict()) == expected
    assert set(small(qkv_bias=False).state_dict()) == expected - {f"blocks.{number}.attn.qkv.bias" for number in (0, 1)}


def test_a_block_is_torchs_encoder_layer() -> None:
    torch.manual_seed(0)
    block = small().blocks[0]
    layer = nn.TransformerEncoderLayer(
        8, 2, 32, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    names = {
        "attn.qkv.": "self_attn.in_proj_", "attn.proj.": "self_attn.out_proj.", "mlp.fc1": "linear1",
        "mlp.fc2": "linear2",
    }  # fmt: skip
    state = {}
    for name, tensor in block.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = torch.randn_like(tensor)
        tensor.copy_(state[name])
    layer.load_state_dict(state)
    tokens = torch.randn(3, 5, 8)
    torch.testing.assert_close(block(tokens), layer(tokens))


def test_patches_are_read_in_rows_behind_the_class_token() -> None:
    model = small(depth=0)
    images = torch.randn(2, 3, 8, 8)
    patches = model.patch_embed(images)
    assert patches.shape == (2, 4, 8)
    torch.testing.assert_close(patches[:, 1:2], model.patch_embed(images[:, :, :4, 4:]))
    with torch.no_grad():
        model.cls_token += 1
    expected = model.head(model.norm(model.cls_token + model.pos_embed[:, :1]))[:, 0]
    torch.testing.assert_close(model(images), expected.expand(2, -1))


def test_gradient_checkpointing_changes_memory_and_nothing_else() -> None:
    torch.manual_seed(0)
    model, images = small(), torch.randn(2, 3, 8, 8)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        model.gradient_checkpointing_enable()
    assert len(gradients[0]) == len(list(model.parameters()))
    assert all(torch.equal(plain, saved) for plain, saved in zip(*gradients, strict=True))


def test_dropout_drops_in_training_only() -> None:
    torch.manual_seed(0)
    model, images = small(dropout=0.5), torch.randn(2, 3, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_a_patch_that_does_not_divide_the_picture() -> None:
    with pytest.raises(RecipeError, match=r"model\.patch 8 does not divide the picture's 28 pixels") as caught:
        build(VitMini.model_validate({"name": "vit-mini"}), 10, 1, 28)
    assert caught.value.hint == "take one of 1, 2, 4, 7, 14, 28"
