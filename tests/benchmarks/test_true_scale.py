"""Every verb on a file with Stable Diffusion 1.5's real names, shapes and size: counts, key sets, peak memory.

Slow (gigabytes of disk): `pytest -m slow tests/benchmarks`. Times are compared by `surgery.py` beside this file.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
from surgery import true_scale

from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.cli.stopwatch import run_once

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LAYERS, PARAMETERS = 144, 895_488
ORTHO = [sys.executable, "-m", "ortho_cli"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("true-scale")


@pytest.fixture(scope="module")
def half(folder: Path) -> Path:
    path = folder / "v1-5-f16.safetensors"
    true_scale(path, "F16")
    return path


@pytest.fixture(scope="module")
def lightning(half: Path) -> Iterator[Path]:
    """The same tensors as PyTorch Lightning 1.4 pickled them: an unknown class as a key, numpy scalars beside."""
    path = half.with_suffix(".ckpt")
    write_lightning(path, half)
    yield path
    path.unlink()


def write_lightning(path: Path, source: Path) -> None:
    """Stream a zip checkpoint: data.pkl with persistent ids, one stored member for each tensor of `source`."""
    import torch

    checkpoint = open_checkpoint(source)
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    parents = {"pytorch_lightning", "pytorch_lightning.callbacks"}
    sys.modules.update({name: types.ModuleType(name) for name in parents} | {module.__name__: module})
    classes = {"F16": torch.HalfStorage, "I64": torch.LongStorage, "I32": torch.IntStorage}

    class Tensor:
        def __init__(self, key: str, dtype: str, shape: tuple[int, ...]) -> None:
            self.key, self.dtype, self.shape = key, dtype, shape

        def __reduce__(self) -> tuple[object, ...]:
            strides = [1]
            for size in reversed(self.shape[1:]):
                strides.insert(0, strides[0] * size)
            count = 1
            for size in self.shape:
                count *= size
            storage = Storage(classes[self.dtype], self.key, count)
            strides = strides[: len(self.shape)]
            return torch._utils._rebuild_tensor_v2, (storage, 0, self.shape, tuple(strides), False, OrderedDict())

    class Storage:
        def __init__(self, kind: type, key: str, count: int) -> None:
            self.kind, self.key, self.count = kind, key, count

    class Pickler(pickle._Pickler):  # the Python one: it asks persistent_id for every object
        def persistent_id(self, item: object) -> object:
            return ("storage", item.kind, item.key, "cpu", item.count) if isinstance(item, Storage) else None

    import numpy as np

    infos = list(checkpoint.tensors.values())
    state = OrderedDict((info.name, Tensor(str(key), info.dtype, info.shape)) for key, info in enumerate(infos))
    content = {
        "epoch": 13, "global_step": 840_000, "pytorch-lightning_version": "1.4.2", "state_dict": state,
        "callbacks": {callback: {"best_model_score": None}}, "lr_schedulers": [{"_last_lr": [np.float64(1e-4)]}],
    }  # fmt: skip
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(content)
    for name in (*parents, module.__name__):
        del sys.modules[name]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive, open(source, "rb") as data:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        for key, info in enumerate(infos):
            data.seek(info.offset)
            with archive.open(f"archive/data/{key}", "w", force_zip64=True) as member:
                member.write(data.read(info.nbytes))
        archive.writestr("archive/version", "3\n")


def ortho(*words: object, megabytes: int) -> None:
    """Run a command; its peak memory stays in the budget."""
    _, peak = run_once([*ORTHO, *map(str, words), "-q"])
    assert peak / 1e6 <= megabytes, f"{words[0]}: {peak / 1e6:.0f} MB"


def names(path: Path) -> set[str]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return set(json.loads(file.read(length))) - {"__metadata__"}


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_add_hra_adapter(kind: str, half: Path, lightning: Path, folder: Path) -> None:
    source = half if kind == "safetensors" else lightning
    ortho("add-hra", source, "-o", folder / f"adapter-{kind}", megabytes=300)
    adapter = open_checkpoint(folder / f"adapter-{kind}")
    assert len(adapter.tensors) == LAYERS
    assert sum(info.numel for info in adapter.tensors.values()) == PARAMETERS
    if kind == "ckpt":
        first = (folder / "adapter-safetensors" / "adapter_model.safetensors").read_bytes()
        assert adapter.metadata["ortho.base_fingerprint"].encode() in first, "same base, other container"


def test_add_hra_checkpoint_and_back(half: Path, folder: Path) -> None:
    inside, back = folder / "inside.safetensors", folder / "back.safetensors"
    ortho("add-hra", half, "-o", inside, megabytes=400)
    assert len(names(inside)) == 1145 + LAYERS
    ortho("convert", inside, "--to", "base", "-o", back, megabytes=400)
    inside.unlink()
    done = subprocess.run([*ORTHO, "inspect", str(half), "--diff", str(back), "--fail-above", "0"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    back.unlink()


def test_hra_repo_layout_from_the_pickle(half: Path, lightning: Path, folder: Path) -> None:
    output = folder / "hra-repo.safetensors"
    ortho("add-hra", lightning, "-o", output, "--layout", "hra-repo", megabytes=400)
    found, base = names(output), names(half)
    output.unlink()
    assert len(found) == 830 + 248 + 197 + 12 + 1 + 20
    assert sum(name.endswith(".hra_u") for name in found) == LAYERS
    assert sum(name.startswith("control_model.") for name in found) == 20 and "logvar" in found
    restored = {name.replace(".fixed_linear.", ".") for name in found if not name.endswith(".hra_u")}
    assert restored - {name for name in restored if name.startswith("control_model.")} - {"logvar"} == {
        name for name in base if not name.startswith("model_ema.")
    }


def test_merge_convert_and_inspect_stay_small(half: Path, lightning: Path, folder: Path) -> None:
    adapter = folder / "adapter-merge"
    ortho("add-hra", half, "-o", adapter, megabytes=300)
    merged = folder / "merged.safetensors"
    for source in (half, lightning):
        ortho("merge", source, adapter, "-o", merged, "--force", megabytes=400)
        assert names(merged) == names(half)
    merged.unlink()
    lora = folder / "lora.safetensors"
    ortho("convert", adapter, "--to", "kohya-lora", "--base", half, "-o", lora, megabytes=400)
    diffusers = folder / "diffusers"
    ortho("convert", half, "--to", "diffusers", "-o", diffusers, megabytes=400)
    assert len(open_checkpoint(diffusers).tensors) == 1130
    seconds, peak = run_once([*ORTHO, "inspect", str(lightning)])
    assert peak / 1e6 <= 300 and seconds > 0
