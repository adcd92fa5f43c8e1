"""Open a subject's pictures: a folder of the DreamBooth set, a folder of one's own, the hub, or scikit-image's cat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.errors import RecipeError, UsageError

from .hub_images import HubPictures
from .picture_folders import every_picture
from .pictures import Box, PictureFiles, Pictures, decoded
from .text_files import open_dataset

if TYPE_CHECKING:
    from PIL.Image import Image

    from ortho_cli.recipe.data_subject import SubjectPictures

__all__ = ["HUB", "TREE", "load_subject", "subject_folder"]

HUB = "google/dreambooth"
TREE = ("FOLDER/<subject>/00.jpg   4 to 6 pictures of each of the 30 subjects, of any type",)
VIEWS = (
    (60, 0, 340, 280),
    (0, 20, 280, 300),
    (120, 10, 400, 290),
    (100, 40, 360, 300),
)  # of the cat: squares around it


class _Cat:
    """Four views of the one picture of a cat that lies in scikit-image's wheel."""

    def __init__(self, views: Sequence[Box] = VIEWS) -> None:
        from PIL import Image

        try:
            import skimage.data
        except ImportError as error:
            raise UsageError("skimage-cat comes with scikit-image", hint="pip install scikit-image") from error
        pictures: Any = skimage.data
        self.picture, self.views = Image.fromarray(pictures.chelsea()), views

    def __len__(self) -> int:
        return len(self.views)

    def open(self, place: int) -> Image:
        return self.picture.crop(self.views[place])

    def select(self, places: Sequence[int]) -> _Cat:
        return _Cat([self.views[place] for place in places])


def load_subject(config: SubjectPictures, subject: str | None) -> Pictures:
    """All pictures of a subject; each is decoded once, so that a broken one is told before training starts.

    Args:
        config: the recipe's `data` section.
        subject: of the DreamBooth set; None: one's own.

    Raises:
        UsageError: a library is not installed.
        RecipeError: no such folder, none of this subject, no pictures in it, or one that is broken.
    """
    if config.name == "skimage-cat":
        return _Cat()
    if config.name == "dreambooth" and subject is None:
        raise RecipeError("data dreambooth has many subjects", hint="choose one: task.subject, e.g. cat")
    if config.path is None:
        return _hub(config.source or HUB, str(subject))
    root = subject_folder(config, str(subject))
    if not root.is_dir():
        raise RecipeError(f"there is no folder {str(root)!r}", hint=f"expected {TREE[0]}")
    names = every_picture(root, deep=False)
    if not names:
        raise RecipeError("it holds no pictures", hint="4 to 6 of the subject will do", where=str(root))
    for name in names:
        decoded(root / name, str(root / name))
    return PictureFiles(root, names)


def subject_folder(config: SubjectPictures, subject: str) -> Path:
    """Where a subject's pictures are; `dataset/`, as the set is published, may be around its folders."""
    root = Path(str(config.path)).expanduser()
    if config.name != "dreambooth":
        return root
    inside = [root / subject, root / "dataset" / subject]
    return next((folder for folder in inside if folder.is_dir()), inside[0])


def _hub(source: str, subject: str) -> Pictures:
    name, _, revision = source.partition("@")
    rows = open_dataset(
        f"{subject!r} of the hub set {name!r}", name, subject, split="train", revision=revision or None, extra="vision",
        hint=f"a local copy will do: data.path: FOLDER, with {TREE[0]}",
    )  # fmt: skip
    return HubPictures(rows, "image")
