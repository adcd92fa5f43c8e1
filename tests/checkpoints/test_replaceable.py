"""`--force` replaces checkpoints, and never a folder in which something else would be deleted with one."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import pytest

from ortho_cli.checkpoints.output import check_output
from ortho_cli.errors import OutputError


def fill(folder: Path, names: Collection[str]) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).mkdir() if name.endswith("/") else (folder / name).touch()
    return folder


def refused(folder: Path) -> OutputError:
    before = sorted(folder.rglob("*"))
    with pytest.raises(OutputError) as caught:
        check_output(folder, [], 0, force=True)
    assert caught.value.exit_code == 6
    assert sorted(folder.rglob("*")) == before
    return caught.value


@pytest.mark.parametrize(
    "names",
    [
        ["holiday.jpg"], ["main.py"], ["unet"], ["README.md"], ["vocab.txt"], [".git/config"],
        ["x.safetensors"], ["a.safetensors", "b.safetensors"], ["thesis.docx", "x.safetensors"], ["unet/x.safetensors"],
        ["bert/config.json", "gpt/model.safetensors"], ["my model.safetensors"],
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_checkpoint(names: list[str], tmp_path: Path) -> None:
    error = refused(fill(tmp_path / "folder", names))
    assert "is no checkpoint, so --force does not replace it" in error.message
    assert error.hint == "name another with -o"


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["model.safetensors", "thesis.docx", "photos/a.jpg"], "photos/"),
        (["model.safetensors", "thesis.docx"], "thesis.docx"),
        (["config.json", "main.py"], "main.py"),
        (["model.safetensors", "my-lora.safetensors"], "my-lora.safetensors"),
        (["model_index.json", "unet/config.json", "unet/notes.txt"], "unet/notes.txt"),
        (["model.safetensors", "unet/backup/"], "unet/backup/"),
        (["adapter_config.json", ".git/config"], ".git/"),
        (["config.json", "bert/config.json"], "bert/"),
    ],
    ids=str,
)
def test_checkpoints_with_something_beside(names: list[str], first: str, tmp_path: Path) -> None:
    error = refused(fill(tmp_path / "folder", names))
    assert f"also holds '{first}', which is no part of a checkpoint" in error.message
    assert error.hint == "name another with -o, or remove the folder yourself"


@pytest.mark.parametrize(
    "names",
    [
        [], ["unet/"], ["config.json"], ["model_index.json"], ["adapter_config.json"], ["pytorch_model.bin"],
        ["unet/diffusion_pytorch_model.fp16.safetensors"],
        ["adapter_model.safetensors", "hra.safetensors", "README.md"],
        ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "generation_config.json", "LICENSE"],
        ["diffusion_pytorch_model.safetensors.index.fp16.json"], ["pytorch_lora_weights.safetensors"],
        ["text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt", "model_index.json",
         "scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json"],
    ],
    ids=str,
)  # fmt: skip
def test_checkpoints_and_empty_folders_are_replaced(names: list[str], tmp_path: Path) -> None:
    check_output(fill(tmp_path / "folder", names), [], 0, force=True)


def test_components_are_those_the_pipeline_lists(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", ["qformer/config.json", "vae/config.json"])
    assert "qformer/" in refused(folder).message
    (folder / "model_index.json").write_text('{"qformer": ')
    assert "qformer/" in refused(folder).message
    (folder / "model_index.json").write_text(json.dumps({"qformer": ["x", "Y"]}))
    check_output(folder, [], 0, force=True)


def test_a_link_is_no_component(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", ["config.json"])
    (folder / "unet").symlink_to(fill(tmp_path / "elsewhere", ["model.safetensors"]))
    assert "'unet/'" in refused(folder).message
