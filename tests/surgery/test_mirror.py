"""An output that follows a base has its folders, shards and small files, under names that the libraries open."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.checkpoints.writer import Piece, computed, copied
from ortho_cli.errors import CheckpointError, UsageError
from ortho_cli.surgery.mirror import check_output_name, mirror, parse_size
from ortho_cli.surgery.plan import Plan, run

Save = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
Transform = Callable[[str, TensorInfo], Sequence[Piece]]


def same(name: str, info: TensorInfo) -> list[Piece]:
    return [copied(info, name)]


def ones(name: str, count: int = 2) -> Piece:
    return computed(name, "U8", (count,), lambda: iter([b"\1" * count]))


def write(
    base: Path, output: Path, transform: Transform = same, extra: Sequence[Piece] = (), limit: int | None = None
) -> list[str]:
    """Mirror and write; the names of the output's files, sorted."""
    opened = open_checkpoint(base)
    made = mirror(opened, output, transform, {"ortho.x": "y"}, extra=extra, max_shard_bytes=limit)
    run(Plan("test", [file.path for file in opened.files], output, made.files, copies=made.copies, texts=made.texts))
    return sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())


def contents(folder: Path) -> Tensors:
    """Every tensor of an output, read as its users will: through our reader, checked against the library's."""
    opened = open_checkpoint(folder)
    found: Tensors = {}
    for file in opened.files:
        prefix = f"{file.component}." if file.component else ""
        found |= {prefix + name: tensor for name, tensor in load_file(file.path).items()}
    assert found.keys() == opened.tensors.keys()
    return found


