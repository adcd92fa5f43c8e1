"""Adapters of Stable Diffusion between ortho, diffusers and PEFT: the same pictures there, and training goes on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sd import paint, save_pipeline
from training_runs import lines_of, write

from ortho_cli.methods.adapter_layer import adapter_layers
from ortho_cli.recipe.train import load_train
from ortho_cli.surgery.add_hra import add_hra
from ortho_cli.surgery.convert import convert
from ortho_cli.training.evaluate import restore_for_judging
from ortho_cli.training.run import train
from ortho_cli.training.session import open_session
from ortho_cli.training.state import last_checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own imports warn about packages they look for
    peft = pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks for it
SAME = 1e-3  # of what a pipeline draws
BOTH = "[sd15-control, 'text_encoder.**.self_attn.{q,k,v,out}_proj']"
ALL = "[peft, kohya-lora, diffusers-lora, merged-ldm, merged-diffusers]"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(scope="module")
def base(work: Path) -> Path:
    return save_pipeline(work / "sd")


@pytest.fixture(scope="module")
def ldm(work: Path, base: Path) -> Path:
    convert(base, work / "sd-ldm.safetensors", "ldm")
    return work / "sd-ldm.safetensors"


def recipe(work: Path, name: str, base: Path, methods: str, **sections: str) -> Path:
    """Two steps of text-to-image that are large enough to be seen."""
    config = f", config: {work / 'sd'}" if base.suffix else ""
    given = {
        "task": "{name: text_to_image}",
        "model": f"{{name: stable-diffusion, base: {base}{config}}}",
        "data": "{name: skimage-captions, size: 64, batch: 2, held_out: 0.0}",
        "methods": methods,
        "optimizer": "{name: adamw, lr: 0.05, weight_decay: 0.0}",
        "schedule": "{name: constant}",
        "train": "{steps: 2, threads: 1, eval_every: 1000}",
        "run": "{dir: FOLDER, log_every: 1}",
    }
    return write(work, name, **{**given, **sections})


def pipeline(folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(folder)


def of_run(path: Path) -> torch.Tensor:
    """What a run's own model draws."""
    made = load_train(path)
    session = open_session(made, judging=True)
    state = last_checkpoint(Path(made.run.dir))
    assert state is not None
    restore_for_judging(session, state)
    with session.for_judging():
        return paint(session.model.pipeline())


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


@pytest.fixture(scope="module")
def run(work: Path, ldm: Path) -> Path:
    methods = f"[{{name: hra, rank: 2, targets: {BOTH}}}]"
    path = recipe(work, "run", ldm, methods, run=f"{{dir: FOLDER, log_every: 1, export: {ALL}}}")
    outcome = train(load_train(path))
    names = ["hra", "peft-adapter", "kohya-lora.safetensors", "diffusers-lora", "merged-ldm.safetensors"]
    assert [Path(each).name for each in outcome.exports] == [*names, "merged-diffusers"]
    return path


@pytest.fixture(scope="module")
def painting(run: Path, base: Path) -> torch.Tensor:
    drawn = of_run(run)
    assert bool(torch.isfinite(drawn).all())
    assert apart(drawn, paint(pipeline(base))) > 100 * SAME, "the adapter hardly shows"
    return drawn


@pytest.fixture(scope="module")
def exports(work: Path, run: Path) -> Path:
    return work / "run" / "export"


class TestExports:
    def test_peft_draws_the_same(self, base: Path, exports: Path, painting: torch.Tensor) -> None:
        loaded = pipeline(base)
        loaded.unet = peft.PeftModel.from_pretrained(loaded.unet, exports / "peft-adapter" / "unet")
        folder = exports / "peft-adapter" / "text_encoder"
        loaded.text_encoder = peft.PeftModel.from_pretrained(loaded.text_encoder, folder)
        assert apart(paint(loaded), painting) < SAME

    @pytest.mark.parametrize("name", ["kohya-lora.safetensors", "diffusers-lora"])
    def test_loras_draw_the_same(self, base: Path, exports: Path, painting: torch.Tensor, name: str) -> None:
        loaded = pipeline(base)
        loaded.load_lora_weights(str(exports / name))
        assert apart(paint(loaded), painting) < SAME

    def test_merged_weights_draw_the_same(self, base: Path, exports: Path, painting: torch.Tensor) -> None:
        assert apart(paint(pipeline(exports / "merged-diffusers")), painting) < SAME
        loaded = diffusers.StableDiffusionPipeline.from_single_file(
            str(exports / "merged-ldm.safetensors"), config=str(base), local_files_only=True
        )
        assert apart(paint(loaded), painting) < SAME


