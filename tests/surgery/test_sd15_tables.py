"""What is made from tables and formulas, against diffusers and transformers: configurations, schedule, encoder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import read
from safetensors.torch import save_file
from true_scale import LDM, sparse

from ortho_cli.checkpoints.layouts import LDM_ONLY
from ortho_cli.checkpoints.writer import Piece, write_file
from ortho_cli.surgery.convert import convert, plan_convert
from ortho_cli.surgery.ldm_buffers import control_tensors, ldm_only_pieces

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own imports warn about packages they look for
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")

DATA = Path(__file__).parent.parent / "data"


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in json.loads((DATA / name).read_text()).items()}


class TestConfigurations:
    """Each `config.json` we write makes a model of exactly SD1.5's tensors (built without memory)."""

    @pytest.fixture(scope="class")
    @classmethod
    def configs(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("configs")
        plan = plan_convert(sparse(folder / "v1-5.safetensors"), folder / "out", "diffusers")
        return {path: json.loads(text) for path, text in plan.texts.items()}

    @pytest.mark.parametrize(
        ("component", "kind", "table"),
        [
            ("unet", "UNet2DConditionModel", "sd15_unet_diffusers_shapes.json"),
            ("vae", "AutoencoderKL", "sd15_vae_diffusers_shapes.json"),
        ],
    )
    def test_diffusers(self, configs: dict[str, Any], component: str, kind: str, table: str) -> None:
        config = configs[f"{component}/config.json"]
        assert config["_class_name"] == kind
        with torch.device("meta"):
            model = getattr(diffusers, kind).from_config(config)
        assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes(table)

    def test_clip(self, configs: dict[str, Any]) -> None:
        config = configs["text_encoder/config.json"]
        with torch.device("meta"):
            model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
        found = {name.removeprefix("text_model."): tuple(x.shape) for name, x in model.state_dict().items()}
        assert found == shapes("sd15_clip_hf_shapes.json")
        assert (model.config.hidden_act, model.config.num_attention_heads) == ("quick_gelu", 12)

    def test_the_scheduler(self, configs: dict[str, Any]) -> None:
        config = configs["scheduler/scheduler_config.json"]
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        assert scheduler.config.steps_offset == 1
        assert scheduler.betas[0].item() == pytest.approx(0.00085)
        assert scheduler.betas[-1].item() == pytest.approx(0.012)

    def test_the_index_names_classes_that_exist(self, configs: dict[str, Any]) -> None:
        libraries = {"diffusers": diffusers, "transformers": transformers}
        index = configs["model_index.json"]
        assert index["_class_name"] == "StableDiffusionPipeline"
        for component in ("unet", "vae", "text_encoder", "scheduler"):
            library, name = index[component]
            assert hasattr(libraries[library], name)


class TestSchedule:
    """The buffers of the diffusion process, which LDM files store and diffusers computes."""

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
        path = tmp_path_factory.mktemp("made") / "made.safetensors"
        write_file(path, ldm_only_pieces(LDM_ONLY), {})
        return read(path)

    def test_names_types_and_shapes_are_the_published_ones(self, made: dict[str, torch.Tensor]) -> None:
        types = {"F32": torch.float32, "I32": torch.int32, "I64": torch.int64}
        assert len(made) == 15
        for name, tensor in made.items():
            dtype, shape = LDM[name]
            assert (tensor.dtype, tuple(tensor.shape)) == (types[dtype], shape), name

    def test_agrees_with_diffusers(self, made: dict[str, torch.Tensor]) -> None:
        scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        assert torch.allclose(made["betas"], scheduler.betas, rtol=1e-5, atol=0)
        assert torch.allclose(made["alphas_cumprod"], scheduler.alphas_cumprod, rtol=1e-4, atol=0)
        scheduler.set_timesteps(1000)
        for step in (1, 10, 500, 999):
            variance = scheduler._get_variance(step, variance_type="fixed_small")
            assert made["posterior_variance"][step].item() == pytest.approx(float(variance), rel=1e-3)

    def test_every_buffer_follows_from_the_betas(self, made: dict[str, torch.Tensor]) -> None:
        """The same quantities, one step after the other, in Python's floats."""
        first, last = 0.00085**0.5, 0.012**0.5
        product, before = 1.0, 1.0
        for step in range(1000):
            beta = (first + (last - first) * step / 999) ** 2
            before, product = product, product * (1 - beta)
            variance = beta * (1 - before) / (1 - product)
            wanted = {
                "betas": beta, "alphas_cumprod": product, "alphas_cumprod_prev": before,
                "sqrt_alphas_cumprod": product**0.5, "sqrt_one_minus_alphas_cumprod": (1 - product) ** 0.5,
                "sqrt_recip_alphas_cumprod": (1 / product) ** 0.5,
                "sqrt_recipm1_alphas_cumprod": (1 / product - 1) ** 0.5,
                "posterior_variance": variance, "posterior_mean_coef1": beta * before**0.5 / (1 - product),
                "posterior_mean_coef2": (1 - before) * (1 - beta) ** 0.5 / (1 - product),
            }  # fmt: skip
            for name, value in wanted.items():
                assert made[name][step].item() == pytest.approx(value, rel=1e-6, abs=1e-12), (name, step)
        logs = {"log_one_minus_alphas_cumprod": (1 - made["alphas_cumprod"].double()).log()}
        logs["posterior_log_variance_clipped"] = made["posterior_variance"].double().clamp(min=1e-20).log()
        for name, value in logs.items():
            assert torch.allclose(made[name].double(), value, rtol=1e-4), name
        assert made["posterior_log_variance_clipped"][0].item() == pytest.approx(-46.0517, rel=1e-6)

    def test_counters_and_positions(self, made: dict[str, torch.Tensor]) -> None:
        assert made["model_ema.decay"].item() == pytest.approx(0.9999)
        assert made["model_ema.num_updates"].item() == 0
        positions = made["cond_stage_model.transformer.text_model.embeddings.position_ids"]
        assert torch.equal(positions, torch.arange(77)[None])

    def test_position_ids_of_a_folder_are_kept(self, tmp_path: Path) -> None:
        layer = "text_model.encoder.layers.0.self_attn"
        tensors = {f"{layer}.{part}_proj.weight": torch.ones(4, 4) for part in "qkv"}
        tensors |= {"text_model.embeddings.token_embedding.weight": torch.ones(9, 4)}
        tensors |= {"text_model.embeddings.position_ids": torch.arange(7)[None] * 2}
        save_file(tensors, tmp_path / "clip.safetensors")
        convert(tmp_path / "clip.safetensors", tmp_path / "ldm.safetensors", "ldm")
        found = read(tmp_path / "ldm.safetensors")
        name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        assert torch.equal(found[name], torch.arange(7)[None] * 2)


class TestControlEncoder:
    """The fresh hint encoder that the authors' loader wants in the file."""

    def values(self, piece: Piece) -> torch.Tensor:
        assert piece.produce is not None
        raw = b"".join(bytes(buffer) for buffer in piece.produce())
        return torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(piece.shape)

    def test_starts_silent_and_within_torchs_bounds(self) -> None:
        made = {piece.name: self.values(piece) for piece in control_tensors(seed=0)}
        assert len(made) == 21
        assert not made["logvar"].any()
        for kind in ("weight", "bias"):
            assert not made[f"control_model.input_hint_block.14.{kind}"].any()
        reference = torch.nn.Conv2d(3, 16, 3)
        assert made["control_model.input_hint_block.0.weight"].shape == reference.weight.shape
        bound = 27**-0.5
        for kind in ("weight", "bias"):
            values = made[f"control_model.input_hint_block.0.{kind}"]
            assert 0.7 * bound < values.abs().max().item() <= bound
        assert 0.99 * 320**-0.5 < made["control_model.time_embed.0.weight"].abs().max().item() <= 320**-0.5

    def test_depends_on_the_seed_alone(self) -> None:
        first, again, other = ({p.name: self.values(p) for p in control_tensors(seed)} for seed in (0, 0, 1))
        assert all(torch.equal(first[name], again[name]) for name in first)
        changed = {name for name in first if not torch.equal(first[name], other[name])}
        assert len(changed) == 18  # all but logvar and the silent last convolution
