"""add-hra: how many layers and numbers, which names and shapes, the same start wherever the weights come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import metadata, read, relative_error, write_sharded
from true_scale import LDM, TARGETS, sparse, with_ema

from ortho_cli.checkpoints.adapters import read_adapter
from ortho_cli.checkpoints.layouts import component_name, to_canonical
from ortho_cli.checkpoints.store import Checkpoint, open_checkpoint
from ortho_cli.surgery.add_hra import add_hra, plan_add_hra
from ortho_cli.surgery.plan import Plan
from ortho_cli.surgery.small_sd15 import small_sd15

SCHEDULE = {name for name in LDM if "." not in name}


def pieces(plan: Plan) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What the one file of a plan will hold: name -> dtype and shape."""
    (file,) = plan.files
    return {piece.name: (piece.dtype, piece.shape) for piece in file.pieces}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(sparse(tmp_path_factory.mktemp("full") / "v1-5.safetensors"))


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(sparse(tmp_path_factory.mktemp("ema") / "v1-5-pruned.safetensors", with_ema()))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "v1-5-small.safetensors"
    small_sd15(path)
    return path


def inside(renamed: dict[str, tuple[str, tuple[int, ...]]], rank: int = 8) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A checkpoint's tensors once the authors' tool has been through: F16 weights, F32 vectors."""
    found = {}
    for name, (dtype, shape) in renamed.items():
        layer, _, kind = name.rpartition(".")
        target = f"{layer}.fixed_linear.{kind}" if layer in TARGETS else name
        found[target] = ("F16" if dtype == "F32" else dtype, shape)
    vectors = {f"{layer}.hra_u": ("F32", (width, rank)) for layer, ((width, _), _) in TARGETS.items()}
    return {**found, **vectors}


class TestTrueScale:
    """Stable Diffusion 1.5 as published: plans only, since a plan knows every name and shape."""

    @pytest.mark.parametrize(
        ("targets", "layers", "parameters"),
        [(None, 144, 895_488), (["sd15-control"], 144, 895_488), (["sd15-attention"], 128, 795_648)],
    )
    def test_the_papers_counts(
        self, full: Checkpoint, tmp_path: Path, targets: list[str] | None, layers: int, parameters: int
    ) -> None:
        plan = plan_add_hra(full, tmp_path / "adapter", targets=targets)
        assert (plan.layers, plan.parameters) == (layers, parameters)
        assert sum(detail["parameters"] for detail in plan.details) == parameters
        assert sum(piece.nbytes for file in plan.files for piece in file.pieces) == 4 * parameters

    def test_a_checkpoint_gets_the_authors_names(self, full: Checkpoint, tmp_path: Path) -> None:
        plan = plan_add_hra(full, tmp_path / "out.safetensors")
        assert pieces(plan) == inside(LDM)
        assert len(pieces(plan)) == 1145 + 144  # facts/ecosystem.md, appendix C

    def test_hra_repo_is_exactly_what_the_strict_loader_wants(self, full: Checkpoint, tmp_path: Path) -> None:
        plan = plan_add_hra(full, tmp_path / "out.safetensors", layout="hra-repo")
        found = pieces(plan)
        counts = {
            prefix: sum(name.startswith(prefix) for name in found)
            for prefix in ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "control_model.")
        }
        assert list(counts.values()) == [830, 248, 197, 20]
        assert len(found) == 1308 == 830 + 248 + 197 + 20 + len(SCHEDULE) + 1
        control = {name: found.pop(name) for name in list(found) if name.startswith("control_model.")}
        assert found.pop("logvar") == ("F32", (1000,))
        assert found == inside({name: entry for name, entry in LDM.items() if not name.startswith("model_ema.")})
        assert sum(torch.Size(shape).numel() for _, shape in control.values()) == 1_086_480 + 2_050_560
        assert control["control_model.input_hint_block.10.weight"] == ("F32", (96, 96, 3, 3))
        assert control["control_model.input_hint_block.14.weight"] == ("F32", (320, 256, 3, 3))

    def test_hra_repo_makes_up_what_a_pruned_file_lost_and_drops_what_is_not_theirs(self, tmp_path: Path) -> None:
        lean = {name: entry for name, entry in LDM.items() if name not in SCHEDULE and "position_ids" not in name}
        stray = {**lean, "embedding_manager.weight": ("F32", (3, 3))}
        checkpoint = open_checkpoint(sparse(tmp_path / "pruned.safetensors", stray))
        plan = plan_add_hra(checkpoint, tmp_path / "out.safetensors", layout="hra-repo")
        assert len(pieces(plan)) == 1308
        assert any("embedding_manager.weight" in note for note in plan.notes)

    def test_plans_stay_small(self, full: Checkpoint, tmp_path: Path) -> None:
        plan = plan_add_hra(full, tmp_path / "out.safetensors")
        assert plan.bytes_out == pytest.approx(2_132_651_196 + 4 * 895_488, rel=1e-4)
        assert plan.peak_bytes < 400e6


class TestAverages:
    """The EMA copy of a full training checkpoint."""

    def names(self, averaged: Checkpoint, folder: Path, **options: Any) -> tuple[Plan, int]:
        plan = plan_add_hra(averaged, folder / "out.safetensors", **options)
        return plan, sum(name.startswith("model_ema.") for name in pieces(plan))

    @pytest.mark.parametrize(("options", "left"), [({}, 688), ({"ema": "keep"}, 688), ({"ema": "drop"}, 0)])
    def test_keep_and_drop(self, averaged: Checkpoint, tmp_path: Path, options: dict[str, Any], left: int) -> None:
        plan, found = self.names(averaged, tmp_path, **options)
        assert found == left
        assert any("688 model_ema" in note for note in plan.notes)
        own = {name: entry for name, entry in inside(LDM).items() if not name.startswith("model_ema.")}
        assert pieces(plan).items() >= own.items()

    @pytest.mark.parametrize("layout", ["keep", "hra-repo"])
    def test_use_puts_the_averages_in_the_models_place(self, averaged: Checkpoint, tmp_path: Path, layout: str) -> None:
        plan, found = self.names(averaged, tmp_path, ema="use", layout=layout)
        assert found == 0
        assert any("686 tensors were taken from the EMA copy" in note for note in plan.notes)
        sources = {piece.name: piece.source.name for piece in plan.files[0].pieces if piece.source is not None}
        assert (
            sources["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.fixed_linear.weight"]
            == "model_ema.diffusion_modelinput_blocks11transformer_blocks0attn1to_qweight"
        )
        assert sources["model.diffusion_model.out.2.bias"] == "model_ema.diffusion_modelout2bias"
        assert sources["first_stage_model.quant_conv.weight"] == "first_stage_model.quant_conv.weight"

    def test_hra_repo_drops_them_unasked(self, averaged: Checkpoint, tmp_path: Path) -> None:
        plan, found = self.names(averaged, tmp_path, layout="hra-repo")
        assert (found, len(pieces(plan))) == (0, 1308)


def canonical_folder(small: Path, folder: Path, *, shards: int = 1) -> Path:
    """The same weights as a diffusers folder, the UNet in several shards."""
    layout = open_checkpoint(small).layout
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read(small).items():
        component, _, local = to_canonical(name, layout).partition(".")
        parts.setdefault(component, {})[local] = (
            tensor.flatten(1) if component == "vae" and tensor.dim() > 1 else tensor
        )
    for component, tensors in parts.items():
        stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        write_sharded(folder / component, tensors, shards if component == "unet" else 1, stem)
    (folder / "model_index.json").write_text("{}")
    return folder


class TestSameStart:
    """Vectors depend on the seed and the canonical name, not on where the weights were found."""

    @pytest.mark.parametrize("shards", [1, 3])
    def test_from_every_naming(self, small: Path, tmp_path: Path, shards: int) -> None:
        folder = canonical_folder(small, tmp_path / "diffusers", shards=shards)
        targets = ["sd15-control", "**.self_attn.q_proj"]
        add_hra(small, tmp_path / "from-ldm", targets=targets)
        add_hra(folder, tmp_path / "from-folder", targets=targets)
        for component, count in (("unet", 144), ("text_encoder", 2)):
            ours, theirs = (read(tmp_path / source / component) for source in ("from-ldm", "from-folder"))
            assert len(ours) == count
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
            marks = [
                metadata(tmp_path / source / component / "adapter_model.safetensors")["ortho.base_fingerprint"]
                for source in ("from-ldm", "from-folder")
            ]
            assert marks[0] == marks[1]

    def test_the_unet_alone_gets_the_same_adapter(self, small: Path, tmp_path: Path) -> None:
        folder = canonical_folder(small, tmp_path / "diffusers")
        add_hra(small, tmp_path / "from-ldm")
        add_hra(folder / "unet", tmp_path / "from-unet")
        ours, theirs = read(tmp_path / "from-ldm"), read(tmp_path / "from-unet")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_a_checkpoint_holds_the_adapters_vectors(self, small: Path, tmp_path: Path) -> None:
        add_hra(small, tmp_path / "adapter")
        add_hra(small, tmp_path / "checkpoint.safetensors")
        beside, within, base = read(tmp_path / "adapter"), read(tmp_path / "checkpoint.safetensors"), read(small)
        for name, vectors in within.items():
            if name.endswith(".hra_u"):
                local = component_name(to_canonical(name, "sd15-ldm"))[1]
                assert torch.equal(vectors, beside[f"base_model.model.{local}"])
            else:
                assert torch.equal(vectors, base[name.replace(".fixed_linear.", ".")])
        assert len(within) == len(base) + 144

    def test_another_seed_gives_another_adapter(self, small: Path, tmp_path: Path) -> None:
        for seed in (0, 1):
            add_hra(small, tmp_path / f"seed-{seed}", seed=seed)
        first, second = read(tmp_path / "seed-0"), read(tmp_path / "seed-1")
        assert all(not torch.equal(first[name], second[name]) for name in first)
        assert len({vectors.sum().item() for vectors in first.values()}) == 144


def drift(path: Path, base: Path) -> float:
    """How far the adapter's operators are from the identity, in float64, at worst."""
    adapter, opened = read_adapter(path), open_checkpoint(base)
    shapes = {to_canonical(name, opened.layout): shape for name, shape in opened.layers().items()}
    worst = 0.0
    for layer in adapter.layers:
        name = layer if layer in shapes else f"unet.{layer}"
        weight = torch.randn(shapes[name], dtype=torch.float64, generator=torch.Generator().manual_seed(0)).flatten(1)
        worst = max(worst, relative_error(adapter.operator(layer, "float64").apply(weight), weight))
    return worst


