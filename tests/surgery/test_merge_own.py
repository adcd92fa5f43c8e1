"""merge of a checkpoint that holds a Householder adapter itself: folded from the very files that were opened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_folders import metadata, read, relative_error, train, write_sharded
from safetensors.torch import save_file
from test_merge import LAYERS, check, hra, model, naive, vectors

from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.errors import UsageError
from ortho_cli.surgery.add_hra import add_hra
from ortho_cli.surgery.merge import merge, plan_merge
from ortho_cli.surgery.plan import run
from ortho_cli.surgery.small_sd15 import small_sd15


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file(model(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


class TestOwnAdapter:
    """A checkpoint that holds HRA and is merged without naming an adapter."""

    @pytest.mark.parametrize("gram_schmidt", [False, True])
    def test_an_untrained_one_gives_the_base_back(self, tmp_path: Path, gram_schmidt: bool) -> None:
        small_sd15(tmp_path / "base.safetensors")
        add_hra(tmp_path / "base.safetensors", tmp_path / "hra.safetensors", gram_schmidt=gram_schmidt)
        report = merge(tmp_path / "hra.safetensors", [], tmp_path / "out.safetensors")
        assert report.layers == 144
        found, base = read(tmp_path / "out.safetensors"), read(tmp_path / "base.safetensors")
        assert found.keys() == base.keys()
        assert all(relative_error(found[name], base[name]) < 1e-6 for name in base if base[name].any())

    @pytest.mark.parametrize("stored", ["fixed_linear.weight", "weight"])
    def test_a_trained_one_is_folded_and_its_names_restored(self, tmp_path: Path, stored: str) -> None:
        turn = vectors(4)
        renamed = {
            name.replace(".weight", f".{stored}") if name[:-7] in LAYERS else name: x for name, x in model().items()
        }
        if stored != "weight":
            renamed["net.q.fixed_linear.bias"] = renamed.pop("net.q.bias")
        save_file({**renamed, **turn}, tmp_path / "hra.safetensors")
        report = merge(tmp_path / "hra.safetensors", [], tmp_path / "out.safetensors")
        check(read(tmp_path / "out.safetensors"), naive(model(), turn), 1e-6)
        assert any("Gram-Schmidt" in note for note in report.notes)

    def test_the_adapter_beside_it_says_the_same(self, tmp_path: Path) -> None:
        small_sd15(tmp_path / "base.safetensors")
        add_hra(tmp_path / "base.safetensors", tmp_path / "beside", gram_schmidt=True)
        train(tmp_path / "beside")
        add_hra(tmp_path / "base.safetensors", tmp_path / "inside.safetensors", gram_schmidt=True)
        beside, inside = read(tmp_path / "beside"), read(tmp_path / "inside.safetensors")
        from ortho_cli.checkpoints.layouts import component_name, to_canonical

        for name in [name for name in inside if name.endswith(".hra_u")]:
            inside[name] = beside["base_model.model." + component_name(to_canonical(name, "sd15-ldm"))[1]]
        save_file(inside, tmp_path / "inside.safetensors", metadata(tmp_path / "inside.safetensors"))
        merge(tmp_path / "base.safetensors", [tmp_path / "beside"], tmp_path / "a.safetensors")
        merge(tmp_path / "inside.safetensors", [], tmp_path / "b.safetensors")
        first, second = read(tmp_path / "a.safetensors"), read(tmp_path / "b.safetensors")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_needs_to_be_folded_first(self, base: Path, tmp_path: Path) -> None:
        adapter, content = hra(tmp_path / "hra")
        save_file({**model(), **content}, tmp_path / "holds.safetensors")
        with pytest.raises(UsageError, match="holds an adapter of its own") as caught:
            merge(tmp_path / "holds.safetensors", [adapter], tmp_path / "out.safetensors")
        assert "ortho merge holds.safetensors -o FOLDED" in (caught.value.hint or "")
        with pytest.raises(UsageError, match=r"no adapter given, and base\.safetensors holds none"):
            merge(base, [], tmp_path / "out.safetensors")

    def test_of_an_index_file_or_a_variant_is_that_very_one(self, tmp_path: Path) -> None:
        """The folder they lie in opens as something else."""
        turn, other = vectors(4), vectors(4, seed=9)
        folder = write_sharded(tmp_path / "m", {**model(), **turn}, 2, stem="variant")
        save_file({**model(), **other}, folder / "model.safetensors")
        merge(folder / "variant.safetensors.index.json", [], tmp_path / "out")
        check(read(tmp_path / "out"), naive(model(), turn), 1e-6)
        (folder / "fp16").mkdir()
        save_file({**model(), **turn}, folder / "fp16" / "model.fp16.safetensors")
        save_file({**model(), **other}, folder / "fp16" / "model.safetensors")
        plan = plan_merge(open_checkpoint(folder / "fp16", variant="fp16"), [], tmp_path / "two.safetensors")
        run(plan)
        check(read(tmp_path / "two.safetensors"), naive(model(), turn), 1e-6)

    def test_names_like_its_own_elsewhere_stay(self, tmp_path: Path) -> None:
        stray = {"other.fixed_linear.weight": torch.ones(2, 2), "fixed_linear.bias": torch.ones(2)}
        save_file({**model(), **vectors(4), **stray}, tmp_path / "hra.safetensors")
        merge(tmp_path / "hra.safetensors", [], tmp_path / "out.safetensors")
        check(read(tmp_path / "out.safetensors"), {**naive(model(), vectors(4)), **stray}, 1e-6)
