"""Write a checkpoint like another: same folders, same shards, same small files; only chosen tensors differ.

A pickled base comes out as safetensors under the names its library expects; shards stay as they were unless another
size is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ortho_cli.checkpoints.header import printable
from ortho_cli.checkpoints.index import index_names, links_out
from ortho_cli.checkpoints.store import PICKLE_SUFFIXES, WEIGHT_SUFFIXES, Checkpoint, WeightFile
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.checkpoints.writer import Piece
from ortho_cli.errors import CheckpointError, UsageError

from .plan import OutputFile

__all__ = ["Mirror", "check_output_name", "mirror", "parse_size", "small_files"]

Transform = Callable[[str, TensorInfo], Sequence[Piece]]
# The same weights in other frameworks' formats: stale after surgery, so they stay behind.
FOREIGN_WEIGHTS = (".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".tflite", ".npz", ".mlmodel", ".onnx_data")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_NAME = re.compile(r"(diffusion_pytorch_model|adapter_model|model)(?:\.([^.-]+))?(?:-\d{5}-of-\d{5})?\.safetensors")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Mirror:
    """The files of an output that follows a base."""

    files: list[OutputFile]
    copies: list[tuple[Path, str]]
    texts: dict[str, str]
    notes: list[str] = field(default_factory=list)  # what of the base is not in the output


def check_output_name(output: Path) -> None:
    """Refuse outputs that would have to be pickles.

    Raises:
        UsageError: the name ends in `.ckpt`, `.bin`, `.pt` or `.pth`.
    """
    if output.suffix in PICKLE_SUFFIXES:
        raise UsageError(
            f"ortho does not write {output.suffix} files: pickles can run code",
            hint=f"use -o {output.with_suffix('.safetensors').name}",
        )


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200MB`, `4096`.

    >>> parse_size("1.5GB")
    1500000000
    """
    upper = text.strip().upper()
    for unit, factor in UNITS.items():
        if upper.endswith(unit):
            number, scale = upper.removesuffix(unit), factor
            break
    else:
        number, scale = upper, 1
    try:
        size = int(float(number) * scale)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"not a size: {text!r}", hint="write it as 5GB or 500MB")
    return size


def mirror(
    base: Checkpoint,
    output: Path,
    transform: Transform,
    metadata: dict[str, str],
    *,
    extra: Sequence[Piece] = (),
    max_shard_bytes: int | None = None,
) -> Mirror:
    """Lay out an output like `base`, each tensor passed through `transform`.

    Args:
        base: the checkpoint to follow.
        output: `X.safetensors` for one file, any other name for a folder.
        transform: full tensor name and place -> the pieces that stand for it (none to drop it, several to add).
        metadata: added to each file's own metadata.
        extra: pieces that belong to no tensor of the base; they join the first file (of their component).
        max_shard_bytes: split anew, greedily in file order, instead of keeping the base's shards.

    Raises:
        UsageError: one file was asked for and the base is a pipeline of several components, or shards were asked for.
        CheckpointError: a small file beside the weights is a link out of the base's folder.
    """
    check_output_name(output)
    produced = [(file, _transformed(base, file, transform)) for file in base.files]
    for piece in extra:
        own = next((found for file, found in produced if piece.name.startswith(f"{file.component}.")), produced[0][1])
        own.append(piece)
    if output.suffix == ".safetensors":
        folder = output.with_suffix("").name
        if base.kind == "pipeline":
            raise UsageError(
                f"{base.root.name} is a pipeline of several components and cannot be one file in its own naming",
                hint=f"give a folder: -o {folder}; or first: ortho convert {base.root.name} --to ldm",
            )
        if max_shard_bytes is not None:
            raise UsageError(f"{output.name} is one file and cannot be split", hint=f"give a folder: -o {folder}")
        pieces = [piece for _, found in produced for piece in found]
        return Mirror([OutputFile("", pieces, _metadata(base.metadata, metadata))], [], {})
    texts: dict[str, str] = {}
    files: list[OutputFile] = []
    for group in _groups(produced):
        files += _component_files(group, metadata, max_shard_bytes, texts)
    copies, left = small_files(base, output)
    return Mirror(files, copies, texts, _left_behind(left))


def _transformed(base: Checkpoint, file: WeightFile, transform: Transform) -> list[Piece]:
    return [piece for name in file.tensors for piece in transform(name, base.tensors[name])]


def _groups(produced: list[tuple[WeightFile, list[Piece]]]) -> list[list[tuple[WeightFile, list[Piece]]]]:
    components = dict.fromkeys(file.component for file, _ in produced)
    return [[item for item in produced if item[0].component == component] for component in components]


