"""unmerge: every byte of the base comes back by an undo file, or nothing is written; by inverses, to rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import Tensors, metadata, peft_folder, read, relative_error, write_sharded
from safetensors.torch import load_file, save_file

from ortho_cli.checkpoints.reading import BLOCK_BYTES
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.errors import CheckpointError, NumericsError, OrthoError, OutputError, TargetError, UsageError
from ortho_cli.surgery import undo as undo_module
from ortho_cli.surgery import undo_blocks
from ortho_cli.surgery.add_hra import add_hra
from ortho_cli.surgery.merge import merge
from ortho_cli.surgery.undo_restore import read_record
from ortho_cli.surgery.unmerge import expected_error, unmerge

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TALL = BLOCK_BYTES // (64 * 2) + 3  # more than one block in every dtype


def model(dtype: torch.dtype = torch.float32) -> Tensors:
    torch.manual_seed(0)
    return {
        "net.q.weight": (0.1 * torch.randn(24, 16)).to(dtype), "net.q.bias": torch.randn(24).to(dtype),
        "net.tall.weight": (0.1 * torch.randn(TALL, 64)).to(dtype), "net.norm.weight": torch.randn(16).to(dtype),
        "net.steps": torch.tensor([7]), "net.empty": torch.zeros(0, 3),
    }  # fmt: skip


def hra(folder: Path, seed: int = 1, **more: Any) -> Path:
    torch.manual_seed(seed)
    vectors = {f"net.{name}.hra_u": torch.randn(width, 4) for name, width in (("q", 16), ("tall", 64))}
    return peft_folder(folder, vectors | more, peft_type="HRA", r=4, target_modules=["q", "tall"])


def lora(folder: Path) -> Path:
    torch.manual_seed(3)
    factors = {"net.q.lora_A.weight": torch.randn(2, 16), "net.q.lora_B.weight": 0.1 * torch.randn(24, 2)}
    return peft_folder(folder, factors, peft_type="LORA", r=2, lora_alpha=4, target_modules=["q"])


def verbatim(path: Path, tensors: Tensors, **own: str) -> Path:
    """A file as no writer of today makes it: tensors in the given order, a spaced header, an odd data start."""
    header: dict[str, Any] = {"__metadata__": own}
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    offset, data = 0, []
    for name, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        span = [offset, offset + len(raw)]
        header[name] = {"shape": list(tensor.shape), "dtype": names[tensor.dtype], "data_offsets": span}
        offset += len(raw)
        data.append(raw)
    head = json.dumps(header, indent=1).encode() + b"   "
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(data))
    return path


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {"" if path.is_file() else file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def round_trip(base: Path, adapters: Any, folder: Path, merged: str, again: str, **options: Any) -> Any:
    """Merge, unmerge, and compare every byte of every file; gives the merge's report."""
    before = contents(base)
    report = merge(base, adapters, folder / merged, keep_undo=folder / "undo.safetensors", **options)
    unmerge(folder / merged, output=folder / again, undo=folder / "undo.safetensors")
    assert contents(folder / again) == before
    assert contents(base) == before
    return report


