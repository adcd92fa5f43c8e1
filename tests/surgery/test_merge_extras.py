"""What an adapter brings besides factors: saved modules, biases, trained tokens, resized embeddings, differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import Tensors, peft_folder, read, relative_error, write_sharded
from safetensors.torch import save_file

from ortho_cli.errors import CheckpointError
from ortho_cli.surgery.merge import merge

WORDS, WIDTH = 10, 6


def weights() -> Tensors:
    torch.manual_seed(0)
    return {
        "embed_tokens.weight": torch.randn(WORDS, WIDTH), "layers.0.q.weight": torch.randn(WIDTH, WIDTH),
        "layers.0.q.bias": torch.randn(WIDTH), "classifier.weight": torch.randn(3, WIDTH),
        "classifier.bias": torch.randn(3),
    }  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_sharded(tmp_path / "base", weights(), 1)
    (folder / "config.json").write_text(json.dumps({"model_type": "test", "vocab_size": WORDS, "hidden_size": WIDTH}))
    return folder


def adapter(folder: Path, extra: Tensors, rank: int = 2, **config: Any) -> Path:
    """LoRA on `q`, and whatever stands beside it."""
    torch.manual_seed(1)
    factors = {
        "layers.0.q.lora_A.weight": torch.randn(rank, WIDTH),
        "layers.0.q.lora_B.weight": torch.randn(WIDTH, rank),
    }
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q"], **config}
    return peft_folder(folder, {**factors, **extra}, **settings)


def merged_q() -> torch.Tensor:
    torch.manual_seed(1)
    down, up = torch.randn(2, WIDTH), torch.randn(WIDTH, 2)
    return weights()["layers.0.q.weight"].double() + up.double() @ down.double()


def changed(folder: Path) -> set[str]:
    found, before = read(folder), weights()
    return {name for name in found if name not in before or not torch.equal(found[name], before[name])}


def test_saved_modules_take_the_bases_place(base: Path, tmp_path: Path) -> None:
    head = {"classifier.weight": torch.randn(3, WIDTH), "classifier.bias": torch.randn(3)}
    path = adapter(tmp_path / "a", head, modules_to_save=["classifier"])
    report = merge(base, [path], tmp_path / "out")
    found = read(tmp_path / "out")
    assert changed(tmp_path / "out") == {*head, "layers.0.q.weight"}
    assert all(torch.equal(found[name], tensor) for name, tensor in head.items())
    assert relative_error(found["layers.0.q.weight"], merged_q()) < 1e-6
    assert (report.layers, report.totals["replaced"]) == (1, 2)


def test_a_head_of_another_size_may_replace_the_old_one(base: Path, tmp_path: Path) -> None:
    head = {"classifier.weight": torch.randn(5, WIDTH), "classifier.bias": torch.randn(5)}
    report = merge(base, [adapter(tmp_path / "a", head, modules_to_save=["classifier"])], tmp_path / "out")
    found = read(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in head.items())
    assert any("3 to 5 rows" in note and "config.json is left" in note for note in report.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == WORDS


def test_a_new_head_is_added_and_said(tmp_path: Path) -> None:
    body = {name: tensor.half() for name, tensor in weights().items() if "classifier" not in name}
    write_sharded(tmp_path / "base", body, 1)
    head = {"classifier.weight": torch.randn(3, WIDTH), "classifier.bias": torch.randn(3)}
    path = adapter(tmp_path / "a", head, modules_to_save=["classifier"])
    report = merge(tmp_path / "base", [path], tmp_path / "out")
    assert sum("is not in the base and was added" in note for note in report.notes) == 2
    assert torch.equal(read(tmp_path / "out")["classifier.weight"], head["classifier.weight"])
    merge(tmp_path / "base", [path], tmp_path / "cast", dtype="fp16")
    assert {tensor.dtype for tensor in read(tmp_path / "cast").values()} == {torch.float16}


@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_saved_biases(base: Path, tmp_path: Path, kind: str) -> None:
    biases = {"layers.0.q.base_layer.bias": torch.arange(float(WIDTH))}
    if kind == "all":
        biases["classifier.bias"] = torch.arange(3.0)
    merge(base, [adapter(tmp_path / "a", biases, bias=kind)], tmp_path / "out")
    found = read(tmp_path / "out")
    assert torch.equal(found["layers.0.q.bias"], torch.arange(float(WIDTH)))
    assert torch.equal(found["classifier.bias"], torch.arange(3.0)) == (kind == "all")


def test_a_bias_of_the_factors_is_added(base: Path, tmp_path: Path) -> None:
    extra = {"layers.0.q.lora_B.bias": torch.ones(WIDTH)}
    merge(base, [adapter(tmp_path / "a", extra, lora_alpha=6, lora_bias=True)], tmp_path / "out")
    found = read(tmp_path / "out")["layers.0.q.bias"]
    assert torch.allclose(found, weights()["layers.0.q.bias"] + 3.0)


@pytest.mark.parametrize("single", [False, True])
def test_resized_embeddings_and_the_number_of_words(base: Path, tmp_path: Path, single: bool) -> None:
    grown = torch.randn(WORDS + 2, WIDTH)
    source = base / "model.safetensors" if single else base
    report = merge(source, [adapter(tmp_path / "a", {"embed_tokens.weight": grown})], tmp_path / "out")
    assert torch.equal(read(tmp_path / "out")["embed_tokens.weight"], grown)
    if not single:
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
            "model_type": "test", "vocab_size": WORDS + 2, "hidden_size": WIDTH,
        }  # fmt: skip
        assert any("vocab_size in config.json is now 12 (was 10)" in note for note in report.notes)


def test_an_embedding_both_resized_and_adapted(base: Path, tmp_path: Path) -> None:
    grown, down, up = torch.randn(WORDS + 2, WIDTH), torch.randn(2, WORDS + 2), torch.randn(WIDTH, 2)
    extra = {
        "embed_tokens.base_layer.weight": grown,
        "embed_tokens.lora_embedding_A": down,
        "embed_tokens.lora_embedding_B": up,
    }
    merge(base, [adapter(tmp_path / "a", extra, target_modules=["q", "embed_tokens"])], tmp_path / "out")
    wanted = grown.double() + (up.double() @ down.double()).T
    assert relative_error(read(tmp_path / "out")["embed_tokens.weight"], wanted) < 1e-6


def test_trained_token_rows(base: Path, tmp_path: Path) -> None:
    rows = {"embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(3, WIDTH)}
    path = adapter(tmp_path / "a", rows, trainable_token_indices={"embed_tokens": [7, 0, 3]})
    merge(base, [path], tmp_path / "out")
    found, before = read(tmp_path / "out")["embed_tokens.weight"], weights()["embed_tokens.weight"]
    (values,) = rows.values()
    assert torch.equal(found[[7, 0, 3]], values)
    untouched = [row for row in range(WORDS) if row not in (7, 0, 3)]
    assert torch.equal(found[untouched], before[untouched])


@pytest.mark.parametrize(
    ("rows", "width", "name"),
    [([7, WORDS], WIDTH, "embed_tokens"), ([1, 2], WIDTH + 1, "embed_tokens"), ([1, 2], WIDTH, "embed_words")],
)
def test_token_rows_that_do_not_fit(base: Path, tmp_path: Path, rows: list[int], width: int, name: str) -> None:
    extra = {f"{name}.token_adapter.trainable_tokens_delta": torch.randn(2, width)}
    path = adapter(tmp_path / "a", extra, trainable_token_indices={name: rows})
    with pytest.raises(
        CheckpointError, match="does not fit embed_tokens" if name == "embed_tokens" else "not in the base"
    ):
        merge(base, [path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def kohya(path: Path, tensors: Tensors) -> Path:
    flat = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    save_file({f"{flat}.{role}": tensor for role, tensor in tensors.items()}, path)
    return path


class TestDifferences:
    """LyCORIS stores whole differences."""

    LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"

    @pytest.fixture
    def unet(self, tmp_path: Path) -> Path:
        torch.manual_seed(2)
        tensors = {f"{self.LAYER}.weight": torch.randn(4, 4), f"{self.LAYER}.bias": torch.randn(4)}
        save_file(tensors, tmp_path / "unet.safetensors")
        return tmp_path / "unet.safetensors"

    def test_are_added(self, unet: Path, tmp_path: Path) -> None:
        path = kohya(tmp_path / "full.safetensors", {"diff": torch.full((4, 4), 2.0), "diff_b": torch.ones(4)})
        merge(unet, [path], tmp_path / "out.safetensors")
        before, after = read(unet), read(tmp_path / "out.safetensors")
        assert torch.equal(after[f"{self.LAYER}.weight"], before[f"{self.LAYER}.weight"] + 2)
        assert torch.equal(after[f"{self.LAYER}.bias"], before[f"{self.LAYER}.bias"] + 1)

    @pytest.mark.parametrize("shape", [(2, 8), (4, 5), (1, 16), (4,)])
    def test_of_another_shape_are_refused(self, unet: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
        path = kohya(tmp_path / "full.safetensors", {"diff": torch.ones(shape)})
        with pytest.raises(CheckpointError, match=r"diff of shape .* does not fit .*to_out\.0\.weight"):
            merge(unet, [path], tmp_path / "out.safetensors")


def test_a_single_number_may_be_replaced(tmp_path: Path) -> None:
    """CLIP's `logit_scale` has no dimension at all."""
    write_sharded(tmp_path / "base", {**weights(), "head.scale": torch.tensor(2.0)}, 1)
    path = adapter(tmp_path / "a", {"head.scale": torch.tensor(5.0)}, modules_to_save=["head"])
    merge(tmp_path / "base", [path], tmp_path / "out")
    assert read(tmp_path / "out")["head.scale"].item() == 5.0


