"""Which pictures a folder holds and what they show in words, a row a picture: the layouts that trainers share.

metadata.jsonl              {"file_name": "a.png", "text": "a cat"}, a line a picture (diffusers, datasets)
a.png, a.txt                a caption beside each picture; each of its lines is one of several
10_zwx dog/a.png, a.txt     kohya: ten times an epoch, and "zwx dog" is the caption where there is no .txt

Nothing is opened here. A row may be bad: it then says why, with the file and the line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ortho_cli.errors import RecipeError

from .image_specs import Split
from .picture_folders import METADATA, every_picture, lines_of, split_folder

__all__ = ["KEYS", "TREE", "CaptionRow", "caption_rows"]

TREE = (
    'FOLDER/metadata.jsonl              {"file_name": "a.png", "text": "a cat"}, a line a picture',
    "FOLDER/a.png, FOLDER/a.txt         or a caption beside each picture",
    "FOLDER/10_zwx dog/a.png, a.txt     or kohya's folders: times an epoch, and the words where no .txt is",
    "FOLDER/train/..., FOLDER/val/...   each of these for itself, where some are set apart to judge by",
)
KEYS = ("text", "caption", "captions", "prompt")
KOHYA = re.compile(r"(\d+)_(.+)")
LONGEST = 80  # of a line in a message


@dataclass(frozen=True)
class CaptionRow:
    """A picture, its captions (one is drawn each time it is seen), how often an epoch, and where that is said."""

    picture: Path
    captions: tuple[str, ...]
    where: str
    repeats: int = 1
    fault: str = ""


def caption_rows(folder: Path, split: Split) -> tuple[list[CaptionRow], bool]:
    """List the pictures of a split.

    Returns:
        The rows, and whether they are of that split; else they are of both, and are yet to be parted.

    Raises:
        RecipeError: no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise RecipeError(f"data.path: there is no folder {str(folder)!r}", hint=_expected(), where=str(folder))
    parted = split_folder(folder, "train") is not None
    root = split_folder(folder, split) if parted else folder
    rows = [] if root is None else list(_rows(root))
    if not rows and (split == "train" or not parted):
        raise RecipeError("the folder holds no captioned pictures", hint=_expected(), where=str(root or folder))
    return rows, parted


def _expected() -> str:
    return "\n  ".join(["expected:", *TREE])


def _rows(root: Path) -> Iterator[CaptionRow]:
    if (root / METADATA).is_file():
        yield from _listed(root)
        return
    inside = sorted(path for path in root.iterdir() if path.is_dir() and KOHYA.fullmatch(path.name))
    for folder in inside:
        times, words = KOHYA.fullmatch(folder.name).groups()  # type: ignore[union-attr]
        if int(times) > 0:
            yield from _beside(folder, int(times), words)
    if not inside:
        yield from _beside(root, 1, "")


def _listed(root: Path) -> Iterator[CaptionRow]:
    """The pictures of a `metadata.jsonl`."""
    for number, line in enumerate(lines_of(root / METADATA), start=1):
        if line.strip():
            yield _row_of_line(root, line, f"{root / METADATA}:{number}")


def _row_of_line(root: Path, line: str, where: str) -> CaptionRow:
    def bad(fault: str, picture: Path = root) -> CaptionRow:
        return CaptionRow(picture, (), where, fault=fault)

    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return bad(f"no JSON: {str(error)[:120]}")
    name = value.get("file_name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        return bad(f"{line[:LONGEST]!r} has no file_name")
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        return bad(f"{name!r} leaves the folder")
    said = next((value[key] for key in KEYS if value.get(key)), None)
    captions = [said] if isinstance(said, str) else said
    if not isinstance(captions, list) or not all(isinstance(each, str) and each.strip() for each in captions):
        return bad(f"no caption of {name!r}; it is one of {', '.join(KEYS)}", root / name)
    if not (root / name).is_file():
        return bad(f"there is no picture {name!r}", root / name)
    return CaptionRow(root / name, tuple(each.strip() for each in captions), where)


def _beside(root: Path, repeats: int, words: str) -> Iterator[CaptionRow]:
    """Pictures with a `.txt` beside each; captions of no picture are faults, and pictures of none without `words`."""
    pictures = every_picture(root)
    stems = {PurePosixPath(name).with_suffix("").as_posix() for name in pictures}
    for name in pictures:
        path = root / name
        text = path.with_suffix(".txt")
        fault = f"{text.name} is empty" if text.is_file() else f"no {text.name} beside it"
        try:
            lines = lines_of(text) if text.is_file() else [words]
        except RecipeError as error:
            lines, fault = [], f"{text.name}: {error.message}"
        captions = tuple(line.strip() for line in lines if line.strip())
        fault = "" if captions else fault
        yield CaptionRow(path, captions, str(path), repeats, fault)
    for text in sorted(root.rglob("*.txt")):
        if text.relative_to(root).with_suffix("").as_posix() not in stems:
            yield CaptionRow(text, (), str(text), repeats, "a caption without a picture")