def _component_files(
    group: list[tuple[WeightFile, list[Piece]]], metadata: dict[str, str], limit: int | None, texts: dict[str, str]
) -> list[OutputFile]:
    """The weight files of one component, and its index when they are several."""
    first = group[0][0]
    folder = first.relative.rpartition("/")[0]
    prefix = f"{folder}/" if folder else ""
    stem, variant = _stem(first)
    named = [(_safetensors_name(file), _local(pieces, file.component), file.metadata) for file, pieces in group]
    if limit is not None:
        shards = _split([piece for _, found, _ in named for piece in found], limit)
        own = {key: value for file, _ in reversed(group) for key, value in file.metadata.items()}  # the first file wins
        count, full = len(shards), f"{stem}.{variant}" if variant else stem
        named = [
            (f"{full}.safetensors" if count == 1 else f"{full}-{number:05d}-of-{count:05d}.safetensors", shard, own)
            for number, shard in enumerate(shards, 1)
        ]
    if len(named) > 1 or _SHARD.search(named[0][0]):  # a single shard is found through its index, too
        everything = [(piece, name) for name, pieces, _ in named for piece in pieces]
        weight_map = {piece.name: name for piece, name in everything}
        repeated = next((piece.name for piece, name in everything if weight_map[piece.name] != name), None)
        if repeated is not None:
            raise CheckpointError(f"two tensors of the output have the name {printable(repeated)!r}")
        total = sum(piece.nbytes for piece, _ in everything)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        texts[prefix + index_names(stem, variant)[0]] = json.dumps(index, indent=2) + "\n"
    return [OutputFile(prefix + name, pieces, _metadata(own, metadata)) for name, pieces, own in named]


def _local(pieces: Iterable[Piece], component: str) -> list[Piece]:
    """Pieces under the names they have inside their component's own file."""
    if not component:
        return list(pieces)
    return [
        Piece(piece.name.removeprefix(f"{component}."), piece.dtype, piece.shape, piece.source, piece.produce)
        for piece in pieces
    ]


def _stem(file: WeightFile) -> tuple[str, str | None]:
    """What the weights of a folder are called, `model` or `diffusion_pytorch_model`, and their variant, if any."""
    match = _NAME.fullmatch(_safetensors_name(file))
    return (match[1], match[2]) if match else ("model", None)


def _safetensors_name(file: WeightFile) -> str:
    """The file's name in the output: its own, or the safetensors name that a pickle's library expects."""
    if not file.relative:
        return "model.safetensors"
    name = Path(file.relative).name
    if file.format == "pickle":
        stem = name.rpartition(".")[0]
        name = f"{stem.removeprefix('pytorch_') if stem.startswith('pytorch_model') else stem}.safetensors"
    return name


def _split(pieces: Sequence[Piece], limit: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if shards[-1] and filled + piece.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += piece.nbytes
    return shards


def small_files(base: Checkpoint, output: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    """Configurations, tokenizers, cards: everything but weights, their indices, hidden files and the output itself.

    Returns:
        The files to copy, and the weight files beside those that were opened: other variants and other formats.
    """
    if base.kind == "file" or not base.root.is_dir():
        return [], []
    found, left, inside = [], [], output.resolve()
    opened = {file.path.resolve() for file in base.files}
    for path in sorted(base.root.rglob("*")):
        relative = path.relative_to(base.root)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not path.is_file() or path.parent.resolve().is_relative_to(inside):
            continue
        if path.suffix in (*WEIGHT_SUFFIXES, *FOREIGN_WEIGHTS):
            if path.resolve() not in opened:
                left.append(relative.as_posix())
            continue
        if ".index." in path.name and path.suffix == ".json":
            continue
        if links_out(path, base.root):  # a stranger's folder must not lead a copy of our files into the output
            raise CheckpointError(
                f"{printable(relative.as_posix())} is a link out of the folder", hint="put the file itself in its place"
            )
        found.append((path, relative.as_posix()))
    return found, left


def _left_behind(names: list[str]) -> list[str]:
    """One note on the weight files that the output lacks, or none."""
    if not names:
        return []
    shown = ", ".join(printable(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    count = "1 other weight file" if len(names) == 1 else f"{len(names)} other weight files"
    return [f"{count} of the base left behind: {shown}"]


def _metadata(own: dict[str, str], ours: dict[str, str]) -> dict[str, str]:
    return {"format": "pt", **{key: value for key, value in own.items() if not key.startswith("ortho.")}, **ours}
