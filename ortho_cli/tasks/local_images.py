"""Picture sets in a local folder, each in the layout in which it is handed out (`ImageSpec.tree`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ortho_cli.errors import RecipeError

from .cifar_files import find_cifar, read_cifar
from .idx_files import find_mnist, read_idx
from .image_set import ImageSet, unlabelled
from .image_specs import ImageSpec, Split, missing_data
from .lmdb_pictures import LmdbPictures, find_lsun
from .picture_folders import (
    METADATA,
    Listing,
    class_folders,
    every_picture,
    metadata_listing,
    split_folder,
    tiny_imagenet,
)
from .pictures import PictureFiles
from .sprite_files import find_sprites, read_sprites

__all__ = ["local_images"]

CELEBA_PARTITION = "list_eval_partition.txt"
UNSORTED = "pictures"
PARTITION: dict[Split, str] = {"train": "0", "eval": "1"}  # 2 is the test part


def local_images(folder: Path, spec: ImageSpec, split: Split) -> ImageSet:
    """Open one split of a set in a folder.

    Raises:
        RecipeError: the folder does not hold it, with the expected tree; or what it holds is damaged.
        UsageError: a library that is needed is not installed.
    """
    if not folder.is_dir():
        raise missing_data(spec, f"data.path: there is no folder {str(folder)!r}", str(folder))
    found = _open(folder, spec, split)
    if found is None:
        raise missing_data(spec, f"data.path {str(folder)!r} does not hold {spec.name} ({split})", str(folder))
    return found


def _open(folder: Path, spec: ImageSpec, split: Split) -> ImageSet | None:
    """The split; None where the folder does not hold it."""
    if spec.name == "mnist":
        files = find_mnist(folder, split)
        if files is None:
            return None
        return _in_memory(spec, read_idx(files[0], 3).unsqueeze(1), read_idx(files[1], 1).long(), folder)
    if spec.name in ("cifar10", "cifar100"):
        paths = find_cifar(folder, spec.name, split)
        return _in_memory(spec, *read_cifar(paths, spec.name), folder) if paths is not None else None
    if spec.name == "dsprites":
        path = find_sprites(folder)
        return unlabelled(read_sprites(path, spec.size), spec.name).held_out(split) if path is not None else None
    if spec.name == "lsun-church":
        path = find_lsun(folder, "church_outdoor", split)
        return unlabelled(LmdbPictures(path), spec.name) if path is not None else None
    if spec.name == "celeba":
        return _celeba(folder, spec, split)
    if not spec.has_classes:
        return _unsorted(folder, spec, split)
    if spec.name == "image-folder" and split_folder(folder, "train") is None:
        return _listed(_listing(folder)).held_out(split)
    listing = _tiny(folder, split) if spec.name == "tiny-imagenet" else _folders(folder, split)
    return _listed(listing) if listing is not None else None


def _in_memory(spec: ImageSpec, images: Tensor, labels: Tensor, folder: Path) -> ImageSet:
    if images.shape[1:] != (spec.channels, spec.size, spec.size) or len(images) != len(labels):
        raise RecipeError(
            f"{len(labels)} labels for pictures {tuple(images.shape)}, expected {spec.size}x{spec.size}",
            where=str(folder),
        )
    assert spec.num_classes is not None
    return ImageSet(images, labels, tuple(str(label) for label in range(spec.num_classes)))


def _listed(listing: Listing) -> ImageSet:
    pictures = PictureFiles(listing.root, listing.files)
    return ImageSet(pictures, torch.tensor(listing.labels, dtype=torch.long), listing.classes)


def _tiny(folder: Path, split: Split) -> Listing | None:
    for root in (folder / "tiny-imagenet-200", folder):
        if (root / "train").is_dir() and (split == "train" or (root / "val").is_dir()):
            return tiny_imagenet(root, split)
    return None


def _celeba(folder: Path, spec: ImageSpec, split: Split) -> ImageSet | None:
    """The official parts where the table that tells them is there, else one picture in five held out."""
    root = next((path for path in (folder / "img_align_celeba", folder) if any(path.glob("0*.jpg"))), None)
    if root is None:
        return None
    table = next((path for path in (folder / CELEBA_PARTITION, root / CELEBA_PARTITION) if path.is_file()), None)
    if table is None:
        return unlabelled(PictureFiles(root, every_picture(root)), spec.name).held_out(split)
    rows = [line.split() for line in table.read_text("utf-8").splitlines()]
    strange = next((number for number, row in enumerate(rows, 1) if len(row) != 2 or row[1] not in ("0", "1", "2")), 0)
    if strange:
        raise RecipeError("expected a file name and 0, 1 or 2", where=f"{table}:{strange}")
    return unlabelled(PictureFiles(root, [name for name, part in rows if part == PARTITION[split]]), spec.name)


def _unsorted(folder: Path, spec: ImageSpec, split: Split) -> ImageSet | None:
    """All pictures below a folder, one in five held out."""
    names = every_picture(folder)
    return unlabelled(PictureFiles(folder, names), spec.name).held_out(split) if names else None


def _folders(folder: Path, split: Split) -> Listing | None:
    """One folder a split; None where there is none of this split."""
    train, wanted = split_folder(folder, "train"), split_folder(folder, split)
    if train is None or wanted is None:
        return None
    known = _listing(train)
    return known if split == "train" else _listing(wanted, known.classes)


def _listing(root: Path, classes: Sequence[str] | None = None) -> Listing:
    if (root / METADATA).is_file():
        return metadata_listing(root, classes)
    names = every_picture(root, deep=False)
    if names and not any(root.glob("[!.]*/")):  # nobody sorted them, as what a generator learns need not be
        return Listing(root, names, [0] * len(names), (UNSORTED,))
    return class_folders(root, classes)
