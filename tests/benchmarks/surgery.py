"""Surgery at true scale: Stable Diffusion 1.5 with random weights, every verb against copying the file.

    python tests/benchmarks/surgery.py [--folder DIR] [--rounds 5] [--dtype F32|F16]

Writes the 1,145 real names at their real shapes (4.3 GB in F32), runs `ortho bench surgery` on it, then times
`ortho --help`. Ratios are to copy + fsync in the same shuffled rounds; the budgets are those of the design.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from ortho_cli.checkpoints.writer import Piece, computed, write_file
from ortho_cli.cli.stopwatch import START_UP, measure_surgery

KEYS = Path(__file__).parent.parent / "data" / "sd15_ldm_keys.json"
# command -> (largest ratio to the copy, largest peak in MB of 10^6 bytes); the adapter's ratio is after start-up
BUDGETS = {
    "ortho inspect": (None, 300),
    "ortho add-hra --as adapter": (0.05, 300),
    "ortho add-hra --as checkpoint": (1.4, 400),
    "ortho merge": (1.7, 400),
}
HELP_SECONDS = 0.3


def true_scale(path: Path, dtype: str) -> None:
    """An architecture-exact v1-5 file with seeded random weights."""
    rng = np.random.default_rng(0)

    def piece(name: str, kind: str, shape: list[int]) -> Piece:
        def produce() -> Iterator[memoryview]:
            scale = max(1, prod(shape[1:])) ** -0.5
            if kind in ("I64", "I32"):
                values = np.zeros(shape, {"I64": np.int64, "I32": np.int32}[kind])
            else:
                values = (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(
                    {"F32": np.float32, "F16": np.float16}[dtype]
                )
            yield memoryview(np.ascontiguousarray(values).reshape(-1)).cast("B")

        return computed(name, kind if kind in ("I64", "I32") else dtype, shape, produce)

    keys = json.loads(KEYS.read_text())
    write_file(path, [piece(name, kind, shape) for name, (kind, shape) in keys.items()], {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="needs three times the file's size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["F32", "F16"], default="F32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix=".surgery-") as scratch:
        checkpoint = Path(scratch) / "v1-5.safetensors"
        true_scale(checkpoint, options.dtype)
        print(f"{checkpoint.stat().st_size:,} bytes, {options.rounds} shuffled rounds")
        timings = {timing.name: timing for timing in measure_surgery(checkpoint, rounds=options.rounds)}
    start_up = timings[START_UP].ratio
    for name, timing in timings.items():
        limit, megabytes = BUDGETS.get(name, (None, None))
        ratio = timing.ratio - start_up if name.endswith("--as adapter") else timing.ratio
        peak = timing.peak_bytes / 1e6
        within = (limit is None or ratio <= limit) and (megabytes is None or peak <= megabytes)
        verdict = "" if megabytes is None else ("within" if within else "OVER") + f" ({limit or '-'} x, {megabytes} MB)"
        spread = f"[{timing.lowest:.1f} - {timing.highest:.1f}]"
        print(f"{name:32} {timing.median:7.2f} s  {ratio:5.2f} x copy  {spread}  {peak:5.0f} MB  {verdict}")
    seconds = []
    for _ in range(2 * options.rounds + 1):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ortho_cli", "--help"], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    print(f"{'ortho --help':32} {median:7.2f} s  {'within' if median <= HELP_SECONDS else 'OVER'} ({HELP_SECONDS} s)")


if __name__ == "__main__":
    main()