class TestStart:
    @pytest.mark.parametrize("output", ["adapter", "checkpoint.safetensors"])
    @pytest.mark.parametrize("gram_schmidt", [False, True])
    def test_is_the_identity(self, small: Path, tmp_path: Path, output: str, gram_schmidt: bool) -> None:
        report = add_hra(small, tmp_path / output, rank=6, gram_schmidt=gram_schmidt)
        assert drift(tmp_path / output, small) < 1e-12
        stored = 12 if gram_schmidt else 6  # the frozen start and what trains
        assert {detail["rank"] for detail in report.details} == {stored}
        assert {tensor.shape[1] for name, tensor in read(tmp_path / output).items() if name.endswith("hra_u")} == {
            stored
        }

    def test_gram_schmidt_for_the_authors_code_is_a_bare_basis(self, full: Checkpoint, tmp_path: Path) -> None:
        plan = plan_add_hra(full, tmp_path / "out.safetensors", layout="hra-repo", gram_schmidt=True)
        assert plan.parameters == 895_488
        assert any("does not start at the identity" in note for note in plan.notes)
        assert json.loads(plan.files[0].metadata["ortho.method"])["apply_GS"] is True

    def test_gram_schmidt_is_a_plain_chain_to_peft(self, small: Path, tmp_path: Path) -> None:
        add_hra(small, tmp_path / "adapter", gram_schmidt=True)
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert (config["apply_GS"], config["r"]) == (False, 16)
        vectors = next(iter(read(tmp_path / "adapter").values())).double()
        first, second = vectors[:, :8], vectors[:, 8:]
        assert torch.allclose(first.T @ first, torch.eye(8, dtype=torch.float64), atol=1e-6)
        projector = first @ first.T
        assert torch.allclose(second @ second.T, projector, atol=1e-6)

    @pytest.mark.parametrize("output", ["adapter", "checkpoint.safetensors"])
    def test_a_rank_for_each_layer(self, small: Path, tmp_path: Path, output: str) -> None:
        report = add_hra(small, tmp_path / output, rank=[4, "**.attn2.**=8", "**.attn2.to_k=2"])
        wanted: Callable[[str], int] = lambda name: 4 if "attn2" not in name else 2 if "to_k" in name else 8  # noqa: E731
        padded = output == "adapter"
        for name, tensor in read(tmp_path / output).items():
            if name.endswith("hra_u"):
                assert tensor.shape[1] == (8 if padded else wanted(name))
        assert drift(tmp_path / output, small) < 1e-12
        assert any("padded to 8" in note for note in report.notes) == padded
        if padded:
            assert json.loads((tmp_path / output / "adapter_config.json").read_text())["r"] == 8
