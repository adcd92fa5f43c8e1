"""Which pictures a folder holds and what they show: class folders, Tiny-ImageNet's layout, or a `metadata.jsonl`.

Classes are numbered in the order of their sorted names, as on the hub and in every published ImageNet model.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ortho_cli.errors import RecipeError

from .image_specs import Split

__all__ = [
    "METADATA", "SPLIT_FOLDERS", "Listing", "class_folders", "every_picture", "lines_of", "metadata_listing",
    "split_folder", "tiny_imagenet",
]  # fmt: skip

SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "eval": ("val", "valid", "validation", "test", "eval"),
}
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Listing:
    """Pictures of one split: files relative to a root, a class number for each, and the names of the classes."""

    root: Path
    files: list[str]
    labels: list[int]
    classes: tuple[str, ...]


def split_folder(folder: Path, split: Split) -> Path | None:
    """The folder of a split below a set's folder; None where there is none."""
    return next((path for name in SPLIT_FOLDERS[split] if (path := folder / name).is_dir()), None)


def every_picture(root: Path, *, deep: bool = True) -> list[str]:
    """The picture files in a folder and, where `deep`, below it, relative to it and sorted; no hidden ones."""
    found: list[str] = []
    for here, folders, names in os.walk(root):
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
        found += [(Path(here) / name).relative_to(root).as_posix() for name in names if _is_picture(name)]
    return sorted(found)


def lines_of(path: Path) -> list[str]:
    """The lines of a text file, without the mark of its encoding that some editors put in front.

    Only line feeds and carriage returns end one: a caption may hold other separators.

    Raises:
        RecipeError: it is not UTF-8; with the line.
    """
    content = path.read_bytes()
    try:
        return [line.rstrip("\n") for line in io.StringIO(content.decode("utf-8-sig"), newline=None)]
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise RecipeError("it is not UTF-8 text", hint="save it as UTF-8", where=f"{path}:{number}") from error


def class_folders(root: Path, classes: Sequence[str] | None = None) -> Listing:
    """List `root/<class>/*`, and below it `<class>/images/*` as Tiny-ImageNet has it.

    Args:
        root: of one split.
        classes: names that another split gave; this one may have fewer, not others.

    Raises:
        RecipeError: no class folders, one without pictures (where it names the classes), or one of no known class.
    """
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    names = list(classes) if classes is not None else found
    if not found:
        raise RecipeError("no class folders in it", hint="expected one folder a class", where=str(root))
    strange = sorted(set(found) - set(names))
    if strange:
        raise RecipeError(
            f"class folder {strange[0]!r} is not among the {len(names)} training classes", where=str(root)
        )
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        inside = _pictures(root / name, name)
        if not inside and classes is None:
            raise RecipeError(f"class folder {name!r} holds no pictures", where=str(root))
        files += inside
        labels += [label] * len(inside)
    return Listing(root, files, labels, tuple(names))


def tiny_imagenet(root: Path, split: Split) -> Listing:
    """List Tiny-ImageNet as it is packed; its `val` is one flat folder and a table of names and classes.

    A `val` that was sorted into class folders is read too.

    Raises:
        RecipeError: a line of the table that names no picture or no class.
    """
    train = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir())
    table = root / "val" / "val_annotations.txt"
    if split == "train" or not table.is_file():
        return class_folders(root / "train" if split == "train" else root / "val", None if split == "train" else train)
    number = {name: label for label, name in enumerate(train)}
    files: list[str] = []
    labels: list[int] = []
    for line_number, line in enumerate(lines_of(table), start=1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in number or not (root / "val" / "images" / name).is_file():
            raise RecipeError(f"{line[:80]!r} names no picture of a training class", where=f"{table}:{line_number}")
        files.append(f"images/{name}")
        labels.append(number[wnid])
    return Listing(root / "val", files, labels, tuple(train))


def metadata_listing(root: Path, classes: Sequence[str] | None = None) -> Listing:
    """List the pictures of `metadata.jsonl`: one object a line, `file_name` and `label`, a name or a number.

    Args:
        root: the folder that holds it.
        classes: names that another split gave.

    Raises:
        RecipeError: a line that is no such object, leaves the folder, or has a label of no known class.
    """
    rows: list[tuple[str, str | int]] = []
    path = root / METADATA
    for line_number, line in enumerate(lines_of(path), start=1):
        if line.strip():
            rows.append(_metadata_row(line, f"{path}:{line_number}"))
    if not rows:
        raise RecipeError("it names no picture", where=str(path))
    kinds = {type(label) for _, label in rows}
    if len(kinds) > 1:
        raise RecipeError("some labels are names and some are numbers", where=str(path))
    if classes is None:
        numbers = [label for _, label in rows if isinstance(label, int)]
        names = sorted({str(label) for _, label in rows}) if str in kinds else [str(n) for n in range(max(numbers) + 1)]
    else:
        names = list(classes)
    number = {name: label for label, name in enumerate(names)}
    strange = sorted({str(label) for _, label in rows} - set(number))
    if strange:
        raise RecipeError(f"label {strange[0]!r} is not among the {len(names)} training classes", where=str(path))
    return Listing(root, [name for name, _ in rows], [number[str(label)] for _, label in rows], tuple(names))


def _metadata_row(line: str, where: str) -> tuple[str, str | int]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"no JSON: {str(error)[:120]}", where=where) from error
    name, label = (row.get("file_name"), row.get("label")) if isinstance(row, dict) else (None, None)
    if not isinstance(name, str) or isinstance(label, bool) or not isinstance(label, str | int):
        raise RecipeError(
            f"{line[:80]!r} has no file_name or no label",
            hint='write {"file_name": "a.png", "label": "cat"}',
            where=where,
        )
    if isinstance(label, int) and label < 0:
        raise RecipeError(f"label {label} marks a picture without a class", hint="leave such pictures out", where=where)
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise RecipeError(f"file_name {name!r} leaves the folder", where=where)
    return name, label


def _pictures(folder: Path, prefix: str) -> list[str]:
    """Picture files in a class folder, or in its `images`, sorted, with the class folder's name before them."""
    if not folder.is_dir():
        return []
    if (folder / "images").is_dir():
        folder, prefix = folder / "images", f"{prefix}/images"
    return [f"{prefix}/{name}" for name in sorted(entry.name for entry in os.scandir(folder)) if _is_picture(name)]


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
