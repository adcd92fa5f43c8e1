"""Orthogonality in deep networks: put it into a checkpoint, train with it, measure it, take it out again.

The table of contents of the public Python API; a name's module, and torch, is imported when the name is first used.

>>> import ortho_cli as ortho
>>> ortho.parse_hub_id("org/name").repo
'org/name'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module that defines it
_API = {
    "CheckpointError": "errors",
    "NumericsError": "errors",
    "OrthoError": "errors",
    "OutputError": "errors",
    "RecipeError": "errors",
    "TargetError": "errors",
    "UsageError": "errors",
    "Adapter": "checkpoints.adapters",
    "Checkpoint": "checkpoints.store",
    "Report": "surgery.plan",
    "TensorReader": "checkpoints.reading",
    "Whitening": "methods.whitening",
    "add_adapter": "methods.add",
    "add_hra": "surgery.add_hra",
    "combine": "surgery.combine",
    "convert": "surgery.convert",
    "diff": "surgery.diff",
    "disable_adapter": "methods.adapter_layer",
    "extract": "surgery.extract",
    "factorize": "surgery.factorize",
    "factorize_": "methods.factorized_model",
    "frobenius_decay_": "methods.frobenius_decay",
    "gor_penalty": "methods.gor",
    "inspect": "surgery.inspect",
    "load_adapter": "methods.load",
    "load_factorized": "methods.load_factorized",
    "merge": "surgery.merge",
    "nog_": "methods.nog",
    "oialr": "methods.oialr_model",
    "olr": "linalg.olr",
    "open_checkpoint": "checkpoints.store",
    "orthogonality_penalty": "methods.orthogonality",
    "parse_hub_id": "checkpoints.hub",
    "read_adapter": "checkpoints.adapters",
    "save_adapter": "methods.adapter_folder",
    "set_strength": "methods.strength",
    "stability": "linalg.subspace",
    "unmerge": "surgery.unmerge",
}

__all__ = [
    "Adapter", "Checkpoint", "CheckpointError", "NumericsError", "OrthoError", "OutputError", "RecipeError", "Report",
    "TargetError", "TensorReader", "UsageError", "Whitening", "add_adapter", "add_hra", "combine", "convert", "diff",
    "disable_adapter", "extract", "factorize", "factorize_", "frobenius_decay_", "gor_penalty", "inspect",
    "load_adapter", "load_factorized", "merge", "nog_", "oialr", "olr", "open_checkpoint", "orthogonality_penalty",
    "parse_hub_id", "read_adapter", "save_adapter", "set_strength", "stability", "unmerge",
]  # fmt: skip

if TYPE_CHECKING:
    from .checkpoints.adapters import Adapter, read_adapter
    from .checkpoints.hub import parse_hub_id
    from .checkpoints.reading import TensorReader
    from .checkpoints.store import Checkpoint, open_checkpoint
    from .errors import CheckpointError, NumericsError, OrthoError, OutputError, RecipeError, TargetError, UsageError
    from .linalg.olr import olr
    from .linalg.subspace import stability
    from .methods.adapter_folder import save_adapter
    from .methods.adapter_layer import disable_adapter
    from .methods.add import add_adapter
    from .methods.factorized_model import factorize_
    from .methods.frobenius_decay import frobenius_decay_
    from .methods.gor import gor_penalty
    from .methods.load import load_adapter
    from .methods.load_factorized import load_factorized
    from .methods.nog import nog_
    from .methods.oialr_model import oialr
    from .methods.orthogonality import orthogonality_penalty
    from .methods.strength import set_strength
    from .methods.whitening import Whitening
    from .surgery.add_hra import add_hra
    from .surgery.combine import combine
    from .surgery.convert import convert
    from .surgery.diff import diff
    from .surgery.extract import extract
    from .surgery.factorize import factorize
    from .surgery.inspect import inspect
    from .surgery.merge import merge
    from .surgery.plan import Report
    from .surgery.unmerge import unmerge


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'ortho_cli' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ortho_cli.{_API[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