class TestUndoFile:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_byte_comes_back(self, tmp_path: Path, dtype: str) -> None:
        base = verbatim(tmp_path / "base.safetensors", dict(reversed(model(DTYPES[dtype]).items())), theirs="ü [b]")
        report = round_trip(
            base, [hra(tmp_path / "hra"), lora(tmp_path / "lora")], tmp_path, "m.safetensors", "b.safetensors"
        )
        changed = sum(model(DTYPES[dtype])[f"net.{name}.weight"].nbytes for name in ("q", "tall"))
        undo = tmp_path / "undo.safetensors"
        assert report.totals["changed_bytes"] == changed
        assert report.totals["undo_bytes"] == undo.stat().st_size == report.outputs[-1]["bytes"]
        # Two leading bits and more of every number survive a merge: a difference that does not show it is none.
        assert report.totals["undo_share"] == undo.stat().st_size / changed < 0.95
        assert {tensor.dtype for tensor in load_file(undo).values()} == {torch.uint8}
        assert set(load_file(undo)) == {"header/", "tensor/net.q.weight", "tensor/net.tall.weight"}
        assert metadata(undo)["ortho.command"].endswith("--keep-undo undo.safetensors")

    def test_the_same_merge_gives_the_same_undo_file(self, tmp_path: Path) -> None:
        save_file(model(), tmp_path / "base.safetensors")
        found = []
        for _ in range(2):
            merge(tmp_path / "base.safetensors", hra(tmp_path / "hra"), tmp_path / "m.safetensors", force=True,
                  keep_undo=tmp_path / "u.safetensors")  # fmt: skip
            found.append((tmp_path / "u.safetensors").read_bytes())
        assert found[0] == found[1]

    @pytest.mark.parametrize("merged", ["same", "resharded", "one.safetensors"])
    def test_shards_indices_and_small_files(self, tmp_path: Path, merged: str) -> None:
        base = write_sharded(tmp_path / "base", model(torch.bfloat16), 3)
        (base / "config.json").write_text('{"model_type": "mine"}')
        (base / "sub").mkdir()
        (base / "sub" / "spiece.model").write_bytes(bytes(range(256)))
        options = {"max_shard_size": "20KB"} if merged == "resharded" else {}
        round_trip(base, hra(tmp_path / "hra"), tmp_path, merged, "again", **options)

    def test_a_pipeline(self, tmp_path: Path) -> None:
        base = tmp_path / "base"
        for component, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
            write_sharded(base / component, model(torch.float16), 2 if component == "unet" else 1, stem)
            (base / component / "config.json").write_text("{}")
        (base / "model_index.json").write_text('{"unet": ["a", "b"], "text_encoder": ["a", "b"]}')
        adapter = tmp_path / "adapter"
        hra(adapter / "unet")
        round_trip(base, adapter, tmp_path, "merged", "again")

    def test_tensors_in_another_dtype_come_back_whole(self, tmp_path: Path) -> None:
        save_file(model(), tmp_path / "base.safetensors")
        round_trip(tmp_path / "base.safetensors", hra(tmp_path / "hra"), tmp_path, "m.safetensors", "b.safetensors",
                   dtype="bf16")  # fmt: skip

    def test_replaced_resized_and_added_tensors(self, tmp_path: Path) -> None:
        tensors = model() | {"net.embed.weight": torch.randn(10, 16)}
        base = write_sharded(tmp_path / "base", tensors, 1)
        (base / "config.json").write_text('{"vocab_size": 10}')
        bringing = {
            "net.embed.weight": torch.randn(12, 16),
            "net.q.bias": torch.ones(24),
            "net.head.weight": torch.ones(2, 2),
        }
        adapter = hra(tmp_path / "hra", **bringing)
        config = json.loads((adapter / "adapter_config.json").read_text())
        config |= {"modules_to_save": ["embed", "head"], "bias": "all"}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        round_trip(base, adapter, tmp_path, "merged", "again")
        assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 12

    def test_a_checkpoint_that_holds_its_adapter(self, tmp_path: Path) -> None:
        save_file(model(), tmp_path / "plain.safetensors")
        held = tmp_path / "held.safetensors"
        add_hra(tmp_path / "plain.safetensors", held, rank=4, targets=["net.q"], form="checkpoint")
        tensors = {name: t + 0.1 if name.endswith("hra_u") else t for name, t in read(held).items()}
        save_file(tensors, held, metadata(held))
        round_trip(held, [], tmp_path, "m.safetensors", "b.safetensors")

    def test_another_sharding_of_the_merged_checkpoint_serves(self, tmp_path: Path) -> None:
        save_file(model(), tmp_path / "base.safetensors")
        merge(tmp_path / "base.safetensors", hra(tmp_path / "hra"), tmp_path / "m.safetensors",
              keep_undo=tmp_path / "u.safetensors")  # fmt: skip
        write_sharded(tmp_path / "sharded", read(tmp_path / "m.safetensors"), 2)
        unmerge(tmp_path / "sharded", output=tmp_path / "b.safetensors", undo=tmp_path / "u.safetensors")
        assert contents(tmp_path / "b.safetensors") == contents(tmp_path / "base.safetensors")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder with a base, a merge `m` of it and the undo file `u`."""
    save_file(model(torch.float16), tmp_path / "base.safetensors")
    merge(tmp_path / "base.safetensors", hra(tmp_path / "hra"), tmp_path / "m.safetensors",
          keep_undo=tmp_path / "u.safetensors")  # fmt: skip
    return tmp_path


def restore(folder: Path, merged: str = "m.safetensors", undo: str = "u.safetensors", **options: Any) -> Any:
    return unmerge(folder / merged, output=folder / "again.safetensors", undo=folder / undo, **options)


def flip(path: Path, tensor: str) -> None:
    """Change one bit in the middle of a tensor, on the disk."""
    info = open_checkpoint(path).tensors[tensor]
    raw = bytearray(path.read_bytes())
    raw[info.offset + info.nbytes // 2] ^= 1
    path.write_bytes(bytes(raw))


class TestRefusals:
    @pytest.mark.parametrize("tensor", ["net.q.weight", "net.tall.weight", "net.q.bias", "net.steps"])
    def test_one_other_bit_in_the_merged_file(self, kept: Path, tensor: str) -> None:
        flip(kept / "m.safetensors", tensor)
        with pytest.raises(CheckpointError, match=r"is not the checkpoint that u\.safetensors was made for") as caught:
            restore(kept)
        assert caught.value.exit_code == 4 and not (kept / "again.safetensors").exists()

    @pytest.mark.parametrize("tensor", ["net.q.weight", "net.tall.weight"])
    def test_one_other_bit_in_the_undo_file(self, kept: Path, tensor: str) -> None:
        flip(kept / "u.safetensors", f"tensor/{tensor}")
        with pytest.raises(CheckpointError, match="damaged"):
            restore(kept)
        assert not list(kept.glob("*again*"))

    def test_another_merge_is_refused_by_a_dry_run(self, kept: Path) -> None:
        merge(kept / "base.safetensors", hra(kept / "other", seed=8), kept / "n.safetensors")
        with pytest.raises(CheckpointError, match="another fingerprint"):
            restore(kept, "n.safetensors", dry_run=True)

    def test_the_base_itself_is_not_the_merge(self, kept: Path) -> None:
        with pytest.raises(CheckpointError, match="was made for"):
            restore(kept, "base.safetensors")

    def test_force_does_not_make_another_merge_right(self, kept: Path) -> None:
        flip(kept / "m.safetensors", "net.steps")
        with pytest.raises(CheckpointError, match="other values"):
            restore(kept, force=True)

    def test_what_is_no_undo_file(self, kept: Path) -> None:
        with pytest.raises(CheckpointError, match="no undo file"):
            restore(kept, undo="base.safetensors")

    @pytest.mark.parametrize(("change", "message"), [
        ({"version": 2}, "version 2"),
        ({"files": {"../../out": ["", 8]}}, "outside of its folder"),
        ({"files": {"/out": ["", 8]}}, "outside of its folder"),
        ({"copies": {"a/../../b": "0"}}, "outside of its folder"),
        ({"files": 3}, "damaged"),
        ({"tensors": {"x": ["a"]}}, "damaged"),
        ({"files": {"": ["", 9]}}, "trunc|trailing"),
        ({"tensors": {}}, "says nothing of tensor"),
    ])  # fmt: skip
    def test_hostile_records(self, kept: Path, change: dict[str, Any], message: str) -> None:
        told = metadata(kept / "u.safetensors")
        told["ortho.undo"] = json.dumps(json.loads(told["ortho.undo"]) | change)
        save_file(load_file(kept / "u.safetensors"), kept / "v.safetensors", told)
        with pytest.raises((CheckpointError, UsageError), match=message):
            restore(kept, undo="v.safetensors")
        assert not (kept / "again.safetensors").exists()

    def test_a_stream_that_grows_without_end(self, kept: Path) -> None:
        import zlib

        packed = zlib.compress(bytes(50_000_000), 9)
        bomb = torch.tensor([*len(packed).to_bytes(4, "little"), *packed], dtype=torch.uint8)
        tensors = load_file(kept / "u.safetensors") | {"tensor/net.q.weight": bomb}
        save_file(tensors, kept / "v.safetensors", metadata(kept / "u.safetensors"))
        with pytest.raises(CheckpointError, match="damaged"):
            restore(kept, undo="v.safetensors")

    def test_outputs_of_another_shape_and_arguments_that_do_nothing(self, kept: Path) -> None:
        for arguments in ({"output": kept / "folder"}, {"exact": True}, {"strength": 0.5}, {"adapters": kept / "hra"}):
            options = {"output": kept / "again.safetensors", **arguments}
            with pytest.raises(UsageError):
                unmerge(kept / "m.safetensors", undo=kept / "u.safetensors", **options)
        with pytest.raises(UsageError, match="neither an undo file nor an adapter"):
            unmerge(kept / "m.safetensors", output=kept / "again.safetensors")

    def test_the_report_counts_what_comes_back(self, kept: Path) -> None:
        report = restore(kept, dry_run=True)
        assert {entry["name"]: (entry["rank"], entry["parameters"]) for entry in report.details} == {
            "net.q": (None, 24 * 16), "net.tall": (None, TALL * 64),
        }  # fmt: skip
        assert report.parameters == 24 * 16 + TALL * 64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [1, 3 * BLOCK_BYTES // 8 + 1])
@pytest.mark.parametrize("alone", [False, True])
def test_differences_of_many_blocks(tmp_path: Path, dtype: torch.dtype, rows: int, alone: bool) -> None:
    """Every block on its way to the threads is a copy: the reader's memory is overwritten meanwhile."""
    torch.manual_seed(0)
    before = torch.randn(rows).mul(50).to(dtype) if dtype != torch.uint8 else torch.randint(0, 256, (8 * rows,)).byte()
    save_file({"w": before}, tmp_path / "a.safetensors")
    save_file({"w": before.roll(1)}, tmp_path / "b.safetensors")
    info, other = (open_checkpoint(tmp_path / f"{name}.safetensors").tensors["w"] for name in "ab")
    previous = None if alone else other
    seen: list[bytes] = []
    packed = b"".join(undo_blocks.encoded(info, previous, lambda block: seen.append(bytes(block))))
    save_file({"d": torch.frombuffer(bytearray(packed), dtype=torch.uint8)}, tmp_path / "d.safetensors")
    stored = open_checkpoint(tmp_path / "d.safetensors").tensors["d"]
    wanted = before.view(torch.uint8).numpy().tobytes()
    assert b"".join(seen) == wanted
    assert b"".join(map(bytes, undo_blocks.decoded(stored, info, previous))) == wanted


