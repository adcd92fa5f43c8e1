"""A folder of pictures: its files by name, what its manifest says of them, and which belongs to which of another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ortho_cli.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MANIFEST", "PictureFolder", "open_folder", "paired"]

MANIFEST = "manifest.jsonl"
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
SAMPLE = re.compile(r"_\d+$")  # which of several pictures of one prompt: 000123_0


@dataclass(frozen=True)
class PictureFolder:
    """Pictures of a folder and of the folders in it.

    Attributes:
        root: the folder.
        names: of the files, relative to it with `/`, sorted.
        records: what `manifest.jsonl` says of a file, by its name.
    """

    root: Path
    names: tuple[str, ...]
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def prompts(self) -> dict[str, str]:
        """The prompt of each picture whose record has one."""
        return {name: str(each["prompt"]) for name, each in self.records.items() if "prompt" in each}

    def open(self, name: str) -> Image:
        """A picture in colour, decoded.

        Raises:
            UsageError: Pillow is missing, or the file is no picture that it can read.
        """
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError as error:
            raise UsageError("pictures need Pillow", hint="pip install 'ortho-cli[vision]'") from error
        path = self.root / name
        try:
            with Image.open(path) as picture:
                found: Image.Image = picture.convert("RGB")
                return found
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise UsageError(f"{path} is no picture that Pillow can read: {str(error)[:200]}") from error

    def batches(self, size: int) -> Iterator[Tensor]:
        """All pictures in order, `(B, 3, H, W)` uint8; a batch ends early where the next picture has another shape."""
        waiting: list[Tensor] = []
        for name in self.names:
            picture = torch.from_numpy(np.array(self.open(name))).permute(2, 0, 1)
            if waiting and (len(waiting) == size or waiting[0].shape != picture.shape):
                yield torch.stack(waiting)
                waiting = []
            waiting.append(picture)
        if waiting:
            yield torch.stack(waiting)


def open_folder(root: Path) -> PictureFolder:
    """List a folder's pictures, hidden files left out, and read its manifest.

    The manifest is what `ortho generate` writes: a JSON object a line; those with a `file` are of that picture.

    Raises:
        UsageError: no folder, no pictures, or a line of the manifest that is no JSON object.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is no folder", hint="name a folder of pictures")
    inside = (path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    names = sorted(path.as_posix() for path in inside if not any(part.startswith(".") for part in path.parts))
    if not names:
        raise UsageError(f"{root} holds no pictures", hint=f"expected files that end in {', '.join(sorted(SUFFIXES))}")
    return PictureFolder(root, tuple(names), _records(root / MANIFEST))


def paired(generated: PictureFolder, reference: PictureFolder) -> list[tuple[str, str]]:
    """Which reference belongs to each generated picture: the one of the same name, whatever the suffixes.

    Several pictures made for one reference are `000123_0`, `000123_1`; all of them belong to `000123`.

    Returns:
        Names of generated pictures and of their references, in the order of the former.

    Raises:
        UsageError: a generated picture without a reference.
    """
    known = {_stem(name): name for name in reference.names}
    found = []
    for name in generated.names:
        stem = _stem(name)
        other = known.get(stem) or known.get(SAMPLE.sub("", stem))
        if other is None:
            raise UsageError(
                f"{generated.root / name} has no reference in {reference.root}",
                hint=f"it would be named {SAMPLE.sub('', stem)}.png",
            )
        found.append((name, other))
    return found


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _records(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number}: no JSON: {str(error)[:120]}") from error
        if not isinstance(record, dict):
            raise UsageError(f"{path}:{number}: {line[:80]!r} is no JSON object")
        if isinstance(record.get("file"), str):
            found[record["file"]] = record
    return found
