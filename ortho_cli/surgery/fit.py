"""Whether an adapter belongs to a base: shapes, float types, and the fingerprint of the weights it was made for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

from ortho_cli.checkpoints.adapters import Adapter, base_bound, is_adapter, read_adapter
from ortho_cli.checkpoints.fingerprint import base_fingerprint
from ortho_cli.checkpoints.store import Checkpoint, open_checkpoint
from ortho_cli.checkpoints.tensors import FLOAT_DTYPES, TensorInfo
from ortho_cli.errors import CheckpointError, TargetError

from .hra_repo import has_hra

__all__ = [
    "check_base",
    "check_floats",
    "check_residuals",
    "check_tensors",
    "input_files",
    "open_all",
    "refuse_adapter",
]


def open_all(base: str | Path, adapters: Sequence[str | Path]) -> tuple[Checkpoint, list[Adapter]]:
    """Open a base and its adapters; the base first, so that an adapter in its place is called one.

    Raises:
        TargetError: the base is an adapter.
        CheckpointError: one of them cannot be read.
    """
    opened = open_checkpoint(base)
    refuse_adapter(opened, "the base comes first: ortho merge BASE ADAPTER -o OUT")
    return opened, [read_adapter(adapter) for adapter in adapters]


def refuse_adapter(checkpoint: Checkpoint, hint: str) -> None:
    """Refuse an adapter where a checkpoint with weights of its own is wanted.

    Raises:
        TargetError: with what to do instead.
    """
    if is_adapter(checkpoint) and not has_hra(checkpoint):
        raise TargetError(f"{checkpoint.root.name} is an adapter, without the weights it acts on", hint=hint)


def check_base(
    base: Checkpoint,
    adapter: Adapter,
    native: dict[str, str],
    force: bool,
    note: Callable[[str], None],
    resized: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Refuse layers that do not fit, and a base-bound adapter on another base (`force` turns that into a note).

    Args:
        base: the checkpoint to change.
        adapter: what will act on it.
        native: the adapter's layers -> the base's.
        force: accept another base.
        note: receives what the report should say.
        resized: tensors of the base that earlier adapters replaced -> their new shapes.

    Raises:
        CheckpointError: a shape does not fit, or the base's fingerprint is not the one the adapter was made for.
        TargetError: a weight is no float.
    """
    # An embedding may be resized and adapted: the layer then acts on the weight that the adapter brings.
    brought = {name.removesuffix(".weight"): info.shape for name, info in adapter.replacements.items()}
    for name, layer in adapter.layers.items():
        weight = base.weight(native[name])
        if weight.dtype not in FLOAT_DTYPES:
            raise TargetError(
                f"layer {name} of {base.root.name} is stored as {weight.dtype}: its true values are not in the file",
                hint="use the base as it was before it was quantised",
                where=str(weight.path),
            )
        reason = layer.expects(brought.get(name, (resized or {}).get(weight.name, weight.shape)))
        if reason is not None:
            raise CheckpointError(
                f"layer {name} of the adapter does not fit {base.root.name}: {reason}",
                hint="was it trained on another model? compare: ortho inspect ADAPTER --layers",
                where=str(adapter.path),
            )
    recorded = adapter.metadata.get("ortho.base_fingerprint")
    bound = base_bound(adapter)
    if recorded is None:
        if bound:
            note(f"{adapter.path.name} is right on its own base only, and does not say which that is")
        return
    if recorded == base_fingerprint(base, native.values()):
        return
    if bound and not force:
        raise CheckpointError(
            f"{adapter.path.name} is only right on the base it was made for; {base.root.name} is another "
            f"(fingerprint differs from {recorded[:16]})",
            hint="merge it into its own base, or accept the error with --force",
            where=str(adapter.path),
        )
    note(
        f"{adapter.path.name} was made for another base"
        + (" (forced)" if bound else "; a rotation and an ordinary LoRA act on any fine-tune of it")
    )


def check_residuals(adapters: Sequence[Adapter], force: bool, note: Callable[[str], None]) -> None:
    """Refuse what `extract --kind both` found beside a rotation, unless that rotation acts directly before it.

    Args:
        adapters: in the order in which they act.
        force: accept it alone (this turns the error into a note).
        note: receives what the report should say.

    Raises:
        CheckpointError: with the order that is right.
    """
    for before, adapter in zip((None, *adapters), adapters, strict=False):
        wanted = adapter.method.get("tuned") if adapter.method.get("form") == "residual" else None
        rotation = before.method if before is not None else {}
        if wanted is None or (rotation.get("name") == "hra" and rotation.get("tuned") == wanted):
            continue  # what `factorize` leaves is right on its own base, without a rotation
        reason = (
            f"{adapter.path.name} is what a rotation leaves, and the rotation it was extracted with is not before it"
        )
        if not force:
            raise CheckpointError(
                reason,
                hint="ortho merge BASE ADAPTER/rotation ADAPTER/residual -o OUT, or accept the error with --force",
                where=str(adapter.path),
            )
        note(f"{reason} (forced)")


def check_tensors(
    base: Checkpoint, adapter: Adapter, names: dict[str, str], resized: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """Refuse trained rows and differences that do not fit the base's tensors.

    Args:
        base: the checkpoint to change.
        adapter: what will act on it.
        names: whole tensors of the adapter -> the base's.
        resized: tensors of the base that earlier adapters replaced -> their new shapes.

    Raises:
        CheckpointError: a tensor is not in the base, or has another shape there.
    """
    changed = {name: None for name in (*adapter.row_replacements, *adapter.additions)}
    for name in changed:
        if name not in names:
            raise CheckpointError(f"the adapter changes {name}, which is not in the base", where=str(adapter.path))
        shape = (resized or {}).get(names[name], base.tensors[names[name]].shape)
        if name in adapter.replacements:
            shape = adapter.replacements[name].shape
        if name in adapter.row_replacements:
            rows, values = adapter.row_replacements[name]
            fits = max(rows, default=-1) < shape[0] and prod(values.shape[1:]) == prod(shape[1:])
        else:
            values = adapter.additions[name].tensor
            fits = values.shape[:1] == shape[:1] and values.numel == prod(shape)
        if not fits:
            raise CheckpointError(
                f"tensor {values.name} of shape {values.shape} does not fit {name} of the base, which is {shape}",
                where=str(adapter.path),
            )


def check_floats(info: TensorInfo, values: Iterable[TensorInfo]) -> None:
    """Refuse to compute with anything but float types: packed or integer values would become other numbers.

    Args:
        info: the base's tensor.
        values: the adapter's tensors that replace it, in part or whole, or are added to it.

    Raises:
        CheckpointError: one of them is no float.
    """
    for value in values:
        if value.dtype not in FLOAT_DTYPES or info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"tensor {value.name} of the adapter is {value.dtype}, {info.name} of the base is {info.dtype}: "
                "only float types are converted into each other",
                where=str(value.path),
            )


def input_files(base: Checkpoint | None, adapters: Iterable[Adapter] = ()) -> list[Path]:
    """Every weight file a plan reads, each once."""
    paths = [file.path for file in base.files] if base is not None else []
    for adapter in adapters:
        tensors = [info for layer in adapter.layers.values() for info in layer.tensors.values()]
        tensors += adapter.replacements.values()
        tensors += [info for _, info in adapter.row_replacements.values()]
        tensors += [addition.tensor for addition in adapter.additions.values()]
        paths += sorted({info.path for info in tensors})
    return list(dict.fromkeys(paths))
