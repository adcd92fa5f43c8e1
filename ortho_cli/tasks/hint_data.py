"""Open the pictures, hints and prompts of a recipe: every file is looked into before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ortho_cli.errors import RecipeError, UsageError

from .hint_rows import HintRow, read_rows
from .image_set import stratified
from .image_specs import Split
from .pictures import decoded

if TYPE_CHECKING:
    from PIL.Image import Image

    from ortho_cli.recipe.data_hints import HintedPictures

__all__ = ["HintPictures", "HintSet", "load_hints"]

READERS = 16  # threads that look into files
SIDEWAYS = 0.02  # by which the shapes of picture and hint may differ: rounding of a resized copy
# Pictures of scikit-image that lie in its wheel, by what they show.
BUNDLED = {
    "astronaut": "a portrait of an astronaut with a space shuttle behind her", "brick": "a wall of bricks",
    "camera": "a man with a camera on a tripod", "chelsea": "a close-up of a cat", "coffee": "a cup of coffee",
    "coins": "rows of old coins", "grass": "blades of grass", "gravel": "gravel", "horse": "the outline of a horse",
    "hubble_deep_field": "a field of galaxies", "moon": "craters of the moon", "rocket": "a rocket on its launch pad",
}  # fmt: skip


class HintPictures(Protocol):
    """Samples that are opened one at a time."""

    def __len__(self) -> int: ...

    def prompt(self, place: int) -> str:
        """What the picture shows."""

    def open(self, place: int) -> tuple[Image, Image | None]:
        """The picture and its hint, decoded; None for a hint that is made of the picture."""


@dataclass(frozen=True)
class HintSet:
    """One split, and the faults for which samples were left out of it."""

    pictures: HintPictures
    faults: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)


class _Files:
    """Samples on disk."""

    def __init__(self, rows: Sequence[HintRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def prompt(self, place: int) -> str:
        return self.rows[place].prompt

    def open(self, place: int) -> tuple[Image, Image | None]:
        row = self.rows[place]
        return decoded(row.picture, row.where), None if row.hint is None else decoded(row.hint, row.where)


class _Bundled:
    """Pictures of scikit-image; hints are made of them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def prompt(self, place: int) -> str:
        return BUNDLED[self.names[place]]

    def open(self, place: int) -> tuple[Image, Image | None]:
        from PIL import Image

        try:
            import skimage.data
        except ImportError as error:
            raise UsageError("skimage-hints comes with scikit-image", hint="pip install scikit-image") from error
        pixels = np.asarray(getattr(skimage.data, self.names[place])())
        return Image.fromarray(pixels if pixels.dtype == np.uint8 else (255 * pixels).astype(np.uint8)), None


def load_hints(config: HintedPictures, split: Split) -> HintSet:
    """Open one split of a recipe's data; every file of it is decoded once.

    Args:
        config: the recipe's `data` section.
        split: `train` or `eval`; a folder without such parts has every fifth sample held out.

    Raises:
        RecipeError: the data is not there, a line of its list is wrong, or a file is missing, broken or of another
            shape than its hint, with file and line; unless `skip_bad`, which leaves such samples out.

    Cost: every file is decoded once, by several threads.
    """
    if config.name == "skimage-hints":
        names = list(BUNDLED)
        return HintSet(_Bundled([names[place] for place in stratified([0] * len(names), split)]))
    rows, parted = read_rows(config, split)
    if not parted:
        rows = [rows[place] for place in stratified([0] * len(rows), split)]
    with ThreadPoolExecutor(READERS) as readers:
        found = list(readers.map(_fault, rows))
    faults = [fault for fault in found if fault is not None]
    if faults and not config.skip_bad:
        more = f" ({len(faults) - 1} more samples of {split} are bad too)" if len(faults) > 1 else ""
        hint_text = faults[0].hint or "leave bad samples out: --skip-bad, or data.skip_bad: true"
        raise RecipeError(f"{faults[0].message}{more}", hint=hint_text, where=faults[0].where)
    kept = [row for row, fault in zip(rows, found, strict=True) if fault is None]
    if not kept:
        raise RecipeError(f"no sample of {split} is left: {faults[0].message}", where=faults[0].where)
    return HintSet(_Files(kept), tuple(f"{fault.where}: {fault.message}" for fault in faults))


def _fault(row: HintRow) -> RecipeError | None:
    """What is wrong with a sample: its line, or the files that this names."""
    if row.fault is not None:
        return row.fault
    shapes = []
    for what, path in (("picture", row.picture), ("hint", row.hint)):
        if path is None:
            continue
        if not path.is_file():
            return RecipeError(f"there is no {what} {str(path)!r}", where=row.where)
        try:
            width, height = decoded(path, row.where).size
        except RecipeError as error:
            return RecipeError(f"{what} {str(path)!r}: {error.message}", where=row.where)
        shapes.append(width / height)
    if len(shapes) == 2 and abs(shapes[0] / shapes[1] - 1) > SIDEWAYS:
        return RecipeError(
            f"the hint is {shapes[1]:.3g} times as wide as high, its picture {shapes[0]:.3g} times", where=row.where
        )
    return None
