"""What a checkpoint or an adapter is, from its headers: format, naming, components, sizes, the adapter in it."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from ortho_cli.checkpoints.adapters import Adapter, adapter_of, base_bound, is_adapter
from ortho_cli.checkpoints.factored import FactoredLayer, factored_layers
from ortho_cli.checkpoints.fingerprint import base_fingerprint
from ortho_cli.checkpoints.layouts import LayerIndex, to_canonical
from ortho_cli.checkpoints.store import PICKLE_SUFFIXES, Checkpoint, open_checkpoint
from ortho_cli.errors import CheckpointError, TargetError, UsageError

from .hra_repo import has_hra
from .plan import Report

__all__ = ["inspect", "inspect_globals"]


def inspect(source: str | Path, *, base: str | Path | None = None, layers: bool = False) -> Report:
    """Describe a checkpoint or adapter without reading a tensor.

    Args:
        source: any checkpoint argument.
        base: for an adapter: whether it belongs to this base (reads 8 kB a layer).
        layers: list every layer, not only totals.

    Returns:
        A report: ``totals`` has format, layout, components, dtypes, and ``adapter`` or ``factors`` where there are
        any; ``details`` the layers, where asked for.

    Raises:
        CheckpointError: unreadable or malformed.
        UsageError: a base was given for something that is no adapter.

    Cost: one read of each header.
    """
    started = time.perf_counter()
    checkpoint = open_checkpoint(source)
    infos = checkpoint.tensors.values()
    totals: dict[str, Any] = {
        "format": checkpoint.format,
        "kind": checkpoint.kind,
        "layout": checkpoint.layout,
        "files": len(checkpoint.files),
        "tensors": len(checkpoint.tensors),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": _dtypes(checkpoint),
        "components": _components(checkpoint),
    }
    adapter = adapter_of(checkpoint) if is_adapter(checkpoint) else None
    if adapter is not None:
        totals["adapter"] = _adapter(adapter)
    if base is not None:
        if adapter is None:
            raise UsageError("--base is for adapters", hint="to compare two checkpoints: ortho inspect A --diff B")
        totals["adapter"]["fits_base"] = _fits(adapter, open_checkpoint(base))
    factored = factored_layers(checkpoint)
    if factored:
        totals["factors"] = _factors(factored)
    own = {key: text for key, text in checkpoint.metadata.items() if key.startswith("ortho.")}
    if own:
        totals["made_by"] = own
    if adapter is not None and not has_hra(checkpoint):
        found = _adapter_layers(adapter)
    else:  # the weights' own, also where some of them hold reflections
        found = [*_layers(checkpoint), *_factored(factored)]
    return Report(
        command="inspect",
        inputs=[checkpoint.root.name],
        outputs=[],
        layers=len(found),
        parameters=sum(info.numel for info in infos),
        details=found if layers else [],
        totals=totals,
        notes=list(adapter.notes if adapter is not None else checkpoint.notes),
        seconds=time.perf_counter() - started,
    )


def inspect_globals(source: str | Path) -> Report:
    """Every global a pickled checkpoint would import, read from its opcodes; nothing of it runs.

    Raises:
        UsageError: the file is no pickle.
    """
    from ortho_cli.checkpoints.pickles import scan_globals

    started = time.perf_counter()
    path = Path(source).expanduser()
    if path.suffix not in PICKLE_SUFFIXES:
        raise UsageError(f"{path.name} is no pickled checkpoint; --globals is for {' '.join(PICKLE_SUFFIXES)}")
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}")
    found = [{"name": name} for name in scan_globals(path)]
    return Report("inspect", [path.name], [], 0, 0, found, {"globals": len(found)}, [], time.perf_counter() - started)


def _dtypes(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    tensors: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        tensors[info.dtype] += 1
        size[info.dtype] += info.nbytes
    return {dtype: {"tensors": tensors[dtype], "bytes": size[dtype]} for dtype in sorted(tensors)}


def _components(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Tensors and parameters by part: the pipeline's components, or the parts an LDM file names by prefix."""
    found: dict[str, dict[str, int]] = {}
    for name, info in checkpoint.tensors.items():
        part = _part(name, checkpoint.layout)
        entry = found.setdefault(part, {"tensors": 0, "parameters": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["parameters"] += info.numel
        entry["bytes"] += info.nbytes
    return found


def _part(name: str, layout: str) -> str:
    if name.startswith("cond_stage_model."):  # its position ids have no name in diffusers
        return "text_encoder"
    part, dot, _ = to_canonical(name, layout).partition(".")
    return part if dot else ("(buffers)" if layout == "sd15-ldm" else "(top level)")


def _layers(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    found = []
    for layer, shape in checkpoint.layers().items():
        canonical = to_canonical(layer, checkpoint.layout)
        entry: dict[str, Any] = {
            "name": layer,
            "shape": list(shape),
            "dtype": checkpoint.weight(layer).dtype,
            "parameters": checkpoint.weight(layer).numel,
        }
        found.append({**entry, "canonical": canonical} if canonical != layer else entry)
    return found


def _factored(factored: dict[str, FactoredLayer]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "shape": list(layer.view.shape),
            "dtype": layer.u.dtype,
            "rank": layer.rank,
            "parameters": layer.u.numel + layer.vt.numel,
        }
        for name, layer in factored.items()
    ]


def _factors(factored: dict[str, FactoredLayer]) -> dict[str, Any]:
    """What factors save."""
    return {
        "layers": len(factored),
        "ranks": [min(layer.rank for layer in factored.values()), max(layer.rank for layer in factored.values())],
        "parameters": sum(layer.u.numel + layer.vt.numel for layer in factored.values()),
        "dense_parameters": sum(layer.view.parameters for layer in factored.values()),
    }


def _adapter(adapter: Adapter) -> dict[str, Any]:
    ranks = Counter(layer.rank for layer in adapter.layers.values() if layer.rank is not None)
    return {
        "dialect": adapter.dialect,
        "kind": adapter.kind,
        "layers": len(adapter.layers),
        "parameters": sum(layer.parameters for layer in adapter.layers.values()),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "whole_tensors": len(adapter.replacements) + len(adapter.row_replacements) + len(adapter.additions),
        "base_bound": base_bound(adapter),
        "base_fingerprint": adapter.metadata.get("ortho.base_fingerprint"),
    }


def _adapter_layers(adapter: Adapter) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "kind": layer.kind,
            "shape": [list(info.shape) for role, info in layer.tensors.items() if role != "alpha"],
            "rank": layer.rank,
            "parameters": layer.parameters,
        }
        for name, layer in adapter.layers.items()
    ]


def _fits(adapter: Adapter, base: Checkpoint) -> dict[str, Any]:
    """Whether names, shapes and fingerprint of an adapter belong to a base."""
    try:
        native = LayerIndex(base.layers(), base.layout).resolve_all(list(adapter.layers))
    except TargetError as error:
        return {"base": base.root.name, "names": False, "shapes": None, "fingerprint": None, "reason": error.message}
    misfits = [
        f"{name}: {reason}"
        for name, layer in adapter.layers.items()
        if (reason := layer.expects(base.weight(native[name]).shape)) is not None
    ]
    recorded = adapter.metadata.get("ortho.base_fingerprint")
    same = None if recorded is None else recorded == base_fingerprint(base, native.values())
    reason = misfits[0] if misfits else ("no fingerprint is recorded in the adapter" if same is None else None)
    return {"base": base.root.name, "names": True, "shapes": not misfits, "fingerprint": same, "reason": reason}
