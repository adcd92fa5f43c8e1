"""Open the picture set of a recipe: from a library that it comes with, a local folder where one is named, else the hub.

Small sets come whole into memory as bytes, others as a list of pictures to open. Labels are always numbered over all
classes of the set; a filter on classes drops samples and leaves the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ortho_cli.errors import RecipeError

from .bundled_images import BUNDLED
from .image_set import ImageSet
from .image_specs import SPECS, Split, missing_data
from .local_images import local_images

if TYPE_CHECKING:
    from ortho_cli.recipe.data import Images

__all__ = ["load_images"]


def load_images(config: Images, split: Split) -> ImageSet:
    """Open one split of a recipe's data.

    Args:
        config: the recipe's `data` section; `name`, `path`, `source` and, for `train`, `classes` are used.
        split: `train` or `eval`. The classes left out of training stay in `eval`: how well they are still known is
            measured too.

    Raises:
        RecipeError: the data is not there (with the expected tree and how to get it), not readable, has samples
            without a class, or classes that the recipe names do not exist.
        UsageError: a library that is needed is not installed.
    """
    spec = SPECS[config.name]
    if spec.name in BUNDLED:
        found = BUNDLED[spec.name](split)
    elif config.path is not None:
        found = local_images(Path(config.path).expanduser(), spec, split)
    elif spec.hub is None and config.source is None:
        raise missing_data(spec, "image-folder needs a path or a source")
    else:
        from .hub_images import hub_images

        found = hub_images(spec, config.source, split)
    if spec.num_classes not in (None, len(found.classes)):
        raise RecipeError(
            f"{len(found.classes)} classes found, {spec.name} has {spec.num_classes}",
            hint="is it another set? a folder with classes of its own is read with name: image-folder",
            where=config.path,
        )
    if len(found) == 0 or int(found.labels.min()) < 0 or int(found.labels.max()) >= len(found.classes):
        raise RecipeError(
            f"{spec.name} {split}: no samples, or labels outside 0 to {len(found.classes) - 1} (test sets have -1)",
            where=config.path,
        )
    return _only(found, config.classes, spec.name) if config.classes is not None and split == "train" else found


def _only(images: ImageSet, classes: Sequence[int], name: str) -> ImageSet:
    """The samples of some classes, in their order."""
    strange = [label for label in classes if label >= len(images.classes)]
    if strange:
        raise RecipeError(f"data.classes {strange[0]}: {name} has classes 0 to {len(images.classes) - 1}")
    kept = torch.isin(images.labels, torch.tensor(classes)).nonzero().flatten().tolist()
    if not kept:
        raise RecipeError(f"data.classes {list(classes)} leave no training sample of {name}")
    return images.select(kept)
