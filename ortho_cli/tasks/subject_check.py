"""Tell what pictures of a subject a recipe needs, and whether they are there: a part of `ortho recipe check --data`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.recipe.subjects import SUBJECTS

from .subject_data import HUB, TREE, load_subject, subject_folder

if TYPE_CHECKING:
    from ortho_cli.recipe.data_subject import SubjectPictures

__all__ = ["check_subject", "describe_subject", "found_subject"]


def describe_subject(config: SubjectPictures) -> str:
    """What the recipe's pictures are, how a local copy looks, and how to get it; nothing is opened."""
    if config.name == "skimage-cat":
        return "skimage-cat: four views of a cat\nto get it:\n  pip install scikit-image"
    if config.name == "subject-folder":
        return f"subject-folder: some pictures of one subject\nread from: {config.path}"
    place = f"{config.path}   (FOLDER below)" if config.path is not None else f"the hub, {config.source or HUB}"
    lines = ["dreambooth: 30 subjects, 4 to 6 pictures each (CC BY 4.0, and the licences of the photographers)"]
    lines += [f"read from: {place}", "a local copy (data.path: FOLDER) looks like", *(f"  {line}" for line in TREE)]
    return "\n".join([*lines, "to get it:", f"  hf download --repo-type dataset {HUB} --local-dir FOLDER"])


def check_subject(config: SubjectPictures) -> dict[str, Any]:
    """Open every picture of every subject that is there, and count.

    Returns:
        `name` and `subjects`, the number of pictures by subject; of one's own by the folder's name.

    Raises:
        RecipeError: there are none, or one is broken.
    """
    if config.name != "dreambooth":
        name = Path(config.path).name if config.path is not None else "cat"
        return {"name": config.name, "subjects": {name: len(load_subject(config, None))}}
    local = config.path is not None
    there = [name for name in SUBJECTS if not local or subject_folder(config, name).is_dir()] or list(SUBJECTS)[:1]
    return {"name": config.name, "subjects": {name: len(load_subject(config, name)) for name in there}}


def found_subject(found: dict[str, Any]) -> str:
    """What `check_subject` found, in words."""
    counts = found["subjects"]
    return f"found: {sum(counts.values())} pictures of {len(counts)} subjects: " + ", ".join(
        f"{name} {count}" for name, count in counts.items()
    )