def equal(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def weights() -> Tensors:
    return {f"layer.{n}.weight": torch.full((4, 4), float(n)) for n in range(6)}


def shard(
    folder: Path, weights: Tensors, counts: Sequence[int], stem: str = "model", kind: str = "safetensors"
) -> Path:
    """Write weights as shards of so many tensors each, with their index, as the libraries do."""
    from ortho_cli.checkpoints.index import index_names

    folder.mkdir(parents=True)
    weight_map, rest = {}, iter(weights.items())
    for number, count in enumerate(counts, 1):
        name = f"{stem}-{number:05d}-of-{len(counts):05d}.{kind}"
        part = {key: value for _, (key, value) in zip(range(count), rest, strict=False)}
        if kind == "bin":
            torch.save(part, folder / name)
        else:
            from safetensors.torch import save_file

            save_file(part, folder / name, {"format": "pt", "shard": str(number)})
        weight_map |= dict.fromkeys(part, name)
    plain, _, variant = stem.partition(".")
    names = index_names(plain.removeprefix("pytorch_"), variant or None)
    index = {"metadata": {"total_size": 64 * len(weights)}, "weight_map": weight_map}
    (folder / names[kind == "bin"]).write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder


def test_shards_are_kept(weights: Tensors, tmp_path: Path) -> None:
    base = shard(tmp_path / "base", weights, (1, 3, 2))
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    assert write(base, tmp_path / "out") == sorted(before)
    assert equal(contents(tmp_path / "out"), weights)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == json.loads(before["model.safetensors.index.json"])
    with safe_open(tmp_path / "out" / "model-00002-of-00003.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "shard": "2", "ortho.x": "y"}
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_a_single_shard_keeps_its_index(weights: Tensors, tmp_path: Path) -> None:
    base = shard(tmp_path / "base", weights, (6,))
    names = write(base, tmp_path / "out")
    assert names == ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    assert equal(contents(tmp_path / "out"), weights)


def test_changed_tensors_stay_in_their_shard(weights: Tensors, tmp_path: Path) -> None:
    def transform(name: str, info: TensorInfo) -> list[Piece]:
        if name == "layer.0.weight":
            return []
        return [copied(info), ones(name.replace("weight", "hra_u"))] if name == "layer.4.weight" else [copied(info)]

    base = shard(tmp_path / "base", weights, (2, 4))
    write(base, tmp_path / "out", transform, extra=[ones("new")])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {name: place[6:11] for name, place in index["weight_map"].items()} == {
        "layer.1.weight": "00001", "new": "00001", "layer.2.weight": "00002", "layer.3.weight": "00002",
        "layer.4.weight": "00002", "layer.4.hra_u": "00002", "layer.5.weight": "00002",
    }  # fmt: skip
    assert index["metadata"]["total_size"] == 5 * 64 + 4


@pytest.mark.parametrize(
    ("limit", "counts"), [(1, [1] * 6), (64, [1] * 6), (191, [2, 2, 2]), (192, [3, 3]), (320, [5, 1]), (384, [6])]
)
def test_shards_of_another_size(limit: int, counts: list[int], weights: Tensors, tmp_path: Path) -> None:
    base = shard(tmp_path / "base", weights, (2, 4))
    names = [name for name in write(base, tmp_path / "out", limit=limit) if name.endswith(".safetensors")]
    assert [len(load_file(tmp_path / "out" / name)) for name in names] == counts
    assert equal(contents(tmp_path / "out"), weights)
    whole = "model.safetensors" in names
    assert whole == (len(counts) == 1)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() != whole


def test_pickles_come_out_under_the_names_their_library_opens(weights: Tensors, tmp_path: Path) -> None:
    for stem, expected in (("pytorch_model", "model"), ("diffusion_pytorch_model", "diffusion_pytorch_model")):
        base = shard(tmp_path / stem, weights, (5, 1), stem, "bin")
        assert write(base, tmp_path / f"out-{stem}") == [
            "config.json", *(f"{expected}-0000{n}-of-00002.safetensors" for n in (1, 2)),
            f"{expected}.safetensors.index.json",
        ]  # fmt: skip
        assert equal(contents(tmp_path / f"out-{stem}"), weights)
    for name, expected in {
        "pytorch_model.bin": "model", "adapter_model.bin": "adapter_model", "v1-5.ckpt": "v1-5", "model.bin": "model",
        "diffusion_pytorch_model.bin": "diffusion_pytorch_model",
    }.items():  # fmt: skip
        base = tmp_path / name.replace(".", "-")
        base.mkdir()
        torch.save(weights, base / name)
        assert write(base, tmp_path / f"out-{base.name}") == [f"{expected}.safetensors"]


@pytest.mark.parametrize("limit", [None, 64, 10_000])
def test_variants_keep_their_names(limit: int | None, weights: Tensors, tmp_path: Path) -> None:
    base = shard(tmp_path / "base", weights, (3, 3), "diffusion_pytorch_model.fp16")
    names = write(base, tmp_path / "out", limit=limit)
    assert any(name.startswith("diffusion_pytorch_model.fp16") for name in names)
    assert ("diffusion_pytorch_model.safetensors.index.fp16.json" in names) == (limit != 10_000)
    assert equal(contents(tmp_path / "out"), weights)


def test_files_and_folders_into_each_other(weights: Tensors, tmp_path: Path, save: Save) -> None:
    file = save(tmp_path / "v1-5.safetensors", weights, format="pt")
    assert write(file, tmp_path / "folder") == ["model.safetensors"]
    assert len(write(file, tmp_path / "shards", limit=100)) == 7
    base = shard(tmp_path / "base", weights, (2, 4))
    write(base, tmp_path / "one.safetensors")
    assert equal(load_file(tmp_path / "one.safetensors"), weights)
    with pytest.raises(UsageError, match=r"one\.safetensors is one file and cannot be split") as caught:
        mirror(open_checkpoint(base), tmp_path / "one.safetensors", same, {}, max_shard_bytes=100)
    assert caught.value.hint == "give a folder: -o one"


def pipeline(root: Path, weights: Tensors, save: Save) -> Path:
    shard(root / "text_encoder", weights, (3, 3))
    save(root / "unet" / "diffusion_pytorch_model.safetensors", weights)
    save(root / "vae" / "diffusion_pytorch_model.fp16.safetensors", weights)
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "vocab.json").write_text("{}")
    index = {name: ["diffusers", "X"] for name in ("text_encoder", "unet", "vae", "tokenizer")}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def test_pipelines_keep_their_components(weights: Tensors, tmp_path: Path, save: Save) -> None:
    base = pipeline(tmp_path / "sd", weights, save)
    names = write(base, tmp_path / "out", extra=[ones("unet.new"), ones("unknown")])
    assert names == sorted(path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file())
    found = contents(tmp_path / "out")
    assert found.keys() == {f"{part}.{n}" for part in ("text_encoder", "unet", "vae") for n in weights} | {
        "unet.new", "text_encoder.unknown"
    }  # fmt: skip
    assert "new" in load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UsageError, match="several components"):
        mirror(open_checkpoint(base), tmp_path / "out.safetensors", same, {})


def test_small_files_travel_and_weights_of_others_stay(weights: Tensors, tmp_path: Path, save: Save) -> None:
    base = save(tmp_path / "base" / "model.safetensors", weights).parent
    kept = ["config.json", "tokenizer.json", "README.md", "LICENSE", "1_Pooling/config.json", "vocab.txt", "x.model"]
    left = [
        "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "model.gguf", "rust_model.ot", "pytorch_model.bin",
        "model.fp16.safetensors", "training_args.bin", "optimizer.pt", ".git/config", ".gitattributes", ".cache/x.json",
        "pytorch_model.bin.index.json", "model.safetensors.index.fp16.json", "sub/model.safetensors",
    ]  # fmt: skip
    for name in (*kept, *left):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(f'{{"name": "{name}"}}\r\n'.encode())
    assert write(base, tmp_path / "out") == sorted([*kept, "model.safetensors"])
    assert all((tmp_path / "out" / name).read_bytes() == (base / name).read_bytes() for name in kept)


