"""Open the picture set of a recipe: a local folder where the recipe names one, else the hub; digits from scikit-learn.

Small sets come whole into memory as bytes, others as a list of pictures to open. Labels are always numbered over all
classes of the set; a filter on classes drops samples and leaves the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ortho_cli.errors import RecipeError

from .cifar_files import find_cifar, read_cifar
from .draws import uniform
from .idx_files import find_mnist, read_idx
from .image_specs import SPECS, ImageSpec, Split
from .picture_folders import METADATA, Listing, class_folders, metadata_listing, split_folder, tiny_imagenet
from .pictures import PictureFiles, Pictures

if TYPE_CHECKING:
    from ortho_cli.recipe.data import Images

__all__ = ["ImageSet", "load_images", "missing_data", "sources", "stratified"]

BYTE_WHITE = 255.0
DIGITS_WHITE = 16.0
# Of sets that come without an evaluation split; drawn with a seed of its own, so that all runs are judged alike.
EVAL_SHARE = 0.2
SPLIT_SEED = 0


@dataclass(frozen=True)
class ImageSet:
    """One split: pictures (`(N, C, H, W)` bytes, or to be opened), class numbers, and the names of all classes."""

    images: Tensor | Pictures
    labels: Tensor
    classes: tuple[str, ...]
    white: float = BYTE_WHITE

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, places: Sequence[int]) -> ImageSet:
        """The samples at some places."""
        at = torch.tensor(places, dtype=torch.long)
        images = self.images[at] if isinstance(self.images, Tensor) else self.images.select(places)
        return replace(self, images=images, labels=self.labels[at])


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
    if spec.name == "digits":
        found = _digits(split)
    elif config.path is not None:
        found = _local(Path(config.path).expanduser(), spec, split)
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


def missing_data(spec: ImageSpec, message: str, where: str | None = None) -> RecipeError:
    """The error for data that is not there: how a copy looks, and how to get one."""
    hint = "\n  ".join(["expected:", *spec.tree, "get it:", *sources(spec)])
    return RecipeError(message, hint=hint, where=where)


def sources(spec: ImageSpec) -> tuple[str, ...]:
    """Where a set can be had, in lines of text."""
    if spec.hub is None:
        return spec.fetch
    return (f"leave out data.path: the hub's {spec.hub.id} is fetched (pip install 'ortho-cli[vision]')", *spec.fetch)


def stratified(labels: Sequence[int], split: Split) -> list[int]:
    """The places of one split of a set that has none: of every class one sample in five is for evaluation.

    Which ones is a hash of the place, the same in every run; a class of two or more samples has at least one.

    >>> stratified([0] * 5 + [1] * 5, "eval") == sorted(set(range(10)) - set(stratified([0] * 5 + [1] * 5, "train")))
    True
    """
    values = np.asarray(labels)
    draws = uniform(SPLIT_SEED, 0, np.arange(len(values)), 1)[:, 0]
    held: set[int] = set()
    for label in np.unique(values):
        places = np.flatnonzero(values == label)
        count = max(round(EVAL_SHARE * len(places)), 1) if len(places) > 1 else 0
        held.update(places[np.argsort(draws[places])[:count]].tolist())
    return [place for place in range(len(values)) if (place in held) == (split == "eval")]


def _digits(split: Split) -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images.astype("uint8")).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype("int64"))
    whole = ImageSet(images, labels, tuple(str(name) for name in digits.target_names), DIGITS_WHITE)
    return whole.select(stratified(labels.tolist(), split))


def _local(folder: Path, spec: ImageSpec, split: Split) -> ImageSet:
    if not folder.is_dir():
        raise missing_data(spec, f"data.path: there is no folder {str(folder)!r}", str(folder))
    if spec.name == "mnist":
        files = find_mnist(folder, split)
        if files is not None:
            return _in_memory(spec, read_idx(files[0], 3).unsqueeze(1), read_idx(files[1], 1).long(), folder)
    elif spec.name in ("cifar10", "cifar100"):
        paths = find_cifar(folder, spec.name, split)
        if paths is not None:
            return _in_memory(spec, *read_cifar(paths, spec.name), folder)
    else:
        listing = _tiny(folder, split) if spec.name == "tiny-imagenet" else _folders(folder, spec, split)
        if listing is not None:
            pictures = PictureFiles(listing.root, listing.files)
            return ImageSet(pictures, torch.tensor(listing.labels, dtype=torch.long), listing.classes)
    raise missing_data(spec, f"data.path {str(folder)!r} does not hold {spec.name} ({split})", str(folder))


def _in_memory(spec: ImageSpec, images: Tensor, labels: Tensor, folder: Path) -> ImageSet:
    if images.shape[1:] != (spec.channels, spec.size, spec.size) or len(images) != len(labels):
        raise RecipeError(
            f"{len(labels)} labels for pictures {tuple(images.shape)}, expected {spec.size}x{spec.size}",
            where=str(folder),
        )
    assert spec.num_classes is not None
    return ImageSet(images, labels, tuple(str(label) for label in range(spec.num_classes)))


def _tiny(folder: Path, split: Split) -> Listing | None:
    for root in (folder / "tiny-imagenet-200", folder):
        if (root / "train").is_dir() and (split == "train" or (root / "val").is_dir()):
            return tiny_imagenet(root, split)
    return None


def _folders(folder: Path, spec: ImageSpec, split: Split) -> Listing | None:
    """A folder with one folder a split, or (image-folder only) without, from which every fifth picture is held out."""
    train, wanted = split_folder(folder, "train"), split_folder(folder, split)
    if train is not None:
        known = _listing(train)
        return known if split == "train" else _listing(wanted, known.classes) if wanted is not None else None
    if spec.name != "image-folder":
        return None
    whole = _listing(folder)
    places = stratified(whole.labels, split)
    return replace(
        whole, files=[whole.files[place] for place in places], labels=[whole.labels[place] for place in places]
    )


def _listing(root: Path, classes: Sequence[str] | None = None) -> Listing:
    return metadata_listing(root, classes) if (root / METADATA).is_file() else class_folders(root, classes)


def _only(images: ImageSet, classes: Sequence[int], name: str) -> ImageSet:
    """The samples of some classes, in their order."""
    strange = [label for label in classes if label >= len(images.classes)]
    if strange:
        raise RecipeError(f"data.classes {strange[0]}: {name} has classes 0 to {len(images.classes) - 1}")
    kept = torch.isin(images.labels, torch.tensor(classes)).nonzero().flatten().tolist()
    if not kept:
        raise RecipeError(f"data.classes {list(classes)} leave no training sample of {name}")
    return images.select(kept)
