"""An index is believed only where its shards say the same, and never leads out of its folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from index_attacks import FIRST, INDEX, SECOND, SIZE, Case, all_attacks, sharded, write_index
from refusals import assert_refused, assert_refused_by_verbs

from ortho_cli.checkpoints.index import index_names, links_out, read_index
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.errors import CheckpointError

ATTACKS = all_attacks()


def test_corpus_is_whole() -> None:
    assert len(ATTACKS) == len({name for name, _, _ in ATTACKS}) == 67


@pytest.mark.parametrize("case", ATTACKS, ids=lambda case: case[0])
def test_attack_is_one_error(case: Case, tmp_path: Path) -> None:
    _, build, pattern = case
    index = tmp_path / "attack" / INDEX
    sharded(index.parent)
    assert build(index.parent) == index
    assert_refused(index, pattern)
    assert_refused(index.parent, pattern)
    (tmp_path / "work").mkdir()
    assert_refused_by_verbs(index.parent, tmp_path / "work", pattern)


@pytest.mark.parametrize("total", [SIZE, float(SIZE), None])
def test_a_sound_index_opens(total: object, tmp_path: Path) -> None:
    index = sharded(tmp_path / "model")
    write_index(index.parent, {"a.weight": FIRST, "b.weight": SECOND}, total)
    for source in (index, index.parent):
        opened = open_checkpoint(source)
        assert list(opened.tensors) == ["a.weight", "b.weight"]
        assert [file.relative for file in opened.files] == [FIRST, SECOND]
        assert opened.kind == "folder"
        assert opened.metadata == {"format": "pt", "second": "yes"}


@pytest.mark.parametrize("metadata", ["{}", "null", "[]", '{"total_parameters": 12}'])
def test_an_index_may_leave_its_size_out(metadata: str, tmp_path: Path) -> None:
    index = sharded(tmp_path / "model")
    names = json.dumps({"a.weight": FIRST, "b.weight": SECOND})
    index.write_text(f'{{"metadata": {metadata}, "weight_map": {names}}}')
    assert read_index(index) == ({"a.weight": FIRST, "b.weight": SECOND}, None)
    index.write_text(f'{{"weight_map": {names}}}')
    assert len(open_checkpoint(index).tensors) == 2


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    index = sharded(tmp_path / "model")
    (index.parent / SECOND).rename(index.parent / "renamed.safetensors")
    os.symlink("renamed.safetensors", index.parent / SECOND)
    assert len(open_checkpoint(index).tensors) == 2
    os.symlink(index.parent, tmp_path / "alias")
    assert len(open_checkpoint(tmp_path / "alias").tensors) == 2


def as_hub_cache(folder: Path, models: Path) -> Path:
    """The folder as the hub's client keeps it: blobs by hash, a snapshot of links; returns the snapshot."""
    snapshot = models / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (models / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, models / "blobs" / f"{number:064x}")
        os.symlink(f"../../blobs/{number:064x}", snapshot / file.name)
    return snapshot


def test_hub_links_into_blobs_are_followed(tmp_path: Path) -> None:
    index = sharded(tmp_path / "model")
    snapshot = as_hub_cache(index.parent, tmp_path / "hub" / "models--org--name")
    assert len(open_checkpoint(snapshot).tensors) == 2
    assert len(open_checkpoint(snapshot / INDEX).tensors) == 2
    assert not links_out(snapshot / FIRST, snapshot)


def test_hub_links_out_of_the_model_are_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path / "model")
    snapshot = as_hub_cache(index.parent, tmp_path / "hub" / "models--org--name")
    as_hub_cache(index.parent, tmp_path / "hub" / "models--org--other")
    (snapshot / SECOND).unlink()
    os.symlink("../../../models--org--other/blobs/" + "1".zfill(64), snapshot / SECOND)
    with pytest.raises(CheckpointError, match="link out of the folder"):
        open_checkpoint(snapshot)


def test_pickle_shards_count_tied_tensors_once_or_twice(tmp_path: Path) -> None:
    shared = torch.ones(4, 4)
    torch.save({"a.weight": shared, "b.weight": shared}, tmp_path / "pytorch_model-00001-of-00001.bin")
    for total in (64, 128):
        write_index(
            tmp_path, dict.fromkeys(("a.weight", "b.weight"), "pytorch_model-00001-of-00001.bin"), total,
            "pytorch_model.bin.index.json",
        )  # fmt: skip
        assert len(open_checkpoint(tmp_path).tensors) == 2
    write_index(
        tmp_path, dict.fromkeys(("a.weight", "b.weight"), "pytorch_model-00001-of-00001.bin"), 96,
        "pytorch_model.bin.index.json",
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="total_size 96"):
        open_checkpoint(tmp_path)


def test_a_pickle_index_lists_no_safetensors(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model").parent
    index = write_index(folder, {"a.weight": FIRST, "b.weight": SECOND}, name="pytorch_model.bin.index.json")
    with pytest.raises(CheckpointError, match="not of the kind"):
        open_checkpoint(index)


def test_names_are_those_of_the_libraries() -> None:
    assert index_names("model", None) == (INDEX, "pytorch_model.bin.index.json")
    assert index_names("model", "fp16") == (
        "model.safetensors.index.fp16.json", "pytorch_model.bin.index.fp16.json",
    )  # fmt: skip
    assert index_names("diffusion_pytorch_model", None)[1] == "diffusion_pytorch_model.bin.index.json"
