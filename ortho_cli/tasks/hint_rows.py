"""Which pictures, hints and prompts a folder holds, a row a sample: the layouts of the published sets, or one's own.

{"source": "source/15.png", "target": "target/15.png", "prompt": "a city"}    JSON lines, as ControlNet's
[{"image": "29970.jpg", "prompt": "a woman with ..."}, ...]                   one JSON array, as CelebA-HQ's
{"file_name": "a.png", "hint_file_name": "a-edges.png", "text": "a cat"}      JSON lines, `metadata.jsonl`
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ortho_cli.errors import RecipeError

from .hint_specs import SPECS, HintSpec
from .image_specs import Split
from .picture_folders import METADATA, lines_of, split_folder

if TYPE_CHECKING:
    from ortho_cli.recipe.data_hints import HintedPictures, HintKind

__all__ = ["HintRow", "missing_hints", "read_rows"]

PROMPTS = ("text", "prompt", "caption")  # keys by which a prompt is known
SHAPES = "expected source, target and prompt, or image and prompt, or file_name and text"


@dataclass(frozen=True)
class HintRow:
    """One sample: its files, its prompt, and the line it stands in; or what is wrong with that line.

    Without a hint, that is made of the picture.
    """

    picture: Path
    hint: Path | None
    prompt: str
    where: str
    fault: RecipeError | None = None


def read_rows(config: HintedPictures, split: Split) -> tuple[list[HintRow], bool]:
    """List the samples of a split, without opening a picture.

    Args:
        config: the recipe's `data` section.
        split: `train` or `eval`.

    Returns:
        The rows, and whether they are of that split; else they are of both, and are yet to be parted.

    Raises:
        RecipeError: no such folder or no file of prompts (with the tree that was expected), or nothing in it. A line
            that is none of the three forms, leaves the folder, or has no hint where none can be made, is a faulty row.
    """
    assert config.path is not None
    folder, spec = Path(config.path).expanduser(), SPECS[config.name]
    if not folder.is_dir():
        raise missing_hints(spec, f"data.path: there is no folder {str(folder)!r}", str(folder))
    index, root = _index(folder, spec, split)
    whole = index is None and spec.name == "hint-folder"
    if whole:
        index, root = _index(folder, spec, None)
    if index is None:
        raise missing_hints(spec, f"data.path {str(folder)!r} has no file of prompts for {split}", str(folder))
    rows = []
    for entry, where in _entries(index):
        try:
            value = _object(_json(entry, where) if isinstance(entry, str) else entry, where)
            rows.append(_row(value, where, root, spec, config.hint, split))
        except RecipeError as fault:
            rows.append(HintRow(root, None, "", where, fault))
    if not rows:
        raise RecipeError("it names no picture", where=str(index))
    return rows, not whole


def missing_hints(spec: HintSpec, message: str, where: str | None = None) -> RecipeError:
    """The error for data that is not there: how a copy looks, and how to get one."""
    return RecipeError(message, hint="\n  ".join(["expected:", *spec.tree, "get it:", *spec.fetch]), where=where)


def _index(folder: Path, spec: HintSpec, split: Split | None) -> tuple[Path | None, Path]:
    """The file that lists a split (None: of a folder without splits), and what its names are relative to."""
    if spec.name != "hint-folder":
        assert split is not None
        part = "train" if split == "train" else "val"
        names = [f"prompt_{part}_blip_full.json"] * (split == "eval") + [f"prompt_{part}_blip.json"]
        places = [place / name for name in names for place in (folder, folder / part)]
        return next((place for place in places if place.is_file()), None), folder
    root = folder if split is None else split_folder(folder, split)
    if root is None:
        return None, folder
    for name in (METADATA, "prompt.json", "prompts.jsonl"):
        if (root / name).is_file():
            return root / name, root
    return None, root


def _entries(index: Path) -> Iterator[tuple[Any, str]]:
    """Every entry of a file, a line that is yet to be parsed or a value of one array, and the place to name for it."""
    lines = lines_of(index)
    if next((line for line in lines if line.strip()), "").lstrip().startswith("["):
        for number, value in enumerate(_json("\n".join(lines), str(index))):
            yield value, f"{index}: entry {number}"
        return
    yield from ((line, f"{index}:{number}") for number, line in enumerate(lines, start=1) if line.strip())


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"no JSON: {str(error)[:120]}", where=where) from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{json.dumps(value)[:80]} is no object", hint=SHAPES, where=where)
    return value


def _row(value: dict[str, Any], where: str, root: Path, spec: HintSpec, hint: HintKind, split: Split) -> HintRow:
    """One sample of one of the three forms."""
    prompt = next((value[key] for key in PROMPTS if isinstance(value.get(key), str)), None)
    own = spec.name == "hint-folder"
    if "source" in value and "target" in value:  # the hint, and the picture; in a published set both have one name
        picture, drawn = (value["target"], value["source"]) if own else (_tail(value["source"], where),) * 2
    else:
        picture = value.get("file_name", value.get("image"))
        drawn = value.get("hint_file_name") if own else picture
    if not isinstance(picture, str) or prompt is None or not isinstance(drawn, str | None):
        raise RecipeError(f"{json.dumps(value)[:80]} has no picture or no prompt", hint=SHAPES, where=where)
    if own:
        if drawn is None and hint != "canny":
            raise RecipeError(f"no hint_file_name, and a {hint} hint cannot be made", where=where)
        return HintRow(_inside(root, picture, where), _inside(root, drawn, where) if drawn else None, prompt, where)
    part = "train" if split == "train" else "val"
    pictures, hints = (root / pattern.format(split=part, hint=hint) for pattern in (spec.pictures, spec.hints[hint]))
    if hint == "canny" and not hints.is_dir():
        return HintRow(_inside(pictures, picture, where), None, prompt, where)
    drawn = str(PurePosixPath(drawn or picture).with_suffix(".png"))
    return HintRow(_inside(pictures, picture, where), _inside(hints, drawn, where), prompt, where)


def _tail(name: Any, where: str) -> str:
    """The name behind the first folder, which published files write as `source/`."""
    if not isinstance(name, str) or "/" not in name:
        raise RecipeError(f"source {str(name)[:80]!r} is not source/NAME", where=where)
    return name.partition("/")[2]


def _inside(root: Path, name: str, where: str) -> Path:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not name.strip("."):
        raise RecipeError(f"{name!r} leaves the folder", where=where)
    return root / name