def test_reflections_that_the_base_holds_are_replaced_by_the_trained_ones(work: Path, base: Path, ldm: Path) -> None:
    add_hra(ldm, work / "inside.safetensors", rank=2)
    path = recipe(
        work, "inside", work / "inside.safetensors", "[{name: hra}]",
        run="{dir: FOLDER, export: [merged-ldm, merged-diffusers, kohya-lora]}",
    )  # fmt: skip
    train(load_train(path))
    drawn, exports = of_run(path), work / "inside" / "export"
    assert apart(drawn, paint(pipeline(base))) > 100 * SAME
    assert apart(paint(pipeline(exports / "merged-diffusers")), drawn) < SAME
    loaded = pipeline(base)
    loaded.load_lora_weights(str(exports / "kohya-lora.safetensors"))
    assert apart(paint(loaded), drawn) < SAME
    assert sorted(path.name for path in exports.iterdir()) == [
        "hra", "kohya-lora.safetensors", "merged-diffusers", "merged-ldm.safetensors",
    ]  # fmt: skip


class TestGoingOn:
    """An adapter that PEFT or diffusers trained goes on here, and the other way round."""

    def test_peft_to_ortho(self, work: Path, base: Path) -> None:
        theirs = pipeline(base)
        config = peft.HRAConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        theirs.unet = peft.get_peft_model(theirs.unet, config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in theirs.unet.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        theirs.unet.save_pretrained(work / "theirs")
        path = recipe(work, "from-peft", base, f"[{{name: hra, adapter: {work / 'theirs'}}}]")
        session = open_session(load_train(path))
        session.model.eval()
        assert apart(paint(session.model.pipeline()), paint(theirs)) < SAME
        train(load_train(path))
        assert apart(of_run(path), paint(theirs)) > 10 * SAME  # and moves on from there

    def test_diffusers_to_ortho(self, work: Path, base: Path) -> None:
        theirs = pipeline(base)
        theirs.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_out.0"]))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in theirs.unet.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        layers = peft.utils.get_peft_model_state_dict(theirs.unet)
        theirs.save_lora_weights(work / "their-lora", unet_lora_layers=layers)
        path = recipe(work, "from-diffusers", base, f"[{{name: lora, adapter: {work / 'their-lora'}}}]")
        session = open_session(load_train(path))
        session.model.eval()
        assert apart(paint(session.model.pipeline()), paint(theirs)) < SAME
        losses = train(load_train(path))
        assert losses.step == 2
        assert len(lines_of(work / "from-diffusers", "train/loss")) == 2

    def test_ortho_to_peft(self, work: Path, base: Path) -> None:
        """PEFT finds the same gradients in what a run left as the run itself would."""
        path = recipe(
            work, "to-peft", base, "[{name: hra, rank: 2, targets: [sd15-control]}]",
            run="{dir: FOLDER, export: [peft]}",
        )  # fmt: skip
        train(load_train(path))
        made = load_train(path)
        session = open_session(made, judging=True)
        state = last_checkpoint(Path(made.run.dir))
        assert state is not None
        restore_for_judging(session, state)
        session.model.eval()
        theirs = pipeline(base)
        folder = work / "to-peft" / "export" / "peft-adapter"
        theirs.unet = peft.PeftModel.from_pretrained(theirs.unet, folder, is_trainable=True)
        noisy, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
        session.model(noisy, torch.tensor([500]), text).square().mean().backward()
        theirs.unet(noisy, torch.tensor([500]), encoder_hidden_states=text).sample.square().mean().backward()
        found = dict(theirs.unet.named_parameters())
        layers = adapter_layers(session.model)
        assert len(layers) == 144
        for name, layer in layers.items():
            expected = found[f"base_model.model.{name.removeprefix('unet.')}.hra_u.default"].grad
            assert expected is not None
            assert torch.allclose(layer.vectors.grad, expected, atol=1e-5 * float(expected.abs().max()) + 1e-8), name
