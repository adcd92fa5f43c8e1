"""convert --to base: what comes back is what add-hra read, name by name and byte by byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import read
from safetensors.torch import save_file
from test_convert_checkpoint import COUNTERS, equal, miniature

from ortho_cli.errors import CheckpointError
from ortho_cli.surgery.add_hra import add_hra
from ortho_cli.surgery.convert import convert


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "v1-5-mini.safetensors"
    save_file(miniature(), path)
    return path


class TestTakingOut:
    @pytest.mark.parametrize("options", [{}, {"gram_schmidt": True, "rank": 4}, {"targets": ["sd15-attention"]}])
    def test_gives_back_what_add_hra_read(self, base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
        layers = add_hra(base, tmp_path / "hra.safetensors", **options).layers
        report = convert(tmp_path / "hra.safetensors", tmp_path / "out.safetensors", "base")
        equal(read(tmp_path / "out.safetensors"), miniature())
        assert report.layers == layers

    def test_from_the_authors_form_too(self, base: Path, tmp_path: Path) -> None:
        add_hra(base, tmp_path / "hra.safetensors", layout="hra-repo")
        assert len(read(tmp_path / "hra.safetensors")) == 1308
        report = convert(tmp_path / "hra.safetensors", tmp_path / "out.safetensors", "base")
        wanted = {name: tensor for name, tensor in miniature().items() if name not in COUNTERS}
        equal(read(tmp_path / "out.safetensors"), wanted)
        assert any("21 tensors of the authors' trainer" in note for note in report.notes)

    def test_only_what_was_added_is_dropped(self, tmp_path: Path) -> None:
        """The base's own `logvar` and hint encoder parts come back; buffers that were made for it do not."""
        logvar = torch.arange(1000.0)
        own = {name: tensor for name, tensor in miniature().items() if name not in COUNTERS and name != "betas"}
        save_file({**own, "logvar": logvar}, tmp_path / "base.safetensors")
        add_hra(tmp_path / "base.safetensors", tmp_path / "hra.safetensors", layout="hra-repo")
        for step in ("hra", "copy"):
            convert(tmp_path / f"{step}.safetensors", tmp_path / f"{step}-base.safetensors", "base")
            equal(read(tmp_path / f"{step}-base.safetensors"), {**own, "logvar": logvar})
            if step == "hra":  # a copy still says how its reflections act and what was added
                convert(tmp_path / "hra.safetensors", tmp_path / "copy.safetensors", "safetensors")
        add_hra(tmp_path / "base.safetensors", tmp_path / "plain.safetensors")
        convert(tmp_path / "plain.safetensors", tmp_path / "again.safetensors", "base")
        equal(read(tmp_path / "again.safetensors"), {**own, "logvar": logvar})

    def test_the_authors_own_files_lose_the_whole_set_or_nothing(self, base: Path, tmp_path: Path) -> None:
        add_hra(base, tmp_path / "hra.safetensors", layout="hra-repo")
        theirs = read(tmp_path / "hra.safetensors")
        save_file(theirs, tmp_path / "theirs.safetensors")
        convert(tmp_path / "theirs.safetensors", tmp_path / "out.safetensors", "base")
        wanted = {name: tensor for name, tensor in miniature().items() if name not in COUNTERS}
        equal(read(tmp_path / "out.safetensors"), wanted)
        save_file({**theirs, "logvar": torch.ones(7)}, tmp_path / "other.safetensors")
        convert(tmp_path / "other.safetensors", tmp_path / "kept.safetensors", "base")
        control = {name: tensor for name, tensor in theirs.items() if name.startswith("control_model.")}
        equal(read(tmp_path / "kept.safetensors"), {**wanted, **control, "logvar": torch.ones(7)})

    @pytest.mark.parametrize("added", [["conv.weight"], "logvar", [3]])
    def test_a_list_that_add_hra_never_writes_is_refused(self, tmp_path: Path, added: object) -> None:
        tensors = {"conv.weight": torch.ones(4, 4), "x.weight": torch.ones(4, 4), "x.hra_u": torch.ones(4, 2)}
        save_file(tensors, tmp_path / "a.safetensors", {"ortho.method": json.dumps({"name": "hra", "added": added})})
        with pytest.raises(CheckpointError, match="tensors that add-hra never adds"):
            convert(tmp_path / "a.safetensors", tmp_path / "out.safetensors", "base")

    def test_reflections_without_a_weight_are_refused(self, tmp_path: Path) -> None:
        tensors = {"x.weight": torch.ones(4, 4), "x.hra_u": torch.ones(4, 2), "y.hra_u": torch.ones(4, 2)}
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match=r"layer 'y' has vectors \(hra_u\) but no weight"):
            convert(tmp_path / "a.safetensors", tmp_path / "out.safetensors", "base")

    def test_a_strangers_fixed_linear_keeps_its_name(self, tmp_path: Path) -> None:
        kept = {"other.fixed_linear.weight": torch.ones(2, 2), "x.bias": torch.ones(4)}
        hra = {"x.fixed_linear.weight": torch.ones(4, 4), "x.hra_u": torch.ones(4, 2)}
        save_file({**kept, **hra}, tmp_path / "a.safetensors")
        convert(tmp_path / "a.safetensors", tmp_path / "out.safetensors", "base")
        equal(read(tmp_path / "out.safetensors"), {**kept, "x.weight": torch.ones(4, 4)})

    def test_of_nothing_is_refused(self, base: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="holds no Householder adapter to take out"):
            convert(base, tmp_path / "out.safetensors", "base")
