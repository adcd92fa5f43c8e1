"""What the tests of surgery do to adapters: give them values that matter, change a file, read it all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def read(path: Path) -> Tensors:
    """Every tensor of a safetensors file, or of all those below a folder, through the reference reader."""
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    found: Tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, framework="pt") as opened:
        return dict(opened.metadata() or {})


def rewrite(path: Path, tensors: Tensors) -> Path:
    """Replace the tensors of a safetensors file, keeping its metadata."""
    save_file(tensors, path, metadata=metadata(path))
    return path


def train(folder: Path, amount: float = 0.3, seed: int = 0) -> Path:
    """Move every number of an adapter folder (its subfolders too), as training would; returns the folder."""
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(folder.rglob("adapter_model.safetensors")):
        moved = {
            name: tensor + amount * tensor.std() * torch.randn(tensor.shape, generator=generator)
            for name, tensor in read(path).items()
        }
        rewrite(path, moved)
    return folder


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """``||found - wanted|| / ||wanted||`` in float64."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def write_sharded(folder: Path, tensors: Tensors, count: int, stem: str = "model", *, pickled: bool = False) -> Path:
    """Weights of one model in `count` files, with an index where there are several; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "bin" if pickled else "safetensors"
    stem = "pytorch_model" if pickled else stem
    shards = [dict(list(tensors.items())[start::count]) for start in range(count)]
    place = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}.{suffix}" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.{suffix}"
        shard = {key: tensor.contiguous() for key, tensor in shard.items()}
        if pickled:
            torch.save(shard, folder / name)
        else:
            save_file(shard, folder / name, metadata={"format": "pt"})
        place |= dict.fromkeys(shard, name)
    if count > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": place}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def peft_folder(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """A PEFT adapter written by hand: tensors under their layers' names, and the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    prefixed = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
