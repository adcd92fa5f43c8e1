"""Stable Diffusion 1.5 at its true size and without its data: the header is real, the rest of the file is a hole."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

DATA = Path(__file__).parent.parent / "data"
BITS = {"F16": 16, "F32": 32, "I32": 32, "I64": 64}
Shapes = dict[str, tuple[int, ...]]

LDM: dict[str, tuple[str, tuple[int, ...]]] = {
    name: (dtype, tuple(shape))
    for name, (dtype, shape) in json.loads((DATA / "sd15_ldm_keys.json").read_text()).items()
}


def _targets() -> dict[str, tuple[tuple[int, int], bool]]:
    """Layer -> shape of its vectors at rank 8, and whether it has a bias: the authors' 144 layers."""
    found = {}
    for line in (DATA / "sd15_hra_targets.txt").read_text().splitlines():
        name, vectors, _, bias = line.split("\t")
        width, rank = map(int, vectors.strip("()").split(","))
        found[name.removesuffix(".hra_u")] = ((width, rank), bias == "bias yes")
    return found


TARGETS = _targets()


def sparse(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]] | None = None, floats: str = "F16") -> Path:
    """A safetensors file whose header lists `tensors` (all 1,145 by default) and whose data takes no room."""
    header: dict[str, object] = {}
    offset = 0
    for name, (stored, shape) in (LDM if tensors is None else tensors).items():
        dtype = floats if stored == "F32" else stored
        size = prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
    return path


def with_ema() -> dict[str, tuple[str, tuple[int, ...]]]:
    """The 1,831 tensors of `v1-5-pruned`: every UNet tensor a second time, dots removed."""
    prefix = "model.diffusion_model."
    copies = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): entry
        for name, entry in LDM.items()
        if name.startswith(prefix)
    }
    return {**LDM, **copies}
