"""convert of whole checkpoints: names change, bytes do not; what only one form holds is made anew or named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import Tensors, metadata, read, train
from safetensors.torch import save_file
from true_scale import LDM, TARGETS, sparse

from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.errors import CheckpointError, OrthoError, TargetError, UsageError
from ortho_cli.surgery.add_hra import add_hra
from ortho_cli.surgery.convert import convert, plan_convert
from ortho_cli.surgery.diff import diff
from ortho_cli.surgery.merge import merge

COUNTERS = {"model_ema.decay", "model_ema.num_updates"}
SCHEDULE = {name for name in LDM if "." not in name}


def miniature() -> Tensors:
    """All 1,145 tensors of an SD1.5 file, no side longer than 12."""
    torch.manual_seed(0)
    found = {}
    for name, (dtype, shape) in LDM.items():
        small = tuple(min(size, 12) for size in shape)
        found[name] = torch.randn(small).half() if dtype == "F32" and shape else torch.ones(shape)
        if dtype.startswith("I"):
            found[name] = torch.arange(math.prod(shape), dtype=getattr(torch, f"int{dtype[1:]}")).reshape(shape)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "v1-5-mini.safetensors"
    save_file(miniature(), path)
    return path


def equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


class TestHraRepo:
    """An adapter and its base as one file for the authors' strict loader."""

    @pytest.fixture
    def adapter(self, base: Path, tmp_path: Path) -> Path:
        add_hra(base, tmp_path / "hra", rank=4)
        return train(tmp_path / "hra")

    def test_there_and_back(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        report = convert(adapter, tmp_path / "repo.safetensors", "hra-repo", base=str(base))
        assert (report.layers, report.command) == (144, "convert")
        found = read(tmp_path / "repo.safetensors")
        assert len(found) == 1308
        assert {name.removesuffix(".hra_u") for name in found if name.endswith(".hra_u")} == TARGETS.keys()
        convert(tmp_path / "repo.safetensors", tmp_path / "base.safetensors", "base")
        wanted = {name: tensor for name, tensor in miniature().items() if name not in COUNTERS}
        equal(read(tmp_path / "base.safetensors"), wanted)
        added = json.loads(metadata(tmp_path / "repo.safetensors")["ortho.method"])["added"]
        assert len(added) == 21 and "logvar" in added
        for folder, options in (("again", {"base": str(base)}), ("without-a-base", {})):
            convert(tmp_path / "repo.safetensors", tmp_path / folder, "peft-hra", **options)
            equal(read(tmp_path / folder), read(adapter))
            assert "added" not in metadata(tmp_path / folder / "adapter_model.safetensors")["ortho.method"]

    def test_folds_to_the_same_weights(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        convert(adapter, tmp_path / "repo.safetensors", "hra-repo", base=str(base))
        merge(tmp_path / "repo.safetensors", [], tmp_path / "one.safetensors")
        merge(base, [adapter], tmp_path / "two.safetensors")
        one, two = read(tmp_path / "one.safetensors"), read(tmp_path / "two.safetensors")
        assert two.keys() - one.keys() == COUNTERS
        assert all(torch.equal(one[name], two[name]) for name in one if name in two)

    @pytest.mark.parametrize("gram_schmidt", [False, True])
    def test_at_another_strength(self, base: Path, tmp_path: Path, gram_schmidt: bool) -> None:
        add_hra(base, tmp_path / "hra", rank=4, gram_schmidt=gram_schmidt)
        adapter = train(tmp_path / "hra")
        convert(adapter, tmp_path / "repo.safetensors", "hra-repo", base=str(base), strength=0.5)
        method = json.loads(metadata(tmp_path / "repo.safetensors")["ortho.method"])
        assert not method["apply_GS"] and "gram_schmidt" not in method
        merge(tmp_path / "repo.safetensors", [], tmp_path / "one.safetensors")
        merge(base, [(adapter, 0.5)], tmp_path / "two.safetensors")
        report = diff(tmp_path / "two.safetensors", tmp_path / "one.safetensors")
        changed = [entry for entry in report.details if entry["status"] == "changed"]
        assert all(entry["relative_difference"] < 1e-3 for entry in changed)  # a half-precision rounding at most
        assert diff(base, tmp_path / "one.safetensors").totals["max_relative_difference"] > 1e-2

    def test_layers_left_alone_get_pairs_that_cancel(self, base: Path, tmp_path: Path) -> None:
        add_hra(base, tmp_path / "hra", rank=4, targets=["attn1.to_q"])
        report = convert(train(tmp_path / "hra"), tmp_path / "repo.safetensors", "hra-repo", base=str(base))
        assert any("128 layers without an adapter got column pairs" in note for note in report.notes)
        merge(tmp_path / "repo.safetensors", [], tmp_path / "one.safetensors")
        merge(base, [tmp_path / "hra"], tmp_path / "two.safetensors")
        report = diff(tmp_path / "two.safetensors", tmp_path / "one.safetensors")
        changed = [entry for entry in report.details if entry["status"] == "changed"]
        assert all(entry["relative_difference"] < 1e-3 for entry in changed)  # a half-precision rounding at most

    def test_gram_schmidt_is_remembered(self, base: Path, tmp_path: Path) -> None:
        """PEFT's `apply_GS` adapters: columns that need orthonormalising whenever they act."""
        add_hra(base, tmp_path / "hra", rank=4)
        train(tmp_path / "hra", amount=3.0)
        config = json.loads((tmp_path / "hra" / "adapter_config.json").read_text())
        (tmp_path / "hra" / "adapter_config.json").write_text(json.dumps({**config, "apply_GS": True}))
        convert(tmp_path / "hra", tmp_path / "repo.safetensors", "hra-repo", base=str(base))
        assert json.loads(metadata(tmp_path / "repo.safetensors")["ortho.method"])["apply_GS"] is True
        merge(tmp_path / "repo.safetensors", [], tmp_path / "one.safetensors")
        merge(base, [tmp_path / "hra"], tmp_path / "two.safetensors")
        one, two = read(tmp_path / "one.safetensors"), read(tmp_path / "two.safetensors")
        assert all(torch.equal(one[name], two[name]) for name in one if name in two)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"targets": ["attn1.to_q", "ff.net.2"]}, r"no place for an adapter on .*ff\.net\.2"),
            ({"targets": ["attn1.to_q"], "odd": True}, "one even rank for all layers; found 3"),
            ({"targets": ["attn1.to_q"], "gs": True}, "a Gram-Schmidt adapter on 16 of the 144 layers"),
        ],
    )
    def test_refusals(self, base: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        add_hra(base, tmp_path / "hra", rank=4, targets=options["targets"])
        path = tmp_path / "hra" / "adapter_config.json"
        if "odd" in options:
            cut = {name: tensor[:, :3].contiguous() for name, tensor in read(tmp_path / "hra").items()}
            save_file(cut, tmp_path / "hra" / "adapter_model.safetensors")
            path.write_text(json.dumps({**json.loads(path.read_text()), "r": 3}))
        if "gs" in options:
            path.write_text(json.dumps({**json.loads(path.read_text()), "apply_GS": True}))
        with pytest.raises(TargetError, match=message):
            convert(tmp_path / "hra", tmp_path / "out.safetensors", "hra-repo", base=str(base))

    def test_whole_tensors_are_not_lost_on_the_way(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
        tensors = {**read(adapter), f"base_model.model.{layer}.base_layer.bias": torch.ones(12)}
        save_file(tensors, adapter / "adapter_model.safetensors")
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "bias": "hra_only"}))
        with pytest.raises(CheckpointError, match="1 whole tensors"):
            convert(adapter, tmp_path / "out.safetensors", "hra-repo", base=str(base))


