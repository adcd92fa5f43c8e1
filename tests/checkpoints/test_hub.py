"""Hub ids resolve in the cache alone while offline; what the cache lacks is one error with a way out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ortho_cli.checkpoints.hub import HubId, choose_files, fetch, parse_hub_id
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.errors import CheckpointError

Save = Callable[..., Path]
ONE = {"w.weight": torch.arange(4.0).reshape(2, 2)}
SHA = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"


@pytest.fixture
def cached(hub_home: Path, tmp_path: Path, save: Save) -> Path:
    """`org/name` in the hub cache, made by hand: a branch, a commit, blobs and links."""
    model = hub_home / "models--org--name"
    blob = save(model / "blobs" / ("f" * 64), ONE)
    for place in ("model.safetensors", "unet/extra.safetensors"):
        target = model / "snapshots" / SHA / place
        target.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(os.path.relpath(blob, target.parent), target)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(SHA)
    (model / "refs" / "v1").write_text(SHA)
    return model


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{SHA}"])
@pytest.mark.parametrize("file", ["", ":model.safetensors", ":unet/extra.safetensors"])
def test_hub_ids_resolve_in_the_cache(revision: str, file: str, cached: Path) -> None:
    opened = open_checkpoint(f"org/name{revision}{file}")
    assert opened.kind == ("file" if file else "folder")
    assert opened.root.is_relative_to(cached)
    assert torch.equal(load_file(opened.files[0].path)["w.weight"], ONE["w.weight"])


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("org/none", "org/none is not in the hub cache"),
        ("org/name@v2", "org/name@v2 is not in the hub cache"),
        ("org/name@" + "0" * 40, "is not in the hub cache"),
        ("org/name:none.safetensors", "org/name:none.safetensors is not in the hub cache"),
        ("org/name:../../../x.safetensors", "cannot be fetched: Invalid filename"),
        ("org/na..me", "cannot be fetched: Cannot have -- or .. in repo_id"),
        ("org/örg", "cannot be fetched: Repo id"),
    ],
)
@pytest.mark.usefixtures("cached")
def test_hub_ids_that_the_cache_lacks(text: str, pattern: str) -> None:
    with pytest.raises(CheckpointError, match=pattern) as caught:
        open_checkpoint(text)
    assert caught.value.exit_code == 4
    assert "local path" in str(caught.value.hint)


def test_an_unreachable_hub_falls_back_to_the_cache(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    def unreachable(*_: object, **__: object) -> None:
        raise HfHubHTTPError.__bases__[0]("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    assert fetch(HubId("org/name")).is_relative_to(cached)
    shutil.rmtree(cached)
    with pytest.raises(CheckpointError, match="is not in the hub cache and the hub cannot be reached"):
        fetch(HubId("org/name"))


def test_hub_ids_are_told_from_paths() -> None:
    assert parse_hub_id("org/name@refs/pr/1:a/b.safetensors") == HubId("org/name", "refs/pr/1", "a/b.safetensors")
    for text in ("name", "a/b/c", "/a/b", "./a/b", "../a", "a/b.safetensors", "a/b.ckpt", "a/b:", "a b/c", "a/b@", ""):
        assert parse_hub_id(text) is None, text


def test_one_set_of_weights_is_fetched() -> None:
    names = ["unet/x.fp16.safetensors", "unet/x.safetensors", "unet/x.bin", "vae/x.fp16.safetensors", "v1.ckpt", "a.h5"]
    assert choose_files([*names, "model_index.json"]) == [
        "model_index.json", "unet/x.safetensors", "vae/x.fp16.safetensors"
    ]  # fmt: skip
    assert choose_files(["pytorch_model.bin", "README.md", "x.msgpack"]) == ["README.md", "pytorch_model.bin"]


def test_a_mistyped_local_name_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapters").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no nothere in the folder adapters"):
        open_checkpoint("adapters/nothere")
