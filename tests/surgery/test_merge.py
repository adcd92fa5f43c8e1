"""merge against the naive arithmetic: dense reflections and products, in float64, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import Tensors, metadata, peft_folder, read, relative_error, write_sharded
from safetensors.torch import save_file
from torch import Tensor

from ortho_cli.checkpoints.reading import BLOCK_BYTES
from ortho_cli.errors import UsageError
from ortho_cli.surgery.merge import merge


def model() -> Tensors:
    """Layers of several shapes, one of them too large for one block of rows, and tensors that nothing touches."""
    torch.manual_seed(0)
    rows = BLOCK_BYTES // (64 * 4) + 3
    return {
        "net.q.weight": torch.randn(24, 16), "net.q.bias": torch.randn(24), "net.tall.weight": torch.randn(rows, 64),
        "net.conv.weight": torch.randn(8, 4, 3, 3), "net.norm.weight": torch.randn(16),
        "net.steps": torch.tensor([7], dtype=torch.int64),
    }  # fmt: skip


LAYERS = {"net.q": (24, 16), "net.tall": (BLOCK_BYTES // (64 * 4) + 3, 64), "net.conv": (8, 36)}


def vectors(rank: int, seed: int = 1) -> Tensors:
    torch.manual_seed(seed)
    return {f"{layer}.hra_u": torch.randn(width, rank) for layer, (_, width) in LAYERS.items()}


def factors(rank: int, seed: int = 2) -> Tensors:
    torch.manual_seed(seed)
    found = {}
    for layer, (rows, width) in LAYERS.items():
        conv = layer == "net.conv"
        found[f"{layer}.lora_A.weight"] = torch.randn(rank, 4, 3, 3) if conv else torch.randn(rank, width)
        found[f"{layer}.lora_B.weight"] = 0.1 * (torch.randn(rows, rank, 1, 1) if conv else torch.randn(rows, rank))
    return found


def reflected(weight: Tensor, columns: Tensor) -> Tensor:
    """``W H_1 ... H_r``, one dense reflection after the other."""
    width = columns.shape[0]
    for column in columns.double().T:
        unit = column / column.norm()
        weight = weight @ (torch.eye(width, dtype=torch.float64) - 2 * torch.outer(unit, unit))
    return weight


def naive(base: Tensors, *adapters: Tensors, scale: float = 1.0) -> Tensors:
    """What a merge of these adapters, in this order, should give; float64 where anything changes."""
    merged = dict(base)
    for adapter in adapters:
        for layer in LAYERS:
            weight = merged[f"{layer}.weight"]
            matrix = weight.double().flatten(1)
            if f"{layer}.hra_u" in adapter:
                matrix = reflected(matrix, adapter[f"{layer}.hra_u"])
            if f"{layer}.lora_A.weight" in adapter:
                up, down = adapter[f"{layer}.lora_B.weight"], adapter[f"{layer}.lora_A.weight"]
                matrix = matrix + scale * up.double().flatten(1) @ down.double().flatten(1)
            merged[f"{layer}.weight"] = matrix.reshape(weight.shape)
    return merged


def hra(folder: Path, rank: int = 4, seed: int = 1) -> tuple[Path, Tensors]:
    content = vectors(rank, seed)
    return peft_folder(folder, content, peft_type="HRA", r=rank, target_modules=["q", "tall", "conv"]), content


def lora(folder: Path, rank: int = 3, alpha: float = 6.0, **config: Any) -> tuple[Path, Tensors]:
    content = factors(rank)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q", "tall", "conv"], **config}
    return peft_folder(folder, content, **settings), content


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file(model(), tmp_path / "base.safetensors", {"format": "pt", "theirs": "kept", "ortho.command": "not kept"})
    return tmp_path / "base.safetensors"


def check(found: Tensors, wanted: Tensors, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if tensor.dtype == torch.float64:
            assert relative_error(found[name], tensor) <= tolerance, name
        else:
            assert torch.equal(found[name], tensor), name


class TestArithmetic:
    @pytest.mark.parametrize("rank", [1, 4, 5, 16])
    def test_reflections(self, base: Path, tmp_path: Path, rank: int) -> None:
        adapter, content = hra(tmp_path / "hra", rank)
        report = merge(base, [adapter], tmp_path / "out.safetensors")
        check(read(tmp_path / "out.safetensors"), naive(model(), content), 1e-6)
        assert (report.layers, report.parameters) == (3, rank * (16 + 64 + 36))

    @pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 6 / 3**0.5)])
    def test_low_rank(self, base: Path, tmp_path: Path, rslora: bool, scale: float) -> None:
        adapter, content = lora(tmp_path / "lora", use_rslora=rslora)
        merge(base, [adapter], tmp_path / "out.safetensors")
        check(read(tmp_path / "out.safetensors"), naive(model(), content, scale=scale), 1e-6)

    def test_order_counts(self, base: Path, tmp_path: Path) -> None:
        first, turn = hra(tmp_path / "first")
        second, other = hra(tmp_path / "second", seed=5)
        added, delta = lora(tmp_path / "added", alpha=3.0)
        results = []
        for paths, contents in (
            ([first, second, added], [turn, other, delta]),
            ([second, first, added], [other, turn, delta]),
            ([added, first, second], [delta, turn, other]),
        ):
            out = tmp_path / f"{len(results)}.safetensors"
            report = merge(base, paths, out)
            check(read(out), naive(model(), *contents), 1e-6)
            assert report.totals["adapters"] == ["lora" if path is added else "hra" for path in paths]
            results.append(read(out)["net.q.weight"])
        assert all(relative_error(results[0], other) > 0.1 for other in results[1:])

    def test_exact_is_float64_and_rounds_once(self, base: Path, tmp_path: Path) -> None:
        adapter, content = hra(tmp_path / "hra")
        report = merge(base, [adapter], tmp_path / "out.safetensors", exact=True)
        wanted = naive(model(), content)
        for name, tensor in read(tmp_path / "out.safetensors").items():
            half_step = torch.finfo(torch.float32).eps * wanted[name].double().abs()
            assert bool(((tensor.double() - wanted[name].double()).abs() <= half_step + 1e-12).all()), name
        assert report.totals["arithmetic"] == "float64"

    def test_a_float64_base_is_never_merged_in_less(self, tmp_path: Path) -> None:
        weights = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in model().items()}
        save_file(weights, tmp_path / "base.safetensors")
        adapter, content = hra(tmp_path / "hra")
        merge(tmp_path / "base.safetensors", [adapter], tmp_path / "out.safetensors")
        for name, wanted in naive(weights, content).items():
            assert name == "net.steps" or relative_error(read(tmp_path / "out.safetensors")[name], wanted) < 1e-14

    @pytest.mark.parametrize(("dtype", "step"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
    def test_a_half_precision_base_is_rounded_once(self, tmp_path: Path, dtype: torch.dtype, step: float) -> None:
        weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in model().items()}
        save_file(weights, tmp_path / "base.safetensors")
        adapter, content = hra(tmp_path / "hra")
        merge(tmp_path / "base.safetensors", [adapter], tmp_path / "out.safetensors")
        found, wanted = read(tmp_path / "out.safetensors"), naive(weights, content)
        for layer in LAYERS:
            tensor, exact = found[f"{layer}.weight"], wanted[f"{layer}.weight"]
            assert tensor.dtype == dtype
            # Half a unit in the last place, and the float32 rounding of the product before.
            assert bool(((tensor.double() - exact).abs() <= step / 2 * exact.abs() + 1e-5).all())

    def test_the_report_measures_the_change(self, base: Path, tmp_path: Path) -> None:
        torch.manual_seed(3)
        pair = torch.randn(16, 1)
        turned = torch.cat([pair, pair + 0.01 * torch.randn(16, 1)], dim=1)
        adapter = peft_folder(tmp_path / "hra", {"net.q.hra_u": turned}, peft_type="HRA", r=2, target_modules=["q"])
        (detail,) = merge(base, [adapter], tmp_path / "out.safetensors").details
        before, after = model()["net.q.weight"], read(tmp_path / "out.safetensors")["net.q.weight"]
        assert detail["relative_change"] == pytest.approx(relative_error(after, before), rel=1e-4)
        cosine = torch.nn.functional.cosine_similarity(turned[:, 0].double(), turned[:, 1].double(), dim=0)
        assert detail["largest_angle"] == pytest.approx(2 * float(torch.acos(cosine)), rel=1e-6)
        assert (detail["name"], detail["kind"], detail["rank"], detail["shape"]) == ("net.q", "hra", 2, [24, 16])

    def test_the_change_of_huge_weights_has_a_size(self, tmp_path: Path) -> None:
        """Their squares are beyond float32."""
        weights = {name: tensor * 1e25 if name.endswith("weight") else tensor for name, tensor in model().items()}
        save_file(weights, tmp_path / "huge.safetensors")
        adapter, _ = hra(tmp_path / "hra")
        report = merge(tmp_path / "huge.safetensors", [adapter], tmp_path / "out.safetensors")
        merged = read(tmp_path / "out.safetensors")
        for detail in report.details:
            name = f"{detail['name']}.weight"
            assert detail["relative_change"] == pytest.approx(relative_error(merged[name], weights[name]), rel=1e-4)

    def test_torch_has_its_threads_back(self, base: Path, tmp_path: Path) -> None:
        threads = torch.get_num_threads()
        adapter, _ = hra(tmp_path / "hra")
        merge(base, [adapter], tmp_path / "out.safetensors", dtype="bf16")
        assert torch.get_num_threads() == threads


class TestDtype:
    @pytest.mark.parametrize(("option", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", None)])
    def test_every_float_is_cast(self, base: Path, tmp_path: Path, option: str, dtype: torch.dtype | None) -> None:
        adapter, content = hra(tmp_path / "hra")
        merge(base, [adapter], tmp_path / "out.safetensors", dtype=option)
        found, wanted = read(tmp_path / "out.safetensors"), naive(model(), content)
        assert found.pop("net.steps").dtype == torch.int64
        for name, tensor in found.items():
            assert tensor.dtype == (dtype or torch.float32)
            assert relative_error(tensor, wanted[name]) < (1e-2 if dtype is not None else 1e-6)

    def test_no_such_type(self, base: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="--dtype 'fp8' is none of keep") as caught:
            merge(base, [hra(tmp_path / "hra")[0]], tmp_path / "out.safetensors", dtype="fp8")
        assert "bf16" in (caught.value.hint or "")


class TestForms:
    """What a base may be, and that the output is like it."""

    def test_a_file_keeps_its_metadata_but_not_our_marks(self, base: Path, tmp_path: Path) -> None:
        adapter, _ = hra(tmp_path / "hra")
        merge(base, [adapter], tmp_path / "out.safetensors", exact=True)
        found = metadata(tmp_path / "out.safetensors")
        assert found["theirs"] == "kept"
        assert found["ortho.command"] == "ortho merge base.safetensors hra --exact"

    @pytest.mark.parametrize("pickled", [False, True])
    @pytest.mark.parametrize("shards", [1, 3])
    def test_a_folder_keeps_its_shards_and_small_files(self, tmp_path: Path, pickled: bool, shards: int) -> None:
        folder = write_sharded(tmp_path / "base", model(), shards, pickled=pickled)
        (folder / "config.json").write_text('{"model_type": "test"}')
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.txt").write_text("a b c")
        adapter, content = hra(tmp_path / "hra")
        merge(folder, [adapter], tmp_path / "out")
        check(read(tmp_path / "out"), naive(model(), content), 1e-6)
        names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
        single = {"model.safetensors"}
        several = {"model.safetensors.index.json", *(f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3))}
        assert names == {"config.json", "tokenizer/vocab.txt", *(single if shards == 1 else several)}
        if shards > 1:
            index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
            assert index["weight_map"].keys() == model().keys()
            for name, shard in index["weight_map"].items():
                assert name in read(tmp_path / "out" / shard)
            assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model().values())

    @pytest.mark.parametrize("suffix", ["bin", "ckpt", "pt"])
    def test_a_pickled_file_becomes_safetensors(self, tmp_path: Path, suffix: str) -> None:
        torch.save({"state_dict": model()} if suffix == "ckpt" else model(), tmp_path / f"base.{suffix}")
        adapter, content = hra(tmp_path / "hra")
        merge(tmp_path / f"base.{suffix}", [adapter], tmp_path / "out.safetensors")
        check(read(tmp_path / "out.safetensors"), naive(model(), content), 1e-6)

    def test_new_shards_on_request(self, base: Path, tmp_path: Path) -> None:
        adapter, content = hra(tmp_path / "hra")
        merge(base, [adapter], tmp_path / "out", max_shard_size="4KB")
        check(read(tmp_path / "out"), naive(model(), content), 1e-6)
        assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1

    def test_the_same_command_gives_the_same_bytes(self, base: Path, tmp_path: Path) -> None:
        adapters: Sequence[Path] = [hra(tmp_path / "hra")[0], lora(tmp_path / "lora")[0]]
        written = []
        for folder in ("one", "two"):
            merge(base, adapters, tmp_path / folder / "out.safetensors")
            written.append((tmp_path / folder / "out.safetensors").read_bytes())
        assert written[0] == written[1]
        assert str(tmp_path).encode() not in written[0]


def test_one_adapter_needs_no_list_and_the_output_is_asked_for(base: Path, tmp_path: Path) -> None:
    adapter, content = hra(tmp_path / "hra")
    merge(str(base), str(adapter), tmp_path / "out.safetensors")
    check(read(tmp_path / "out.safetensors"), naive(model(), content), 1e-6)
    with pytest.raises(TypeError, match="output"):
        merge(base, [adapter])  # type: ignore[call-arg]
