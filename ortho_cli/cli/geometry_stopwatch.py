"""Time `ortho combine` on adapters of Stable Diffusion's shape, beside dense logarithms of `d x d` rotations."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .stopwatch import ORTHO, START_UP, Timing, run_rounds

__all__ = ["DENSE", "measure_combine"]

TEXT_WIDTH = 768  # of what the cross-attention reads
DENSE = "dense logm and expm"
START = "import torch; from ortho_cli.__main__ import main; main()"
# One layer of each width in a fresh interpreter, with all threads: rotations formed whole, their mean by logarithms.
SCRIPT = """
import json, sys, time
import numpy as np
from safetensors.numpy import load_file
from scipy.linalg import expm, logm

def chain(vectors):
    product = np.eye(len(vectors))
    for v in vectors.T.astype(float):
        v = v / np.linalg.norm(v)
        product -= 2 * np.outer(product @ v, v)
    return product

seconds = {}
adapters = [load_file(path + "/adapter_model.safetensors") for path in sys.argv[2:]]
for name in adapters[0]:
    width = len(adapters[0][name])
    if width not in seconds:
        start = time.perf_counter()
        expm(sum(logm(chain(adapter[name])).real for adapter in adapters) / len(adapters))
        seconds[width] = time.perf_counter() - start
json.dump(seconds, open(sys.argv[1], "w"))
"""


def measure_combine(
    *, adapters: int, rank: int, modes: Sequence[str], rounds: int, folder: Path | None = None
) -> list[Timing]:
    """Time whole commands in shuffled rounds; the dense form first, to which ratios are.

    Args:
        adapters: how many are combined.
        rank: reflections a layer of each, turned by moderate angles.
        modes: of `ortho combine`.
        rounds: each command runs this often.
        folder: where the adapters go for a moment.

    Returns:
        Timings; the dense form's seconds are those of one layer of each width, in the last round, times the number of
        such layers.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".ortho-bench-") as scratch:
        place = Path(scratch)
        paths, widths = _write_adapters(place, adapters, rank)
        dense, out = place / "dense.json", place / "out"
        commands = {
            DENSE: [sys.executable, "-c", SCRIPT, str(dense), *paths],
            START_UP: [sys.executable, "-c", START, "doctor", "--help"],
        }
        for mode in modes:
            commands[f"combine --mode {mode}"] = [*ORTHO, "combine", *paths, "-o", str(out), "--mode", mode, "-q"]
        timings = run_rounds(commands, rounds, [out])
        each = {int(width): seconds for width, seconds in json.loads(dense.read_text()).items()}
    whole = sum(each[width] * count for width, count in widths.items())
    first = timings[0]
    first.seconds = [whole]
    for timing in timings:
        timing.ratio = timing.median / whole
    return timings


def _write_adapters(place: Path, count: int, rank: int) -> tuple[list[str], Counter[int]]:
    """Adapter folders with trained-looking vectors; and how many layers have which width."""
    import torch
    from safetensors.torch import save_file

    from ortho_cli.checkpoints.dialects.writing import hra_tensor_name, peft_config, peft_name

    widths = _widths()
    generator = torch.Generator().manual_seed(0)
    paths = []
    for index in range(count):
        folder = place / f"adapter-{index}"
        folder.mkdir()
        vectors = {}
        for layer, width in widths.items():
            start = torch.randn(width, rank // 2, generator=generator).repeat_interleave(2, dim=1)
            moved = start + 0.1 * torch.randn(start.shape, generator=generator)
            vectors[hra_tensor_name("peft-hra", layer)] = moved
        save_file(vectors, folder / "adapter_model.safetensors")
        config = peft_config("HRA", rank, [peft_name(layer) for layer in widths])
        (folder / "adapter_config.json").write_text(json.dumps(config))
        paths.append(str(folder))
    return paths, Counter(widths.values())


def _widths() -> dict[str, int]:
    """The 144 layers that HRA's authors adapt -> how many inputs they have."""
    from ortho_cli.checkpoints import layouts, targets
    from ortho_cli.surgery.small_sd15 import BLOCKS

    names = dict.fromkeys(layouts.sd15_layers(), (1, 1))
    found = {}
    for layer in targets.select(["sd15-control"], names, "sd15-diffusers").layers:
        width = next(width for block, width, _ in BLOCKS if layer.startswith(f"unet.{block}."))
        found[layer] = TEXT_WIDTH if layer.endswith(("attn2.to_k", "attn2.to_v")) else width
    return found