class TestSafetensors:
    def test_from_a_pickle(self, tmp_path: Path) -> None:
        torch.manual_seed(1)
        whole = torch.randn(8, 6)
        tensors = {
            "a.weight": whole, "a.turned": whole.T, "a.part": whole[2:5, 1:4], "b.half": torch.randn(3).bfloat16(),
            "b.count": torch.tensor(5), "b.flags": torch.tensor([True, False]), "b.empty": torch.zeros(0, 3),
        }  # fmt: skip
        torch.save({"epoch": 3, "state_dict": tensors}, tmp_path / "model.ckpt")
        report = convert(tmp_path / "model.ckpt", tmp_path / "out.safetensors", "safetensors")
        equal(read(tmp_path / "out.safetensors"), tensors)
        assert report.totals["tensors"] == len(tensors)
        assert metadata(tmp_path / "out.safetensors")["format"] == "pt"

    def test_never_the_other_way(self, base: Path, tmp_path: Path) -> None:
        for suffix in ("ckpt", "bin", "pt"):
            with pytest.raises(UsageError, match=f"does not write .{suffix} files"):
                convert(base, tmp_path / f"out.{suffix}", "safetensors")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse(tmp_path_factory.mktemp("full") / "v1-5.safetensors")


class TestDiffusers:
    def test_the_plan_of_the_published_file(self, full: Path, tmp_path: Path) -> None:
        plan = plan_convert(
            full, tmp_path / "stable-diffusion-v1.5", "diffusers"
        )  # a dot in a folder's name is no suffix
        counts = {file.relative: len(file.pieces) for file in plan.files}
        assert counts == {
            "unet/diffusion_pytorch_model.safetensors": 686,
            "vae/diffusion_pytorch_model.safetensors": 248,
            "text_encoder/model.safetensors": 196,
        }
        assert plan.totals["dropped"] == 15
        named = next(note for note in plan.notes if "15 tensors" in note)
        assert all(name in named for name in (*SCHEDULE, *COUNTERS, "position_ids"))
        assert any("tokenizer is missing" in note and "--base" in note for note in plan.notes)
        index = json.loads(plan.texts["model_index.json"])
        assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
        assert index["tokenizer"] == [None, None]
        assert {
            "unet/config.json",
            "vae/config.json",
            "text_encoder/config.json",
            "scheduler/scheduler_config.json",
        } < set(plan.texts)

    def test_tokenizer_and_scheduler_come_from_a_folder(self, full: Path, tmp_path: Path) -> None:
        for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"):
            (tmp_path / "theirs" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "theirs" / name).write_text("{}")
        classes = {"scheduler": ["diffusers", "DDIMScheduler"], "tokenizer": ["transformers", "CLIPTokenizerFast"]}
        (tmp_path / "theirs" / "model_index.json").write_text(json.dumps(classes))
        plan = plan_convert(full, tmp_path / "out", "diffusers", base=str(tmp_path / "theirs"))
        assert {relative for _, relative in plan.copies} == {
            "tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json",
        }  # fmt: skip
        assert json.loads(plan.texts["model_index.json"]).items() >= classes.items()
        assert not any("tokenizer is missing" in note for note in plan.notes)
        assert {path for path, _ in plan.copies} < set(plan.inputs)  # never overwritten

    def test_an_inpainting_model_has_nine_channels(self, tmp_path: Path) -> None:
        wide = {**LDM, "model.diffusion_model.input_blocks.0.0.weight": ("F32", (320, 9, 3, 3))}
        plan = plan_convert(sparse(tmp_path / "inpaint.safetensors", wide), tmp_path / "out", "diffusers")
        assert json.loads(plan.texts["unet/config.json"])["in_channels"] == 9
        assert json.loads(plan.texts["vae/config.json"])["in_channels"] == 3

    def test_a_part_says_what_it_lacks(self, tmp_path: Path) -> None:
        unet = {name: entry for name, entry in LDM.items() if name.startswith("model.")}
        plan = plan_convert(sparse(tmp_path / "unet.safetensors", unet), tmp_path / "out", "diffusers")
        assert any("holds no vae and no text_encoder" in note for note in plan.notes)
        assert json.loads(plan.texts["model_index.json"])["vae"] == [None, None]

    @pytest.mark.parametrize(
        ("to", "output", "error", "message"),
        [
            ("diffusers", "out", TargetError, r"is not of Stable Diffusion 1\.5's size: .* 768 expected"),
            ("diffusers", "out.safetensors", UsageError, "a diffusers checkpoint is a folder"),
            ("diffusers", "out.ckpt", UsageError, "does not write .ckpt"),
            ("ldm", "out", UsageError, "an LDM checkpoint is one file"),
        ],
    )
    def test_refusals(
        self, base: Path, tmp_path: Path, to: str, output: str, error: type[OrthoError], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            convert(base, tmp_path / output, to)
        assert list(tmp_path.iterdir()) == []

    def test_a_checkpoint_with_hra_is_refused(self, base: Path, tmp_path: Path) -> None:
        add_hra(base, tmp_path / "hra.safetensors")
        with pytest.raises(TargetError, match="holds a Householder adapter, which diffusers has no place for"):
            convert(tmp_path / "hra.safetensors", tmp_path / "out", "diffusers")

    @pytest.mark.parametrize("to", ["diffusers", "ldm"])
    def test_other_models_are_refused(self, tmp_path: Path, to: str) -> None:
        save_file({"encoder.layer.0.weight": torch.ones(2, 2)}, tmp_path / "bert.safetensors")
        with pytest.raises(TargetError, match=r"bert\.safetensors is plain, not"):
            convert(tmp_path / "bert.safetensors", tmp_path / ("out.safetensors" if to == "ldm" else "out"), to)


@pytest.mark.parametrize("to", ["ldm", "base", "safetensors"])
def test_a_base_that_would_not_be_read_is_refused(base: Path, tmp_path: Path, to: str) -> None:
    with pytest.raises(UsageError, match=f"--to {to} needs nothing but the checkpoint itself"):
        convert(base, tmp_path / "out.safetensors", to, base=base)


def test_an_ldm_file_stays_one(base: Path, tmp_path: Path) -> None:
    convert(base, tmp_path / "out.safetensors", "ldm")
    equal(read(tmp_path / "out.safetensors"), miniature())
    assert open_checkpoint(tmp_path / "out.safetensors").layout == "sd15-ldm"
