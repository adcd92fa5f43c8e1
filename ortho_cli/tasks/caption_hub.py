"""Captioned pictures of the hub, through `datasets`."""

from __future__ import annotations

from typing import Any

from ortho_cli.errors import RecipeError

from .caption_files import KEYS
from .image_specs import Split
from .picture_folders import SPLIT_FOLDERS
from .text_files import open_dataset

__all__ = ["hub_rows"]


def hub_rows(source: str, column: str | None, split: Split) -> tuple[Any, str, tuple[tuple[str, ...], ...], bool]:
    """One split of a set.

    Args:
        source: `ORG/NAME[@revision]`, or a local folder that `datasets` reads.
        column: of the captions; None: the first usual name there is.
        split: `train` or `eval`; a set without the latter has its training rows parted.

    Returns:
        Rows, the column of pictures, each row's captions (none: a fault), and whether the rows are of that split.

    Raises:
        UsageError: `datasets` is not installed.
        RecipeError: not reachable, gated, or without a column of pictures or of captions.
    """
    name, _, revision = source.partition("@")
    found = open_dataset(
        f"the hub set {name!r}", name, revision=revision or None, extra="vision",
        hint="a gated set needs accepted terms and HF_TOKEN; or name a folder: caption-folder, data.path",
    )  # fmt: skip
    import datasets

    own = next((word for word in SPLIT_FOLDERS[split] if word in found), None)
    rows = found[own or "train"] if own or "train" in found else None
    if rows is None:
        raise RecipeError(f"the hub set {name!r} has the splits {', '.join(found)}, and no train")
    pictures = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    wanted = [column] if column is not None else [key for key in KEYS if key in rows.features]
    if not pictures or not wanted or wanted[0] not in rows.features:
        lacks = "pictures" if not pictures else f"captions ({column or ', '.join(KEYS)})"
        raise RecipeError(
            f"the hub set {name!r} has no column of {lacks}",
            hint=f"its columns: {', '.join(rows.features)}; name one: data.caption_column",
        )
    parted = own is not None and (split == "eval" or any(word in found for word in SPLIT_FOLDERS["eval"]))
    said = [[each] if isinstance(each, str) else list(each or ()) for each in rows[wanted[0]]]
    return rows, pictures[0], tuple(tuple(text.strip() for text in captions if text) for captions in said), parted
