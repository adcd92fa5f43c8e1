"""Every form of a checkpoint that people and libraries keep opens; what is none, or several, is said."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from index_attacks import sharded

from ortho_cli.checkpoints.reading import TensorReader
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.errors import CheckpointError

Save = Callable[..., Path]
ONE = {"w.weight": torch.arange(4.0).reshape(2, 2)}
TWO = {"w.weight": torch.zeros(3, 2)}


def shape(path: Path | str, name: str = "w.weight", **options: str) -> tuple[int, ...]:
    return open_checkpoint(path, **options).tensors[name].shape


def refused(path: Path | str, pattern: str, **options: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=pattern) as caught:
        open_checkpoint(path, **options)
    return caught.value


def test_a_file(tmp_path: Path, save: Save) -> None:
    opened = open_checkpoint(save(tmp_path / "x.safetensors", ONE, format="pt", more="text"))
    assert (opened.kind, opened.format, opened.config) == ("file", "safetensors", {})
    assert opened.metadata == {"format": "pt", "more": "text"}
    with TensorReader() as reader:
        assert torch.equal(reader.read(opened.tensors["w.weight"]), ONE["w.weight"])
    assert opened.layers() == {"w": (2, 2)}
    assert opened.weight("w").name == "w.weight"


def test_a_home_folder_is_expanded(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "x.safetensors", ONE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert shape("~/x.safetensors") == (2, 2)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth"])
def test_a_pickle(suffix: str, tmp_path: Path) -> None:
    torch.save({"state_dict": ONE, "epoch": 1}, tmp_path / f"x{suffix}")
    opened = open_checkpoint(tmp_path / f"x{suffix}")
    assert (opened.kind, opened.format) == ("file", "pickle")
    assert shape(tmp_path / f"x{suffix}") == (2, 2)
    assert any("epoch" in note for note in opened.notes)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
        "adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors", "any-name.safetensors",
        "v1-5-pruned.ckpt",
    ],
)  # fmt: skip
def test_a_folder_with_one_set_of_weights(name: str, tmp_path: Path, save: Save) -> None:
    if name.endswith(".safetensors"):
        save(tmp_path / name, ONE)
    else:
        torch.save(ONE, tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    opened = open_checkpoint(tmp_path)
    assert (opened.kind, opened.files[0].relative, opened.config) == ("folder", name, {"model_type": "bert"})
    assert shape(tmp_path) == (2, 2)


def test_safetensors_win_over_pickles_and_known_names_over_others(tmp_path: Path, save: Save) -> None:
    torch.save(TWO, tmp_path / "pytorch_model.bin")
    torch.save(TWO, tmp_path / "optimizer.pt")
    save(tmp_path / "other.safetensors", TWO)
    save(tmp_path / "model.safetensors", ONE)
    assert shape(tmp_path) == (2, 2)


def test_sharded_folders_of_pickles(tmp_path: Path) -> None:
    torch.save(ONE, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b.weight": torch.ones(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    names = {"w.weight": "pytorch_model-00001-of-00002.bin", "b.weight": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    opened = open_checkpoint(tmp_path)
    assert opened.format == "pickle"
    assert list(opened.tensors) == ["w.weight", "b.weight"]


def test_variants(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "model.fp16.safetensors", TWO)
    assert shape(tmp_path) == shape(tmp_path, variant="fp16") == (3, 2)  # the only one there is
    save(tmp_path / "model.safetensors", ONE)
    assert shape(tmp_path) == (2, 2)
    assert shape(tmp_path, variant="fp16") == (3, 2)
    assert "name one" in str(refused(tmp_path, "no variant bf16: model.fp16", variant="bf16").hint)
    (tmp_path / "model.safetensors").unlink()
    save(tmp_path / "model.bf16.safetensors", ONE)
    refused(tmp_path, "holds 2 weight files, and no index: model.bf16.safetensors, model.fp16.safetensors")
    assert shape(tmp_path, variant="bf16") == (2, 2)


def test_variants_of_pickles_and_shards(tmp_path: Path, save: Save) -> None:
    torch.save(TWO, tmp_path / "diffusion_pytorch_model.fp16.bin")
    torch.save(TWO, tmp_path / "training_args.bin")
    assert shape(tmp_path) == (3, 2)
    folder = tmp_path / "sharded"
    save(folder / "model.fp16-00001-of-00001.safetensors", ONE)
    names = {"w.weight": "model.fp16-00001-of-00001.safetensors"}
    (folder / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": names}))
    assert shape(folder) == shape(folder, variant="fp16") == (2, 2)


def pipeline(root: Path, save: Save) -> Path:
    save(root / "unet" / "diffusion_pytorch_model.safetensors", {"conv_in.weight": torch.ones(2, 3)})
    save(root / "vae" / "diffusion_pytorch_model.fp16.safetensors", {"quant_conv.weight": torch.ones(1, 1)})
    sharded(root / "text_encoder")
    (root / "outside.safetensors").unlink()
    for folder in ("scheduler", "tokenizer", ".cache"):
        (root / folder).mkdir()
        (root / folder / "config.json").write_text("{}")
    (root / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    return root


@pytest.mark.parametrize("listed", [True, False])
def test_a_pipeline_with_and_without_its_index(listed: bool, tmp_path: Path, save: Save) -> None:
    root = pipeline(tmp_path / "sd", save)
    if listed:
        parts = {name: ["diffusers", "X"] for name in ("unet", "vae", "text_encoder", "scheduler", "tokenizer")}
        index = {"_class_name": "StableDiffusionPipeline", **parts, "safety_checker": [None, None]}
        (root / "model_index.json").write_text(json.dumps(index))
    opened = open_checkpoint(root)
    assert (opened.kind, opened.notes) == ("pipeline", ())
    assert opened.config.get("_class_name") == ("StableDiffusionPipeline" if listed else None)
    assert list(opened.tensors) == [
        "text_encoder.a.weight", "text_encoder.b.weight", "unet.conv_in.weight", "vae.quant_conv.weight"
    ]  # fmt: skip
    assert {file.relative: file.component for file in opened.files} == {
        "text_encoder/model-00001-of-00002.safetensors": "text_encoder",
        "text_encoder/model-00002-of-00002.safetensors": "text_encoder",
        "unet/diffusion_pytorch_model.safetensors": "unet",
        "vae/diffusion_pytorch_model.fp16.safetensors": "vae",
    }
    with TensorReader() as reader:
        assert reader.read(opened.tensors["unet.conv_in.weight"]).sum() == 6


def test_a_pipeline_beside_a_file_is_ambiguous(tmp_path: Path, save: Save) -> None:
    root = pipeline(tmp_path / "sd", save)
    save(root / "v1-5.safetensors", ONE)
    refused(root, "holds v1-5.safetensors and a pipeline in unet/, vae/, text_encoder/")
    (root / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    assert open_checkpoint(root).kind == "pipeline"


def test_a_pipeline_is_what_its_index_lists(tmp_path: Path, save: Save) -> None:
    root = pipeline(tmp_path / "sd", save)
    for name in ("a", "b"):  # two files and no index: ambiguous, were it a component
        save(root / "loras" / f"{name}.safetensors", ONE)
    refused(root, "holds 2 weight files, and no index: a.safetensors")
    (root / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"], "vae": [null, null]}')
    opened = open_checkpoint(root)
    assert list(opened.tensors) == ["unet.conv_in.weight"]
    assert "loras/ is not in model_index.json: its weights were left out" in opened.notes
    assert len(opened.notes) == 3


def test_an_adapter_folder(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "adapter_model.safetensors", ONE)
    save(tmp_path / "model.safetensors", TWO)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "config.json").write_text("{}")
    opened = open_checkpoint(tmp_path)
    assert (opened.kind, opened.config, shape(tmp_path)) == ("adapter", {"peft_type": "LORA"}, (2, 2))


def test_adapters_of_several_components(tmp_path: Path, save: Save) -> None:
    for component in ("unet", "text_encoder"):
        save(tmp_path / component / "adapter_model.safetensors", ONE)
        (tmp_path / component / "adapter_config.json").write_text('{"peft_type": "HRA"}')
    opened = open_checkpoint(tmp_path)
    assert (opened.kind, list(opened.tensors)) == ("adapter", ["text_encoder.w.weight", "unet.w.weight"])


def test_what_is_no_checkpoint(tmp_path: Path, save: Save) -> None:
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "cannot tell what notes.txt is: its name ends in none of .safetensors .ckpt")
    assert "model_index.json" in str(refused(tmp_path, "folder holds no weights").hint)
    refused(tmp_path / "none.safetensors", "no such file or folder")
    refused(tmp_path / "none", "no such file or folder")
    refused("./no\x1b[2J/file.safetensors", r"no such file or folder: ./no\\u001b")
    refused("~nobody-here/x.safetensors", "no such file or folder")
    refused("x" * 5000 + ".safetensors", "File name too long|no such file")
    refused("a\0b.safetensors", "no such file")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", "not a file")
    (tmp_path / "empty" / "unet").mkdir(parents=True)
    refused(tmp_path / "empty", "no component with weights")
    save(tmp_path / "a.safetensors", ONE)
    (tmp_path / "config.json").write_text('["no object"]')
    refused(tmp_path, "config.json is not a JSON object")
    (tmp_path / "config.json").write_text('{"x": ')
    refused(tmp_path, "config.json cannot be read")
    (tmp_path / "config.json").write_text('{"x": 1, "y": {"rank": 1, "rank": 2}}')
    refused(tmp_path, "^key 'rank' appears twice in config.json$")
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity], "x": 1000000000000000019884624838656}')
    assert open_checkpoint(tmp_path).config["time_step_limit"][1] == float("inf")  # so libraries write it
    (tmp_path / "config.json").write_text(" " * 10_000_001)
    refused(tmp_path, "config.json is over 10,000,000 bytes")
    (tmp_path / "config.json").unlink()
    assert shape(tmp_path) == (2, 2)


def test_a_folder_that_may_not_be_read(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "x.safetensors", ONE)

    def forbid(path: Path) -> None:  # as root, no folder refuses
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", forbid)
    assert refused(tmp_path, "cannot be read: Permission denied").where == str(tmp_path)