def test_weights_left_behind_are_named(weights: Tensors, tmp_path: Path, save: Save) -> None:
    base = save(tmp_path / "base" / "model.safetensors", weights).parent
    assert mirror(open_checkpoint(base), tmp_path / "out", same, {}).notes == []
    (base / "flax_model.msgpack").touch()
    made = mirror(open_checkpoint(base), tmp_path / "out", same, {})
    assert made.notes == ["1 other weight file of the base left behind: flax_model.msgpack"]
    for name in ("model.fp16.safetensors", "onnx/model.onnx", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).touch()
    made = mirror(open_checkpoint(base), tmp_path / "out", same, {})
    assert made.notes == [
        "4 other weight files of the base left behind: flax_model.msgpack, model.fp16.safetensors, onnx/model.onnx, ..."
    ]


def test_two_shards_of_one_name_are_refused(weights: Tensors, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    parts = {"pytorch_model.bin": "layer.0.weight", "model.bin": "layer.1.weight"}
    for name, tensor in parts.items():
        torch.save({tensor: weights[tensor]}, base / name)
    index = {"weight_map": {tensor: name for name, tensor in parts.items()}}
    (base / "weights.bin.index.json").write_text(json.dumps(index))
    opened = open_checkpoint(base / "weights.bin.index.json")
    made = mirror(opened, tmp_path / "out", same, {})
    with pytest.raises(CheckpointError, match=r"2 files of the output would have the name 'model\.safetensors'"):
        run(Plan("test", [file.path for file in opened.files], tmp_path / "out", made.files, texts=made.texts))
    assert not (tmp_path / "out").exists()


def test_links_in_the_base(weights: Tensors, tmp_path: Path, save: Save) -> None:
    base = save(tmp_path / "base" / "model.safetensors", weights).parent
    (base / "config.json").write_text("{}")
    os.symlink("config.json", base / "inside.json")
    os.symlink("nowhere.json", base / "dangling.json")
    os.symlink("loop.json", base / "loop.json")
    assert write(base, tmp_path / "out") == ["config.json", "inside.json", "model.safetensors"]
    assert not (tmp_path / "out" / "inside.json").is_symlink()
    (tmp_path / "secret.json").write_text("{}")
    os.symlink("../secret.json", base / "outside.json")
    with pytest.raises(CheckpointError, match=r"outside\.json is a link out of the folder"):
        write(base, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_an_output_inside_the_base_is_no_part_of_it(weights: Tensors, tmp_path: Path, save: Save) -> None:
    base = save(tmp_path / "base" / "model.safetensors", weights).parent
    (base / "config.json").write_text("{}")
    first = write(base, base / "merged")
    opened = open_checkpoint(base)
    again = mirror(opened, base / "merged", same, {"ortho.x": "y"})
    run(Plan("test", [opened.files[0].path], base / "merged", again.files, copies=again.copies), force=True)
    assert sorted(path.name for path in (base / "merged").iterdir()) == first == ["config.json", "model.safetensors"]


def test_metadata_of_an_earlier_command_is_replaced(weights: Tensors, tmp_path: Path, save: Save) -> None:
    file = save(tmp_path / "x.safetensors", weights, **{"format": "np", "ortho.command": "old", "author": "me"})
    write(file, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "np", "author": "me", "ortho.x": "y"}


def test_two_tensors_of_one_name_in_two_shards(weights: Tensors, tmp_path: Path) -> None:
    base = shard(tmp_path / "base", weights, (3, 3))
    with pytest.raises(CheckpointError, match="two tensors of the output have the name 'same'"):
        mirror(open_checkpoint(base), tmp_path / "out", lambda name, info: [copied(info, "same")], {})


def test_sizes() -> None:
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size("1.5gb") == 15 * 10**8
    assert parse_size(" 500 MB ") == 5 * 10**8
    assert parse_size("10kb") == 10_000
    assert parse_size("4096") == 4096
    assert parse_size("1TB") == 10**12


@pytest.mark.parametrize(
    "text", ["", "GB", "five", "5XB", "-1GB", "0", "0.1", "nan", "inf", "1e999GB", "5GiB", "5 G B"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size") as caught:
        parse_size(text)
    assert caught.value.exit_code == 2


def test_outputs_are_no_pickles() -> None:
    for suffix in (".ckpt", ".bin", ".pt", ".pth"):
        with pytest.raises(UsageError, match="pickles can run code") as caught:
            check_output_name(Path(f"a/x{suffix}"))
        assert caught.value.hint == "use -o x.safetensors"
    for name in ("x.safetensors", "x", "x.y", "pt", ".hidden"):
        check_output_name(Path(name))
