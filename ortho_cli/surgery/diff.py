"""Compare two checkpoints tensor by tensor: names, shapes, types, and how far the values are apart.

Both are streamed in blocks of rows, so two files of any size compare in a few megabytes. Names are matched through
the layout tables: an LDM file and a diffusers folder of one model show no difference.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import isnan, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.checkpoints.layouts import canonical_shape, to_canonical
from ortho_cli.checkpoints.reading import BLOCK_BYTES, TensorReader, row_blocks, same_bits
from ortho_cli.checkpoints.store import Checkpoint, open_checkpoint
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.errors import NumericsError, UsageError

from .plan import Progress, Report

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_limit", "diff", "judge"]


def diff(
    first: str | Path,
    second: str | Path,
    *,
    fail_above: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Report what differs between two checkpoints.

    Args:
        first: any checkpoint argument; relative differences are relative to it.
        second: what it is compared with.
        fail_above: raise when a tensor differs by more than this (relative, Frobenius), or exists on one side only.
        progress: told of every byte of ``first``.

    Returns:
        A report whose ``details`` are the tensors that differ: ``status`` is ``changed``, ``shape``, ``dtype``,
        ``only in first`` or ``only in second``, with ``max_difference`` and ``relative_difference``.

    Raises:
        NumericsError: a difference above ``fail_above``.
        UsageError: ``fail_above`` is negative or NaN.
        CheckpointError: one of them cannot be read.

    Cost: one pass over both.
    """
    started = time.perf_counter()
    check_limit(fail_above)
    left, right = open_checkpoint(first), open_checkpoint(second)
    names, others = _by_canonical(left), _by_canonical(right)
    if progress is not None:
        progress.start(sum(info.nbytes for info in names.values()))
    details: list[dict[str, Any]] = []
    equal = 0
    with TensorReader() as reader, TensorReader() as other_reader:
        for name, info in names.items():
            if name not in others:
                details.append(_entry(name, info, "only in first"))
            elif canonical_shape(name, info.shape) != canonical_shape(name, others[name].shape):
                details.append({**_entry(name, info, "shape"), "other_shape": list(others[name].shape)})
            else:
                found = _compare(name, info, others[name], reader, other_reader)
                equal += found is None
                details += [found] if found is not None else []
            if progress is not None:
                progress.advance(info.nbytes)
    details += [_entry(name, others[name], "only in second") for name in others if name not in names]
    worst = max((entry.get("relative_difference", 0.0) for entry in details), default=0.0)
    statuses = [entry["status"] for entry in details]
    totals = {
        "tensors": len(names),
        "equal": equal,
        **{status.replace(" ", "_"): statuses.count(status) for status in dict.fromkeys(statuses)},
        "max_relative_difference": worst,
    }
    report = Report(
        "inspect", [left.root.name, right.root.name], [], len(details), sum(info.numel for info in names.values()),
        details, totals, [], time.perf_counter() - started,
    )  # fmt: skip
    judge(report, fail_above)
    return report


def judge(report: Report, fail_above: float | None) -> None:
    """Raise `NumericsError` where a `diff` report shows more than `fail_above`, or tensors on one side only."""
    check_limit(fail_above)
    if fail_above is None:
        return
    one_sided = [entry for entry in report.details if entry["status"] in ("only in first", "only in second", "shape")]
    if one_sided:
        raise NumericsError(f"{len(one_sided)} tensors do not correspond, first {one_sided[0]['name']}")
    if report.totals["max_relative_difference"] > fail_above:
        worst = max(report.details, key=lambda entry: float(entry.get("relative_difference", 0.0)))
        raise NumericsError(
            f"tensor {worst['name']} differs by {worst['relative_difference']:.3g}, above --fail-above {fail_above:g}"
        )


def check_limit(fail_above: float | None) -> None:
    """Refuse a `fail_above` that nothing could be measured by: negative, or NaN.

    Raises:
        UsageError: with what a limit means.
    """
    if fail_above is not None and (isnan(fail_above) or fail_above < 0):
        raise UsageError(
            f"--fail-above {fail_above:g} is no limit", hint="0 fails on any difference, 1e-3 on one of 0.1 %"
        )


def _by_canonical(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    return {to_canonical(name, checkpoint.layout): info for name, info in checkpoint.tensors.items()}


def _entry(name: str, info: TensorInfo, status: str) -> dict[str, Any]:
    return {"name": name, "shape": list(info.shape), "dtype": info.dtype, "status": status}


def _compare(
    name: str, info: TensorInfo, other: TensorInfo, reader: TensorReader, other_reader: TensorReader
) -> dict[str, Any] | None:
    """What differs between two tensors of one canonical shape; None when type and values are the same."""
    import torch

    blocks = list(row_blocks(info, block_bytes=BLOCK_BYTES // 4)) if info.shape else [None]
    if info.dtype == other.dtype and _same_bytes(info, other, blocks, reader, other_reader):
        return None
    largest, change, norm = 0.0, 0.0, 0.0
    for rows in blocks:
        a, b = _double(reader.read(info, rows)), _double(other_reader.read(other, rows))
        b = b.reshape(a.shape)
        difference = torch.where(torch.isnan(a) & torch.isnan(b) | (a == b), 0.0, a - b)
        if difference.numel():
            largest = max(largest, float(difference.abs().nan_to_num(float("inf"), float("inf")).max()))
        change += float(difference.square().sum())
        norm += float(torch.where(torch.isfinite(a), a, 0.0).square().sum())
    if largest == 0.0 and info.dtype == other.dtype:
        return None
    entry = _entry(name, info, "changed" if largest else "dtype")
    relative = sqrt(change / norm) if norm and change == change else (float("inf") if largest else 0.0)
    more = {"other_dtype": other.dtype} if info.dtype != other.dtype else {}
    return {**entry, **more, "max_difference": largest, "relative_difference": relative}


def _same_bytes(
    info: TensorInfo,
    other: TensorInfo,
    blocks: Sequence[slice | None],
    reader: TensorReader,
    other_reader: TensorReader,
) -> bool:
    """Whether two tensors of one type are bit for bit the same: the usual case, at the speed of reading."""
    return all(same_bits(reader.read(info, rows), other_reader.read(other, rows)) for rows in blocks)


def _double(tensor: Tensor) -> Tensor:
    import torch

    return torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()
