"""Picture sets of the Hugging Face hub, through `datasets`: small pictures whole, others opened when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ortho_cli.errors import RecipeError, UsageError

from .image_set import ImageSet, unlabelled
from .image_specs import ImageSpec, Split, missing_data
from .picture_folders import SPLIT_FOLDERS
from .pictures import to_tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["HubPictures", "hub_images"]

IN_MEMORY_SIZE = 32  # pixels: 60,000 such pictures are 180 MB; larger ones are decoded again in every epoch


class HubPictures:
    """One column of pictures of a hub set."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows = rows
        self.column = column

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, place: int) -> Image:
        """The picture of a row, decoded.

        Raises:
            RecipeError: a row without a picture, or with a broken one.
        """
        try:
            picture: Image | None = self.rows[place][self.column]
        except (OSError, SyntaxError, ValueError) as error:  # of Pillow, which `datasets` decodes with
            raise RecipeError(
                f"row {place} of the hub set holds no picture that Pillow can read: {str(error)[:200]}"
            ) from error
        if picture is None:
            raise RecipeError(f"row {place} of the hub set has no picture in column {self.column!r}")
        return picture

    def select(self, places: Sequence[int]) -> HubPictures:
        """Some rows."""
        return HubPictures(self.rows.select(places), self.column)


def hub_images(spec: ImageSpec, source: str | None, split: Split) -> ImageSet:
    """Fetch (or find in the cache) one split of a hub set.

    Args:
        spec: the set.
        source: `ORG/NAME[@revision]` to take in place of the set's own id.
        split: `train` or `eval`; a set without an evaluation split has one held out of its training split.

    Raises:
        UsageError: `datasets` is not installed.
        RecipeError: not reachable, gated, or without a column of pictures, or one of classes where it should have it.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"data {spec.name} from the hub needs the datasets library",
            hint="pip install 'ortho-cli[vision]'; or name a local folder: data.path (see: ortho recipe check --data)",
        ) from error
    name, _, revision = (source or (spec.hub.id if spec.hub is not None else "")).partition("@")
    config = spec.hub.config if spec.hub is not None and source is None else None
    try:
        found = datasets.load_dataset(name, config, revision=revision or None)
    except (OSError, ValueError, RuntimeError) as error:  # unreachable or gated; no such config; a script repository
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise missing_data(spec, f"data {spec.name}: the hub set {name!r} does not open: {reason}") from error
    usual = spec.hub.splits if spec.hub is not None else {}
    named = [word for word in (usual.get(split), *SPLIT_FOLDERS[split]) if word in found]
    rows = found[named[0]] if named else found[usual.get("train", "train")] if "train" in found else None
    if rows is None:
        raise RecipeError(f"the hub set {name!r} has the splits {', '.join(found)}, and no train")
    hub = spec.hub
    image = _column(rows, datasets.Image, hub.image if hub is not None else None, name)
    pictures = HubPictures(rows, image)
    if _is_sorted(rows, spec):
        label = _column(rows, datasets.ClassLabel, hub.label if hub is not None else None, name)
        labels = torch.tensor(rows[label][:], dtype=torch.long)
        made = ImageSet(pictures, labels, tuple(rows.features[label].names))
    else:
        made = unlabelled(pictures, spec.name)
    if not any(word in found for word in (usual.get("eval"), *SPLIT_FOLDERS["eval"])):
        made = made.held_out(split)
    if not spec.sized or spec.size > IN_MEMORY_SIZE:
        return made
    return ImageSet(
        torch.stack([to_tensor(pictures.open(place), spec.size, spec.channels) for place in range(len(made))]),
        made.labels,
        made.classes,
    )


def _is_sorted(rows: Any, spec: ImageSpec) -> bool:
    """Whether there are classes to read: of a set of one's own, whether it has a column of them."""
    import datasets

    columns = [feature for feature in rows.features.values() if isinstance(feature, datasets.ClassLabel)]
    return bool(columns) if spec.num_classes is None else spec.has_classes


def _column(rows: Any, kind: type, usual: str | None, name: str) -> str:
    """The column of a kind: that of the usual name where it exists, else the only one."""
    columns = [column for column, feature in rows.features.items() if isinstance(feature, kind)]
    if usual not in columns and len(columns) != 1:
        raise RecipeError(
            f"the hub set {name!r} has {len(columns)} columns of {kind.__name__}, expected one",
            hint=f"its columns: {', '.join(rows.features)}",
        )
    return usual if usual is not None and usual in columns else columns[0]
