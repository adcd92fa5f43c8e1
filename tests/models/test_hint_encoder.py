"""The hint encoder: the published names and shapes, equal to diffusers' own, zero at first, loaded whole or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.checkpoints.writer import write_file
from ortho_cli.errors import CheckpointError
from ortho_cli.models.hint_encoder import CONTROL, HintEncoder, hint_added, load_hint_encoder
from ortho_cli.surgery.ldm_buffers import control_tensors


def awake(channels: int) -> HintEncoder:
    """One whose last convolution is not zero."""
    torch.manual_seed(0)
    encoder = HintEncoder(channels)
    nn.init.normal_(encoder.input_hint_block[-1].weight, std=0.1)  # type: ignore[arg-type]
    return encoder


def test_it_is_diffusers_conditioning_embedding() -> None:
    from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding

    ours, theirs = awake(320), ControlNetConditioningEmbedding(320)
    names = ["conv_in", *(f"blocks.{place}" for place in range(6)), "conv_out"]
    state = {
        f"{name}.{kind}": getattr(ours.input_hint_block[2 * place], kind)
        for place, name in enumerate(names)
        for kind in ("weight", "bias")
    }
    theirs.load_state_dict(state)
    hint = torch.rand(2, 3, 64, 48)
    assert torch.allclose(ours(hint), theirs(hint), atol=1e-6)
    assert ours(hint).abs().max() > 0.01


def test_features_are_added_while_it_lasts_and_to_both_halves_of_guidance() -> None:
    conv, latents = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 8, 8)
    features = awake(6)(torch.rand(2, 3, 64, 64))
    plain = conv(latents)
    with hint_added(conv, features):
        assert torch.equal(conv(latents), plain + features)
        doubled = conv(torch.cat([latents, latents]))
        with pytest.raises(ValueError, match="do not go onto"):
            conv(latents[:1])
    assert torch.allclose(doubled, torch.cat([plain + features] * 2), atol=1e-6)
    assert torch.equal(conv(latents), plain)


def test_gradients_reach_the_encoder_and_features_follow_the_dtype() -> None:
    conv = nn.Conv2d(4, 6, 1).requires_grad_(False).bfloat16()
    encoder = awake(6)
    with hint_added(conv, encoder(torch.rand(1, 3, 32, 32))):
        found = conv(torch.randn(1, 4, 4, 4, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    found.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())


def test_a_file_of_the_authors_form_is_loaded_and_its_unused_part_named(tmp_path: Path) -> None:
    write_file(tmp_path / "hra.safetensors", control_tensors(3), {})
    checkpoint = open_checkpoint(str(tmp_path / "hra.safetensors"))
    encoder = awake(320)
    notes = load_hint_encoder(encoder, checkpoint)
    assert notes == [
        "goes on with the base's own hint encoder",
        "4 tensors control_model.time_embed.* are left out: nothing reads them",
    ]
    assert not encoder(torch.rand(1, 3, 16, 16)).any()  # zero again, as the file has it
    names = {f"{CONTROL}.{name}": tuple(value.shape) for name, value in encoder.state_dict().items()}
    stored = {name: info.shape for name, info in checkpoint.tensors.items() if "input_hint_block" in name}
    assert names == stored


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    def stored(name: str, tensors: dict[str, torch.Tensor]) -> object:
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return open_checkpoint(str(tmp_path / f"{name}.safetensors"))

    encoder, state = HintEncoder(32), {f"{CONTROL}.{k}": v for k, v in awake(32).state_dict().items()}
    assert load_hint_encoder(encoder, stored("none", {"unet.conv_in.bias": torch.ones(2)})) == []  # type: ignore[arg-type]
    part = dict(list(state.items())[2:])
    cases = {
        "part": (part, r"lacks or differs in 2 of 16 tensors, first 'control_model.input_hint_block.0.weight'"),
        "wide": ({f"{CONTROL}.{k}": v for k, v in awake(64).state_dict().items()}, "in 2 of 16"),
        "net": ({**state, f"{CONTROL}.input_blocks.0.0.weight": torch.ones(1)}, "all of a ControlNet that is used"),
    }
    for name, (tensors, message) in cases.items():
        with pytest.raises(CheckpointError, match=message):
            load_hint_encoder(encoder, stored(name, tensors))  # type: ignore[arg-type]
    load_hint_encoder(encoder, stored("whole", state))  # type: ignore[arg-type]
    assert all(torch.equal(encoder.state_dict()[k.removeprefix(f"{CONTROL}.")], v) for k, v in state.items())
