"""Stable Diffusion from every kind of base: the very weights, the names of layers, the counts of the papers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.errors import CheckpointError, TargetError, UsageError
from ortho_cli.methods.adapter_layer import adapter_layers
from ortho_cli.methods.inject import choose, named_layers
from ortho_cli.methods.load import hold_reflections
from ortho_cli.models.stable_diffusion import StableDiffusion, build, draw_latents, open_stable_diffusion
from ortho_cli.recipe.models_diffusion import StableDiffusion as Section
from ortho_cli.surgery.add_hra import add_hra
from ortho_cli.surgery.convert import convert

pytest.importorskip("diffusers", reason="the networks are diffusers' own")
from tiny_sd import save_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("sd") / "pipeline")


@pytest.fixture(scope="module")
def ldm(folder: Path) -> Path:
    convert(folder, folder.parent / "ldm.safetensors", "ldm")
    return folder.parent / "ldm.safetensors"


@pytest.fixture(scope="module")
def peer(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    return noisy, torch.tensor([3, 700]), torch.randint(2, 50, (2, 77), generator=generator)


def same_weights(model: StableDiffusion, peer: Any) -> None:
    for component in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(model, component).state_dict(), getattr(peer, component).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_diffusers_folder_is_what_diffusers_loads(folder: Path, peer: Any) -> None:
    model = open_stable_diffusion(str(folder))
    same_weights(model, peer)
    noisy, timesteps, tokens = inputs()
    text = peer.text_encoder(tokens).last_hidden_state
    with torch.no_grad():
        torch.testing.assert_close(model(noisy, timesteps, tokens), peer.unet(noisy, timesteps, text).sample)
        torch.testing.assert_close(model(noisy, timesteps, text), peer.unet(noisy, timesteps, text).sample)
    assert torch.equal(model.alphas_cumprod, peer.scheduler.alphas_cumprod)
    assert model.tokens(["a cat"]).tolist() == peer.tokenizer(["a cat"], padding="max_length").input_ids
    assert (model.latent_factor, model.prediction_type) == (8, "epsilon")
    trained = {name.partition(".")[0] for name, each in model.named_parameters() if each.requires_grad}
    assert trained == {"unet"}


def test_latents_go_there_and_back(folder: Path, peer: Any) -> None:
    model = open_stable_diffusion(str(folder))
    pictures, noise = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        found = peer.vae.encode(pictures).latent_dist
        moments = model.encode_pictures(pictures)
        expected = (found.mean + found.std * noise) * peer.vae.config.scaling_factor
        torch.testing.assert_close(draw_latents(moments, noise), expected)
        decoded = peer.vae.decode(expected / peer.vae.config.scaling_factor).sample.clamp(-1, 1)
        torch.testing.assert_close(model.decode_latents(expected), decoded)


def test_an_ldm_file_and_its_configuration(folder: Path, ldm: Path, peer: Any, tmp_path: Path) -> None:
    model = open_stable_diffusion(str(ldm), config=str(folder))
    same_weights(model, peer)
    assert model.tokens(["ab"]).tolist() == peer.tokenizer(["ab"], padding="max_length").input_ids
    pickle = tmp_path / "sd.ckpt"
    from safetensors.torch import load_file

    torch.save({"state_dict": load_file(ldm), "global_step": 1}, pickle)
    same_weights(open_stable_diffusion(str(pickle), config=str(folder)), peer)
    half = open_stable_diffusion(str(ldm), config=str(folder), dtype=torch.bfloat16)
    assert {each.dtype for each in half.parameters()} == {torch.bfloat16}
    noisy, timesteps, tokens = inputs()
    assert half(noisy, timesteps, tokens).dtype == torch.float32


def test_reflections_inside_the_base_are_those_that_train(folder: Path, ldm: Path, tmp_path: Path) -> None:
    inside = tmp_path / "hra.safetensors"
    add_hra(ldm, inside, rank=4, form="checkpoint")
    model = open_stable_diffusion(str(inside), config=str(folder))
    hold_reflections(model, open_checkpoint(inside))
    held = adapter_layers(model)
    assert len(held) == 144
    assert all(name.startswith("unet.") for name in held)
    plain = open_stable_diffusion(str(folder))
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs()), plain(*inputs()), rtol=1e-4, atol=1e-5)


def test_what_a_base_lacks(folder: Path, ldm: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="not of Stable Diffusion"):
        open_stable_diffusion(str(ldm))
    with pytest.raises(CheckpointError, match="has no vae and no text_encoder"):
        open_stable_diffusion(str(folder / "unet"), config=str(folder))
    part = shutil.copytree(folder, tmp_path / "part")
    shutil.rmtree(part / "tokenizer")
    with pytest.raises(UsageError, match="no tokenizer was found") as caught:
        open_stable_diffusion(str(part)).tokens(["a"])
    assert "hf download" in str(caught.value.hint)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_stable_diffusion("./nothing.safetensors")
    wrong = shutil.copytree(folder, tmp_path / "wrong")
    text = (wrong / "unet" / "config.json").read_text().replace("16,\n    32,\n    64,", "32,\n    32,\n    64,")
    (wrong / "unet" / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="the unet does not fit its configuration: 0 tensors missing"):
        open_stable_diffusion(str(wrong))


def test_the_tiny_one_is_whole_and_seeded() -> None:
    config = Section.model_validate({"name": "stable-diffusion", "size": "tiny"})
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build(config).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    model = build(config)
    assert model.tokens(["a cat, 3"]).shape == (1, 77)
    assert model(torch.randn(1, 4, 8, 8), torch.tensor([5]), model.tokens(["cat"])).shape == (1, 4, 8, 8)
    assert model.encode_pictures(torch.zeros(1, 3, 16, 16)).shape == (1, 2, 4, 8, 8)


def test_the_full_size_has_the_papers_layers_and_no_memory() -> None:
    with torch.device("meta"):
        model = build(Section.model_validate({"name": "stable-diffusion", "base": "org/not-here"}))
    counts = {name: sum(each.numel() for each in part.parameters()) for name, part in model.named_children()}
    assert counts == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert {each.device.type for each in model.parameters()} == {"meta"}
    assert (len(choose(model, "auto")), len(choose(model, "sd15-attention"))) == (144, 128)
    assert named_layers(model).layout == "sd15-diffusers"
    assert model.notes == ["org/not-here is not here; counted as Stable Diffusion 1.5"]
