"""A training step of the real Stable Diffusion 1.5 fits into the memory of a small machine."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="the networks are diffusers' own")

SCRIPT = Path(__file__).parent / "full_size_step.py"
GIB = {"fp32": 8.0, "bf16": 5.0}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", GIB)
def test_peak_memory(precision: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), precision], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["trained"], found["layers"], found["moved"]) == (895_488, 144, 144)
    assert all(math.isfinite(loss) for loss in found["losses"])
    assert found["peak"] <= GIB[precision]
