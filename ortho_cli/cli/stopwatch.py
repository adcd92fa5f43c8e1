"""Whole commands, timed in shuffled rounds, with the peak memory the system saw: the measure of `ortho bench`."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ortho_cli.checkpoints.writer import write_file
from ortho_cli.errors import CheckpointError

__all__ = ["START_UP", "Timing", "measure_surgery", "run_once", "run_rounds"]

COPY = "copy + fsync"
START_UP = "start-up, torch included"  # what a verb costs on a file without tensors
# Runs in a fresh interpreter, as whoever merges with plain safetensors would write it.
LOAD_SAVE = (
    "import sys; from safetensors.torch import load_file, save_file; "
    "save_file(load_file(sys.argv[1]), sys.argv[2], metadata={'format': 'pt'})"
)
COPY_SYNC = (
    "import os, shutil, sys; shutil.copyfile(sys.argv[1], sys.argv[2]); "
    "f = os.open(sys.argv[2], os.O_RDWR); os.fsync(f)"
)
START = "import torch; from ortho_cli.__main__ import main; main()"
ORTHO = (sys.executable, "-m", "ortho_cli")


@dataclass
class Timing:
    """Seconds of each round and the largest peak memory of one command."""

    name: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    ratio: float = 1.0

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def lowest(self) -> float:
        """Fastest round."""
        return min(self.seconds)

    @property
    def highest(self) -> float:
        """Slowest round."""
        return max(self.seconds)

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        return {"name": self.name, "median_seconds": self.median, "ratio": self.ratio, "seconds": self.seconds,
                "peak_bytes": self.peak_bytes}  # fmt: skip


def measure_surgery(
    checkpoint: Path, *, rounds: int, targets: Sequence[str] = (), folder: Path | None = None
) -> list[Timing]:
    """Time `add-hra` (both forms), `merge` and `inspect` against a copy of the file and against load + save.

    Raises:
        CheckpointError: not a single safetensors file.
    """
    if checkpoint.suffix != ".safetensors" or not checkpoint.is_file():
        raise CheckpointError(f"{checkpoint} is not a .safetensors file", hint="ortho bench surgery FILE.safetensors")
    choice = [word for target in targets for word in ("--targets", target)]
    with tempfile.TemporaryDirectory(dir=folder or checkpoint.absolute().parent, prefix=".ortho-bench-") as scratch:
        place = Path(scratch)
        out, adapter, source = str(place / "out.safetensors"), str(place / "adapter"), str(checkpoint)
        run_once([*ORTHO, "add-hra", source, "-o", adapter, "-q", *choice])
        empty = str(place / "empty.safetensors")
        write_file(Path(empty), [], {"format": "pt"})
        commands = {
            COPY: [sys.executable, "-c", COPY_SYNC, source, out],
            START_UP: [sys.executable, "-c", START, "inspect", empty, "--json"],
            "ortho inspect": [*ORTHO, "inspect", source],
            "ortho add-hra --as adapter": [*ORTHO, "add-hra", source, "-o", str(place / "folder"), "-q", *choice],
            "ortho add-hra --as checkpoint": [*ORTHO, "add-hra", source, "-o", out, "-q", *choice],
            "ortho merge": [*ORTHO, "merge", source, adapter, "-o", out, "-q"],
            "load_file + save_file": [sys.executable, "-c", LOAD_SAVE, source, out],
        }
        return run_rounds(commands, rounds, [Path(out), place / "folder"])


def run_rounds(commands: dict[str, list[str]], rounds: int, outputs: Sequence[Path]) -> list[Timing]:
    """Run every command `rounds` times in shuffled order; ratios are against the first one's median.

    Outputs are removed and the disk is settled before each run, so that none pays for the one before it.
    """
    timings = {name: Timing(name) for name in commands}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(commands), len(commands)):
            for output in outputs:
                shutil.rmtree(output, ignore_errors=True) if output.is_dir() else output.unlink(missing_ok=True)
            os.sync()
            seconds, peak = run_once(commands[name])
            timings[name].seconds.append(seconds)
            timings[name].peak_bytes = max(timings[name].peak_bytes, peak)
    first = next(iter(timings.values())).median
    for timing in timings.values():
        timing.ratio = timing.median / first
    return list(timings.values())


# The system counts into a child's peak memory what its parent held when it forked; this parent holds next to nothing.
_LAUNCH = """
import os, sys, time
start = time.perf_counter()
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
seconds, code = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
with open(sys.argv[1], "w") as file:
    file.write(f"{seconds} {usage.ru_maxrss} {code}")
"""


def run_once(command: Sequence[str]) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of one command.

    Raises:
        CheckpointError: it failed; the message ends with what it said.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".txt") as result:
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCH, result.name, *command]
        done = subprocess.run(launcher, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True)
        seconds, peak, code = result.read().split()
    if int(code):
        talk = done.stderr.decode(errors="replace").strip()[-300:]
        raise CheckpointError(f"{' '.join(command[:4])} failed: {talk}")
    return float(seconds), int(peak) * (1 if sys.platform == "darwin" else 1024)
