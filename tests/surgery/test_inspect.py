"""inspect: what a file is, from headers alone; the adapter in it; whether it belongs to a base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_folders import peft_folder, read, train, write_sharded
from safetensors.torch import save_file
from true_scale import LDM, sparse, with_ema

from ortho_cli.errors import CheckpointError, UsageError
from ortho_cli.surgery.add_hra import add_hra
from ortho_cli.surgery.convert import convert
from ortho_cli.surgery.inspect import inspect, inspect_globals
from ortho_cli.surgery.small_sd15 import small_sd15


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "v1-5-small.safetensors"
    small_sd15(path)
    return path


@pytest.fixture(scope="module")
def adapter(small: Path) -> Path:
    add_hra(small, small.parent / "hra")
    return small.parent / "hra"


class TestTotals:
    def test_of_the_published_file(self, tmp_path: Path) -> None:
        report = inspect(sparse(tmp_path / "v1-5.safetensors", floats="F32"))
        assert report.parameters == 859_520_964 + 83_653_863 + 123_060_480 + 12_000 + 2 + 77
        totals = report.totals
        assert (totals["format"], totals["kind"], totals["layout"]) == ("safetensors", "file", "sd15-ldm")
        assert (totals["files"], totals["tensors"], totals["bytes"]) == (1, 1145, 4_264_989_852)
        assert {dtype: entry["tensors"] for dtype, entry in totals["dtypes"].items()} == {
            "F32": 1143,
            "I32": 1,
            "I64": 1,
        }
        assert {name: (entry["tensors"], entry["parameters"]) for name, entry in totals["components"].items()} == {
            "unet": (686, 859_520_964), "vae": (248, 83_653_863), "text_encoder": (197, 123_060_480 + 77),
            "(buffers)": (12, 12_000), "model_ema": (2, 2),
        }  # fmt: skip
        assert "adapter" not in totals

    def test_of_the_training_file(self, tmp_path: Path) -> None:
        totals = inspect(sparse(tmp_path / "v1-5-pruned.safetensors", with_ema(), floats="F32")).totals
        assert (totals["tensors"], totals["components"]["model_ema"]["tensors"]) == (1831, 688)
        assert totals["components"]["model_ema"]["parameters"] == 859_520_964 + 2

    def test_of_parts_that_are_not_the_models(self, tmp_path: Path) -> None:
        stray = {**LDM, "embedding_manager.weight": ("F32", (3, 3)), "logvar": ("F32", (1000,))}
        components = inspect(sparse(tmp_path / "odd.safetensors", stray)).totals["components"]
        assert (components["embedding_manager"]["tensors"], components["(buffers)"]["tensors"]) == (1, 13)
        save_file({"a.weight": torch.ones(2), "scale": torch.ones(1)}, tmp_path / "plain.safetensors")
        assert inspect(tmp_path / "plain.safetensors").totals["components"].keys() == {"a", "(top level)"}

    def test_of_shards(self, tmp_path: Path) -> None:
        tensors = {f"layers.{i}.weight": torch.ones(3, 4, dtype=torch.bfloat16) for i in range(5)}
        report = inspect(write_sharded(tmp_path / "model", tensors, 2))
        assert (report.totals["files"], report.totals["tensors"], report.totals["kind"]) == (2, 5, "folder")
        assert report.totals["dtypes"] == {"BF16": {"tensors": 5, "bytes": 120}}
        assert (report.layers, report.parameters, report.details) == (5, 60, [])

    def test_of_a_pickle(self, tmp_path: Path) -> None:
        torch.save({"state_dict": {"a.weight": torch.ones(2, 2)}}, tmp_path / "model.ckpt")
        report = inspect(tmp_path / "model.ckpt")
        assert (report.totals["format"], report.totals["layout"], report.parameters) == ("pickle", "plain", 4)

    def test_layers_on_request(self, small: Path) -> None:
        report = inspect(small, layers=True)
        assert report.layers == len(report.details)
        name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k"
        (found,) = [entry for entry in report.details if entry["name"] == name]
        assert found == {
            "name": name, "shape": [256, 96], "dtype": "F32", "parameters": 256 * 96,
            "canonical": "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        }  # fmt: skip


class TestAdapters:
    def test_a_peft_folder(self, adapter: Path) -> None:
        report = inspect(adapter, layers=True)
        found = report.totals["adapter"]
        assert (found["dialect"], found["kind"], found["layers"], found["ranks"]) == ("peft", "hra", 144, {"8": 144})
        assert found["parameters"] == report.parameters == sum(entry["parameters"] for entry in report.details)
        assert (found["base_bound"], len(found["base_fingerprint"])) == (False, 64)
        assert report.totals["made_by"]["ortho.command"].startswith("ortho add-hra v1-5-small.safetensors")

    def test_a_checkpoint_that_holds_one(self, small: Path, tmp_path: Path) -> None:
        add_hra(small, tmp_path / "hra.safetensors", rank=[4, "**.ff.**=8"])
        report = inspect(tmp_path / "hra.safetensors")
        found = report.totals["adapter"]
        assert (found["dialect"], found["kind"], found["ranks"]) == ("hra-repo", "hra", {"4": 128, "8": 16})
        assert report.totals["components"].keys() == {"unet", "vae", "text_encoder"}
        assert (found["layers"], report.layers) == (144, inspect(small).layers)

    def test_an_export_is_bound(self, small: Path, adapter: Path, tmp_path: Path) -> None:
        convert(adapter, tmp_path / "k.safetensors", "kohya-lora", base=str(small))
        found = inspect(tmp_path / "k.safetensors").totals["adapter"]
        assert (found["dialect"], found["kind"], found["base_bound"]) == ("kohya", "lora", True)

    def test_whole_tensors_are_counted(self, tmp_path: Path) -> None:
        tensors = {"q.hra_u": torch.ones(4, 2), "q.base_layer.bias": torch.ones(4)}
        folder = peft_folder(tmp_path / "a", tensors, peft_type="HRA", r=2, bias="hra_only", target_modules=["q"])
        assert inspect(folder).totals["adapter"]["whole_tensors"] == 1


class TestBase:
    def fits(self, adapter: Path, base: Path) -> dict[str, object]:
        found: dict[str, object] = inspect(adapter, base=base).totals["adapter"]["fits_base"]
        return found

    def test_its_own(self, small: Path, adapter: Path) -> None:
        assert self.fits(adapter, small) == {
            "base": "v1-5-small.safetensors", "names": True, "shapes": True, "fingerprint": True, "reason": None,
        }  # fmt: skip

    def test_the_same_in_half_precision(self, small: Path, adapter: Path, tmp_path: Path) -> None:
        halves = {name: tensor.half() for name, tensor in read(small).items()}
        save_file(halves, tmp_path / "half.safetensors")
        assert self.fits(adapter, tmp_path / "half.safetensors")["fingerprint"] is True

    def test_a_fine_tune_of_it(self, small: Path, adapter: Path, tmp_path: Path) -> None:
        tensors = read(small)
        name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
        tensors[name] = tensors[name] + 0.01
        save_file(tensors, tmp_path / "tuned.safetensors")
        found = self.fits(adapter, tmp_path / "tuned.safetensors")
        assert (found["names"], found["shapes"], found["fingerprint"]) == (True, True, False)

    def test_one_of_other_shapes(self, adapter: Path, tmp_path: Path) -> None:
        found = self.fits(adapter, sparse(tmp_path / "full.safetensors"))
        assert (found["names"], found["shapes"]) == (True, False)
        assert "columns" in str(found["reason"])

    def test_one_of_other_names(self, adapter: Path, tmp_path: Path) -> None:
        save_file({"bert.weight": torch.ones(2, 2)}, tmp_path / "bert.safetensors")
        found = self.fits(adapter, tmp_path / "bert.safetensors")
        assert (found["names"], found["shapes"]) == (False, None)
        assert "fit no layer" in str(found["reason"])

    def test_an_adapter_that_does_not_say(self, small: Path, tmp_path: Path) -> None:
        layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        theirs = {f"{layer}.hra_u": torch.ones(256, 2)}
        folder = peft_folder(tmp_path / "a", theirs, peft_type="HRA", r=2, target_modules=["to_q"])
        found = self.fits(folder, small)
        assert (found["shapes"], found["fingerprint"]) == (True, None)
        assert "no fingerprint" in str(found["reason"])

    def test_is_for_adapters(self, small: Path) -> None:
        with pytest.raises(UsageError, match="--base is for adapters"):
            inspect(small, base=small)


class TestGlobals:
    def test_lists_what_a_pickle_would_import(self, tmp_path: Path) -> None:
        torch.save({"a": torch.ones(2)}, tmp_path / "model.ckpt")
        report = inspect_globals(tmp_path / "model.ckpt")
        names = {entry["name"] for entry in report.details}
        assert {"torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "collections.OrderedDict"} <= names
        assert report.totals == {"globals": len(names)}

    def test_needs_a_pickle_that_is_there(self, small: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="is no pickled checkpoint"):
            inspect_globals(small)
        with pytest.raises(CheckpointError, match="no such file"):
            inspect_globals(tmp_path / "missing.ckpt")


def test_reports_are_json(adapter: Path, small: Path) -> None:
    report = inspect(adapter, base=small, layers=True).as_dict()
    assert json.loads(json.dumps(report)) == report
    assert report["command"] == "inspect"


def test_no_tensor_is_read(tmp_path: Path) -> None:
    """A file of the true size opens in no time: the rest of it is a hole."""
    path = sparse(tmp_path / "v1-5.safetensors")
    assert inspect(path).totals["tensors"] == len(LDM)
    assert path.stat().st_blocks * 512 < 2_000_000 < path.stat().st_size


def test_two_components_are_told_apart(small: Path, tmp_path: Path) -> None:
    add_hra(small, tmp_path / "both", targets=["sd15-attention", "**.self_attn.q_proj"])
    train(tmp_path / "both")
    found = inspect(tmp_path / "both", base=small).totals
    assert found["adapter"]["layers"] == 130
    assert found["adapter"]["fits_base"]["fingerprint"] is True
    assert found["components"].keys() == {"unet", "text_encoder"}


def test_the_adapter_is_that_of_the_file_that_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened once: a second look at the source could find another file."""
    from ortho_cli.checkpoints import store
    from ortho_cli.surgery import inspect as module

    tensors = {"x.weight": torch.ones(4, 4), "x.hra_u": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "hra.safetensors")
    opened: list[object] = []
    original = store.open_checkpoint

    def counting(source: str | Path, **options: str | None) -> store.Checkpoint:
        opened.append(source)
        return original(source, **options)

    monkeypatch.setattr(store, "open_checkpoint", counting)
    monkeypatch.setattr(module, "open_checkpoint", counting)
    assert inspect(tmp_path / "hra.safetensors").totals["adapter"]["layers"] == 1
    assert len(opened) == 1