class TestKeeping:
    def test_a_pickle_cannot_come_back(self, tmp_path: Path) -> None:
        torch.save(model(), tmp_path / "base.ckpt")
        with pytest.raises(UsageError, match="pickle") as caught:
            merge(tmp_path / "base.ckpt", hra(tmp_path / "hra"), tmp_path / "m.safetensors", keep_undo="u.safetensors")
        assert "--to safetensors" in (caught.value.hint or "")

    @pytest.mark.parametrize("place", ["m", "m/undo.safetensors", "undo.bin"])
    def test_places_that_cannot_be(self, tmp_path: Path, place: str) -> None:
        base = write_sharded(tmp_path / "base", model(), 2)
        with pytest.raises(UsageError):
            merge(base, hra(tmp_path / "hra"), tmp_path / "m", keep_undo=tmp_path / place)

    def test_an_existing_undo_file_stays(self, kept: Path) -> None:
        before = contents(kept / "u.safetensors")
        with pytest.raises(OutputError, match="exists"):
            merge(kept / "base.safetensors", kept / "hra", kept / "n.safetensors", keep_undo=kept / "u.safetensors")
        assert contents(kept / "u.safetensors") == before and not (kept / "n.safetensors").exists()

    def test_an_input_is_no_place_for_it(self, kept: Path) -> None:
        with pytest.raises(OutputError, match="input"):
            merge(kept / "base.safetensors", kept / "hra", kept / "n.safetensors", force=True,
                  keep_undo=kept / "base.safetensors")  # fmt: skip

    def test_a_failure_leaves_neither(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save_file(model(), tmp_path / "base.safetensors")
        adapter, before = hra(tmp_path / "hra"), set(tmp_path.iterdir())

        def fails(*_: Any) -> Any:
            raise OrthoError("the disk is gone")

        with monkeypatch.context() as patched:
            patched.setattr(undo_module, "write_file", fails)
            with pytest.raises(OrthoError, match="gone"):
                merge(
                    tmp_path / "base.safetensors",
                    adapter,
                    tmp_path / "m.safetensors",
                    keep_undo=tmp_path / "u.safetensors",
                )
        assert set(tmp_path.iterdir()) - {adapter} == before - {adapter}
        big = lora(tmp_path / "lora")
        save_file(
            {k: 1e30 * t for k, t in load_file(big / "adapter_model.safetensors").items()},
            big / "adapter_model.safetensors",
        )
        with pytest.raises(NumericsError):
            merge(tmp_path / "base.safetensors", big, tmp_path / "m.safetensors", keep_undo=tmp_path / "u.safetensors")
        assert not list(tmp_path.glob("*[mu].safetensors*"))

    def test_the_record_says_what_changed(self, kept: Path) -> None:
        record = read_record(open_checkpoint(kept / "u.safetensors"))
        assert {name for name, (own, _, there) in record.tensors.items() if own != there} == {
            "net.q.weight", "net.tall.weight",
        }  # fmt: skip
        assert record.tensors.keys() == model().keys()


class TestInverses:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("exact", [False, True])
    def test_the_base_to_rounding_as_estimated(self, tmp_path: Path, dtype: str, exact: bool) -> None:
        save_file(model(DTYPES[dtype]), tmp_path / "base.safetensors")
        adapters = [hra(tmp_path / "a"), hra(tmp_path / "b", seed=2)]
        merge(tmp_path / "base.safetensors", adapters, tmp_path / "m.safetensors", exact=exact)
        report = unmerge(tmp_path / "m.safetensors", adapters, tmp_path / "b.safetensors", exact=exact)
        found, wanted = read(tmp_path / "b.safetensors"), model(DTYPES[dtype])
        error = relative_error(found["net.tall.weight"], wanted["net.tall.weight"])
        assert report.totals["expected_error"] == {dtype: expected_error(dtype, exact=exact)}
        assert expected_error(dtype, exact=exact) / 4 < error < 4 * expected_error(dtype, exact=exact)
        assert all(torch.equal(found[name], wanted[name]) for name in ("net.q.bias", "net.norm.weight", "net.steps"))

    def test_order_and_strengths_are_undone(self, tmp_path: Path) -> None:
        save_file(model(), tmp_path / "base.safetensors")
        adapters = [(hra(tmp_path / "a"), 0.7), lora(tmp_path / "lora"), (hra(tmp_path / "b", seed=2), -0.4)]
        strength = [0.5, "net.q=0.9"]
        merge(tmp_path / "base.safetensors", adapters, tmp_path / "m.safetensors", strength=strength, exact=True)
        unmerge(tmp_path / "m.safetensors", adapters, tmp_path / "b.safetensors", strength=strength, exact=True)
        for name, tensor in read(tmp_path / "b.safetensors").items():
            assert torch.allclose(tensor, model()[name], rtol=1e-6, atol=1e-7), name

    def test_what_has_no_inverse(self, tmp_path: Path) -> None:
        save_file(model(), tmp_path / "m.safetensors")
        bringing = hra(tmp_path / "brings", **{"net.norm.weight": torch.zeros(16)})
        config = json.loads((bringing / "adapter_config.json").read_text()) | {"modules_to_save": ["norm"]}
        (bringing / "adapter_config.json").write_text(json.dumps(config))
        dora = lora(tmp_path / "dora")
        tensors = load_file(dora / "adapter_model.safetensors")
        tensors["base_model.model.net.q.lora_magnitude_vector"] = torch.ones(24)
        save_file(tensors, dora / "adapter_model.safetensors")
        config = json.loads((dora / "adapter_config.json").read_text()) | {"use_dora": True}
        (dora / "adapter_config.json").write_text(json.dumps(config))
        for adapter, reason in ((bringing, "replaced net.norm.weight"), (dora, "DoRA")):
            with pytest.raises(TargetError, match=reason):
                unmerge(tmp_path / "m.safetensors", adapter, tmp_path / "b.safetensors")

    def test_the_base_of_an_adapter_is_not_unmerged(self, tmp_path: Path) -> None:
        base, folder = tmp_path / "base.safetensors", tmp_path / "made"
        save_file(model(), base)
        add_hra(base, folder, rank=2, targets=["net.q"])
        weights = folder / "adapter_model.safetensors"
        own, moved = metadata(weights), {name: torch.randn_like(tensor) for name, tensor in read(folder).items()}
        save_file(moved, weights, own)
        with pytest.raises(TargetError, match="is the base that made was made for: it was not merged into it"):
            unmerge(base, [folder], tmp_path / "out.safetensors")
        merge(base, folder, tmp_path / "merged.safetensors")
        unmerge(tmp_path / "merged.safetensors", [folder], tmp_path / "out.safetensors")
        assert relative_error(read(tmp_path / "out.safetensors")["net.q.weight"], model()["net.q.weight"]) < 1e-6

    def test_a_checkpoint_with_its_adapter_inside(self, tmp_path: Path) -> None:
        save_file(model(), tmp_path / "plain.safetensors")
        add_hra(
            tmp_path / "plain.safetensors", tmp_path / "held.safetensors", rank=4, targets=["net.q"], form="checkpoint"
        )
        with pytest.raises(TargetError, match="of its own"):
            unmerge(tmp_path / "held.safetensors", hra(tmp_path / "a"), tmp_path / "b.safetensors")
