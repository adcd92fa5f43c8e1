"""Open the captioned pictures of a recipe; every picture of a folder is decoded once before training starts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ortho_cli.errors import RecipeError, UsageError

from .caption_buckets import Shape
from .caption_files import TREE, CaptionRow, caption_rows
from .draws import uniform
from .hint_data import BUNDLED
from .hub_images import HubPictures
from .image_specs import Split
from .pictures import decoded

if TYPE_CHECKING:
    from PIL.Image import Image

    from ortho_cli.recipe.data_captions import CaptionedPictures

__all__ = ["CaptionSet", "check_captions", "describe_captions", "fault_text", "found_captions", "load_captions"]

READERS = 16  # threads that look into files
HUB = {"nouns": "m1guelpf/nouns"}  # CC0
SPLIT_SEED = 0
TOLD = 5  # faults that are told one by one


class Sources(Protocol):
    """Pictures that are opened one at a time."""

    def open(self, place: int) -> Image:
        """The picture at a place, decoded."""

    def identity(self, place: int) -> str:
        """What tells the picture from every other, by its content."""


@dataclass(frozen=True)
class CaptionSet:
    """One split: each entry of `places` is a sample, the picture at that place of `source`; some twice or more."""

    source: Sources
    captions: tuple[tuple[str, ...], ...]
    sizes: tuple[tuple[int, int], ...]
    places: tuple[int, ...]
    faults: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.places)


class _Files:
    def __init__(self, rows: Sequence[CaptionRow]) -> None:
        self.rows = rows

    def open(self, place: int) -> Image:
        return decoded(self.rows[place].picture, self.rows[place].where)

    def identity(self, place: int) -> str:
        return hashlib.sha256(self.rows[place].picture.read_bytes()).hexdigest()


class _Bundled:
    """Pictures of scikit-image."""

    names = tuple(BUNDLED)

    def open(self, place: int) -> Image:
        from PIL import Image

        try:
            import skimage.data
        except ImportError as error:
            raise UsageError("skimage-captions comes with scikit-image", hint="pip install scikit-image") from error
        pixels = np.asarray(getattr(skimage.data, self.names[place])())
        return Image.fromarray(pixels if pixels.dtype == np.uint8 else (255 * pixels).astype(np.uint8))

    def identity(self, place: int) -> str:
        return _pixel_hash(self.open(place))


class _Rows(HubPictures):
    """Pictures in a column of a hub set."""

    def identity(self, place: int) -> str:
        return _pixel_hash(self.open(place))


def _pixel_hash(picture: Image) -> str:
    return hashlib.sha256(f"{picture.mode}{picture.size}".encode() + picture.tobytes()).hexdigest()


def load_captions(config: CaptionedPictures, split: Split) -> CaptionSet:
    """Open one split of a recipe's data.

    Args:
        config: the recipe's `data` section.
        split: `train`, or `eval`, which is empty where nothing is held out.

    Raises:
        RecipeError: the data is not there, a line is wrong, a picture is missing or broken, or a caption is, with file
            and line; unless `skip_bad`, which leaves such samples out.
        UsageError: a library that is needed is not installed.

    Cost: every picture is decoded once; files by several threads.
    """
    if config.path is not None:
        rows, parted = caption_rows(Path(config.path).expanduser(), split)
        found = _checked(rows, config.skip_bad, split)
    else:
        found, parted = _bundled() if config.name == "skimage-captions" else _hub(config, split)
    if parted:
        return found
    held = _held_out(len(found.captions), config.held_out)
    return replace(found, places=tuple(place for place in found.places if (place in held) == (split == "eval")))


def describe_captions(config: CaptionedPictures) -> str:
    """What the data is, how a folder looks, and how to get it."""
    if config.name == "skimage-captions":
        return "skimage-captions: pictures of scikit-image with a sentence each\nto get it:\n  pip install scikit-image"
    if config.path is None:
        where = config.source or HUB.get(config.name, "")
        return f"{config.name}: a set of the hub, {where}\nto get it:\n  pip install 'ortho-cli[vision]'; it is fetched"
    lines = [f"caption-folder: read from {config.path}   (FOLDER below)", "it looks like one of"]
    return "\n".join([*lines, *(f"  {line}" for line in TREE)])


def check_captions(config: CaptionedPictures) -> dict[str, Any]:
    """Open both splits and count them."""
    train, judged = load_captions(config, "train"), load_captions(config, "eval")
    return {
        "name": config.name, "train": len(train), "eval": len(judged), "captions": sum(map(len, train.captions)),
        "faults": sorted({*train.faults, *judged.faults}),
    }  # fmt: skip


def found_captions(found: dict[str, Any]) -> str:
    """What `check_captions` found, in a sentence."""
    told = f"found: {found['train']} samples to train on, {found['eval']} to judge by; {found['captions']} captions"
    return told + (f"; {fault_text(found['faults'])}" if found["faults"] else "")


def fault_text(faults: Sequence[str]) -> str:
    """How many samples were left out, and the first of them."""
    more = f"; and {len(faults) - TOLD} more" if len(faults) > TOLD else ""
    return f"{len(faults)} bad samples are left out: {'; '.join(faults[:TOLD])}{more}"


def _held_out(count: int, share: float) -> set[int]:
    """The places to judge by, the same for every run; some where any are wanted, never all."""
    if not share or count < 2:
        return set()
    draws = uniform(SPLIT_SEED, 0, np.arange(count), 1)[:, 0]
    return set(np.argsort(draws)[: min(max(round(share * count), 1), count - 1)].tolist())


def _checked(rows: Sequence[CaptionRow], skip_bad: bool, split: Split) -> CaptionSet:
    """The rows whose pictures open."""
    with ThreadPoolExecutor(READERS) as readers:
        looked = list(readers.map(_look, rows))
    faults = _sifted(looked, [row.where for row in rows], skip_bad, split)
    kept = [(row, size) for row, size in zip(rows, looked, strict=True) if not isinstance(size, str)]
    places = tuple(place for place, (row, _) in enumerate(kept) for _ in range(row.repeats))
    return CaptionSet(
        _Files([row for row, _ in kept]), tuple(row.captions for row, _ in kept), tuple(size for _, size in kept),
        places, faults,
    )  # fmt: skip


def _sifted(looked: Sequence[Shape | str], wheres: Sequence[str], skip_bad: bool, split: Split) -> tuple[str, ...]:
    """What is wrong with some samples, of which there are sizes or faults; one is raised if they are not to be skipped.

    Raises:
        RecipeError: the first fault, where one is not to be left out or nothing else is left.
    """
    bad = [(where, found) for where, found in zip(wheres, looked, strict=True) if isinstance(found, str)]
    if bad and not skip_bad:
        more = f" ({len(bad) - 1} more of {split} are bad too)" if len(bad) > 1 else ""
        hint = "leave bad samples out: --skip-bad, or data.skip_bad: true"
        raise RecipeError(f"{bad[0][1]}{more}", hint=hint, where=bad[0][0])
    if bad and len(bad) == len(looked):
        raise RecipeError(f"no sample of {split} is left: {bad[0][1]}", where=bad[0][0])
    return tuple(f"{where}: {fault}" for where, fault in bad)


def _look(row: CaptionRow) -> Shape | str:
    """The size of a picture, or what is wrong with the row."""
    if row.fault:
        return row.fault
    try:
        picture = decoded(row.picture, row.where)
    except RecipeError as error:
        return f"picture {row.picture.name!r}: {error.message}"
    return picture.size


def _bundled() -> tuple[CaptionSet, bool]:
    source = _Bundled()
    sizes = tuple(source.open(place).size for place in range(len(source.names)))
    captions = tuple((BUNDLED[name],) for name in source.names)
    return CaptionSet(source, captions, sizes, tuple(range(len(sizes)))), False


def _hub(config: CaptionedPictures, split: Split) -> tuple[CaptionSet, bool]:
    """A set of the hub, through `datasets`."""
    from .caption_hub import hub_rows

    name = config.source or HUB[config.name]
    rows, image, captions, parted = hub_rows(name, config.caption_column, split)
    source = _Rows(rows, image)

    def look(place: int) -> Shape | str:
        try:
            return source.open(place).size if captions[place] else f"row {place} has no caption"
        except RecipeError as error:
            return error.message

    looked = [look(place) for place in range(len(rows))]
    faults = _sifted(looked, [f"{name}:{place}" for place in range(len(rows))], config.skip_bad, split)
    places = tuple(place for place, size in enumerate(looked) if not isinstance(size, str))
    sizes = tuple((0, 0) if isinstance(size, str) else size for size in looked)
    return CaptionSet(source, captions, sizes, places, faults), parted
