"""A writer that is killed at any moment leaves the old output or the new one, whole; the next one cleans up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ortho_cli

SCRIPT = Path(__file__).with_name("kill_rounds.py")


@pytest.mark.parametrize(
    ("kind", "size", "kills"),
    [
        ("file", 60_000_000, 50),  # seconds of writing: the signal comes while bytes are copied and computed
        ("folder", 20_000_000, 50),
        ("file", 4_000, 100),  # nothing to write: the signal comes around the fsync and the rename
        ("folder", 4_000, 100),
    ],
)
def test_the_output_is_old_or_new(kind: str, size: int, kills: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, kind, str(size), str(kills)],
        capture_output=True, text=True, check=True, timeout=250,
        env={"PYTHONPATH": str(Path(ortho_cli.__file__).parents[1])},
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["broken"] == 0
    assert found["old"] + found["new"] == kills
    assert found["old"] > kills // 4
    assert found["partials"] > kills // 4
    assert found["left"] == ["a.safetensors", "b.safetensors", "out" if kind == "folder" else "out.safetensors"]
    assert found["same"]


def _as_at_a_terminal() -> None:
    """A background job's children would ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("signal_sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_command_that_is_interrupted(
    signal_sent: signal.Signals, code: int, tmp_path: Path, save: Callable[..., Path]
) -> None:
    base = save(tmp_path / "base.safetensors", {f"layer.{n}.weight": torch.ones(1000, 1000) for n in range(50)})
    output = save(tmp_path / "out.safetensors", {"old": torch.ones(1)})
    old = output.read_bytes()
    command = [sys.executable, "-m", "ortho_cli", "convert", base, "--to", "safetensors", "-o", output, "--force", "-q"]
    interrupted = False
    for _ in range(20):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=_as_at_a_terminal)
        while process.poll() is None and not list(tmp_path.glob(".out*")):
            time.sleep(0.001)
        process.send_signal(signal_sent)
        _, told = process.communicate(timeout=60)
        if process.returncode:
            assert process.returncode == code
            assert "Traceback" not in told
            assert output.read_bytes() == old
            interrupted = True
            break
        output.write_bytes(old)  # it was quicker than the signal: once more
    assert interrupted
    if signal_sent == signal.SIGINT:  # nothing can be done against the other, but by the next command
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "out.safetensors"]
    subprocess.run(command, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "out.safetensors"]
    assert output.stat().st_size >= base.stat().st_size
