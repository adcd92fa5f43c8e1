"""What an opened checkpoint is: named tensors, each a byte range of a file, and the files they lie in.

Opening one, from whatever a user may type, is `store.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .tensors import TensorInfo

__all__ = ["Checkpoint", "WeightFile"]


@dataclass(frozen=True)
class WeightFile:
    """One weight file of a checkpoint."""

    path: Path
    relative: str  # its place below the checkpoint's root, "" for a checkpoint that is one file
    component: str  # "unet" in a pipeline, else ""
    format: str  # "safetensors" or "pickle"
    metadata: dict[str, str]
    tensors: tuple[str, ...]  # full names, in the order of their bytes


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and what else is known of where they came from.

    `kind` is `file`, `folder` (one component, sharded or not), `pipeline` (several) or `adapter`. `config` is the
    folder's `config.json` or `adapter_config.json`. Names are in byte order of the files.
    """

    source: str
    root: Path
    kind: str
    files: tuple[WeightFile, ...]
    tensors: dict[str, TensorInfo]
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def metadata(self) -> dict[str, str]:
        """The safetensors metadata of all files together (the first file wins)."""
        merged: dict[str, str] = {}
        for file in self.files:
            merged = {**file.metadata, **merged}
        return merged

    @cached_property
    def layout(self) -> str:
        """The naming its tensors follow, as `layouts.detect` finds it."""
        from .factored import whole_shapes
        from .layouts import detect

        return detect(whole_shapes(self))

    @property
    def format(self) -> str:
        """`safetensors`, `pickle`, or `mixed`."""
        formats = {file.format for file in self.files}
        return formats.pop() if len(formats) == 1 else "mixed"

    def layers(self) -> dict[str, tuple[int, ...]]:
        """Layer name -> weight shape, for every `.weight` of two or more dimensions that lies outside the EMA copy.

        A layer that holds a Householder adapter (`X.fixed_linear.weight`) is named `X`.
        """
        found = {}
        for name, info in self.tensors.items():
            if name.endswith(".weight") and len(info.shape) >= 2 and not name.startswith("model_ema."):
                found[name.removesuffix(".weight").removesuffix(".fixed_linear")] = info.shape
        return found

    def weight(self, layer: str) -> TensorInfo:
        """The weight tensor of a layer named by `layers()`."""
        plain = self.tensors.get(f"{layer}.weight")
        return plain if plain is not None else self.tensors[f"{layer}.fixed_linear.weight"]