class TestTypes:
    """A tensor of the adapter's type is taken as it is; others are cast where that is a rounding, else refused."""

    @staticmethod
    def base(folder: Path, scale: torch.Tensor) -> Path:
        return write_sharded(folder, {**weights(), "head.scale": scale}, 1)

    @pytest.mark.parametrize("value", [2**53 + 1, -(2**62) - 1])
    def test_integers_are_taken_bit_for_bit(self, tmp_path: Path, value: int) -> None:
        base = self.base(tmp_path / "base", torch.tensor([1, 2]))
        wanted = torch.tensor([value, 3])
        merge(base, adapter(tmp_path / "a", {"head.scale": wanted}, modules_to_save=["head"]), tmp_path / "out")
        assert torch.equal(read(tmp_path / "out")["head.scale"], wanted)

    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [(torch.int64, torch.float32), (torch.uint8, torch.float16), (torch.float32, torch.int64)],
    )
    def test_others_are_refused_by_name(self, tmp_path: Path, theirs: torch.dtype, ours: torch.dtype) -> None:
        base = self.base(tmp_path / "base", torch.ones(2, dtype=ours))
        path = adapter(tmp_path / "a", {"head.scale": torch.ones(2, dtype=theirs)}, modules_to_save=["head"])
        with pytest.raises(CheckpointError, match=r"head\.scale of the adapter is .*only float types") as caught:
            merge(base, [path], tmp_path / "out")
        assert caught.value.exit_code == 4 and not (tmp_path / "out").exists()

    def test_rows_and_differences_too(self, base: Path, tmp_path: Path) -> None:
        rows = {"embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, WIDTH, dtype=torch.int32)}
        path = adapter(tmp_path / "rows", rows, trainable_token_indices={"embed_tokens": [1]})
        with pytest.raises(CheckpointError, match="delta of the adapter is I32"):
            merge(base, [path], tmp_path / "out")
        path = adapter(tmp_path / "bias", {"layers.0.q.lora_B.bias": torch.ones(WIDTH, dtype=torch.int8)})
        with pytest.raises(CheckpointError, match=r"lora_B\.bias of the adapter is I8"):
            merge(base, [path], tmp_path / "out")

    def test_a_float_cast_is_said_once(self, tmp_path: Path) -> None:
        halves = {name: tensor.half() for name, tensor in weights().items()}
        base = write_sharded(tmp_path / "base", halves, 1)
        head = {"classifier.weight": torch.randn(3, WIDTH), "classifier.bias": torch.randn(3)}
        path = adapter(tmp_path / "a", head, modules_to_save=["classifier"])
        report = merge(base, [path], tmp_path / "out")
        (note,) = [note for note in report.notes if "cast" in note]
        assert note == "2 tensors of the adapters were cast to the base's float type (F32 -> F16)"
        assert torch.equal(read(tmp_path / "out")["classifier.weight"], head["classifier.weight"].half())
        assert not any("cast" in note for note in merge(base, [path], tmp_path / "wide", dtype="fp32").notes)
        assert torch.equal(read(tmp_path / "wide")["classifier.weight"], head["classifier.weight"])


class TestTwoThatResize:
    """The later adapter's tensor stands; what acts after it must fit its shape, not the base's."""

    def test_the_last_one_stands(self, base: Path, tmp_path: Path) -> None:
        one = adapter(tmp_path / "one", {"embed_tokens.weight": torch.randn(WORDS + 2, WIDTH)})
        last = torch.randn(WORDS + 5, WIDTH)
        report = merge(base, [one, adapter(tmp_path / "two", {"embed_tokens.weight": last})], tmp_path / "out")
        assert torch.equal(read(tmp_path / "out")["embed_tokens.weight"], last)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == WORDS + 5
        assert any("embed_tokens.weight: a later adapter replaces" in note for note in report.notes)

    def test_later_rows_and_layers_see_the_new_shape(self, base: Path, tmp_path: Path) -> None:
        grown = torch.randn(WORDS + 2, WIDTH)
        one = adapter(tmp_path / "one", {"embed_tokens.weight": grown})
        down, up, row = torch.randn(2, WORDS + 2), torch.randn(WIDTH, 2), torch.randn(1, WIDTH)
        factors = {"embed_tokens.lora_embedding_A": down, "embed_tokens.lora_embedding_B": up}
        two = adapter(tmp_path / "two", factors)
        rows = {"embed_tokens.token_adapter.trainable_tokens_delta": row}
        three = adapter(tmp_path / "three", rows, trainable_token_indices={"embed_tokens": [WORDS + 1]})
        merge(base, [one, two, three], tmp_path / "out")
        wanted = grown.double() + (up.double() @ down.double()).T
        wanted[WORDS + 1] = row.double()
        assert relative_error(read(tmp_path / "out")["embed_tokens.weight"], wanted) < 1e-6
        small = {"embed_tokens.lora_embedding_A": torch.randn(2, WORDS), "embed_tokens.lora_embedding_B": up}
        with pytest.raises(CheckpointError, match="embed_tokens of the adapter does not fit"):
            merge(base, [one, adapter(tmp_path / "small", small)], tmp_path / "refused")


def test_the_change_of_a_zero_tensor_has_no_relative_size(tmp_path: Path) -> None:
    base = write_sharded(tmp_path / "base", {**weights(), "layers.0.q.weight": torch.zeros(WIDTH, WIDTH)}, 1)
    (detail,) = merge(base, [adapter(tmp_path / "a", {})], tmp_path / "out").details
    assert detail["relative_change"] is None
    still = {"layers.0.q.lora_A.weight": torch.zeros(2, WIDTH), "layers.0.q.lora_B.weight": torch.zeros(WIDTH, 2)}
    (detail,) = merge(base, [adapter(tmp_path / "still", still)], tmp_path / "same").details
    assert detail["relative_change"] == 0.0
