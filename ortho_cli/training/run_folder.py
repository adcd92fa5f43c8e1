"""The folder of a run: whose it is, whether a recipe may go on in it, and what is removed when one begins anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ortho_cli.checkpoints.output import atomic, existing_parent
from ortho_cli.errors import OutputError
from ortho_cli.recipe.train import difference, load_train, may_change, resolved_yaml

from .state import BEST, last_checkpoint

__all__ = ["OUTCOME", "RECIPE", "begin", "best_or_last", "check_folder", "check_same_recipe", "write_json"]

RECIPE, OUTCOME = "recipe.yaml", "outcome.json"
# Everything a run writes, and nothing else, goes when it is begun anew.
SOURCES = ("base", "adapter", "teacher")  # keys of weights to start from
WRITTEN = (
    RECIPE, OUTCOME, "metrics.jsonl", "timing.jsonl", "checkpoints", "export", "samples", "trackers", "report.html",
    "figures", "evaluation", "README.md", "trace.json", "profile.txt", "vocabulary", "items",
)  # fmt: skip


def check_folder(folder: Path, recipe: Any, *, resume: bool, force: bool) -> None:
    """Refuse a folder that holds something, unless told what to do with it; nothing is changed.

    Raises:
        OutputError: it exists and neither `resume` nor `force` was given; there is nothing to resume; the recipe is
            another one; or `force` would remove what the run starts from.
    """
    existing_parent(folder)
    if resume:
        if not (folder / RECIPE).is_file():
            raise OutputError(f"{folder} holds no run, so there is nothing to resume", hint="start it without --resume")
        check_same_recipe(folder, recipe)
    elif force:
        _check_own_source(folder, recipe)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            f"run folder exists: {folder}",
            hint="go on with --resume, begin anew with --force, or --set run.dir=OTHER",
        )


def _check_own_source(folder: Path, recipe: Any) -> None:
    """Refuse to remove a folder that holds the weights to start from."""
    own = folder.resolve()
    for source in _sources(recipe.model_dump()):
        path = Path(source).expanduser().resolve()
        if path.exists() and (path == own or own in path.parents):
            raise OutputError(
                f"--force would remove {source}, which the run starts from",
                hint="write the run elsewhere: --set run.dir=OTHER",
            )


def _sources(section: Any) -> Iterator[str]:
    """The weights that a recipe names, in every section."""
    items = section.items() if isinstance(section, Mapping) else enumerate(section)
    for key, value in items:
        if key in SOURCES and isinstance(value, str):
            yield value
        elif isinstance(value, (Mapping, list, tuple)):
            yield from _sources(value)


def check_same_recipe(folder: Path, recipe: Any) -> list[str]:
    """The keys in which a recipe differs from that of a run, all of which may.

    Raises:
        OutputError: others differ too; the message has their old and new values.
    """
    found = difference(load_train(folder / RECIPE), recipe)
    refused = [
        f"{key}: was {json.dumps(old)}, now {json.dumps(new)}"
        for key, old, new in found
        if not may_change(key, old, new)
    ]
    if refused:
        raise OutputError(
            f"the recipe changed since {folder} was started: {'; '.join(refused)}",
            hint="resume with the same recipe, or start another run with --set run.dir=OTHER",
        )
    return [key for key, _, _ in found]


def begin(folder: Path, recipe: Any, *, anew: bool, continued: Collection[int] = ()) -> None:
    """Write the resolved recipe, after removing what an earlier run left where it begins anew.

    `continued`: as `resolved_yaml` takes it.
    """
    if anew:
        for name in WRITTEN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    with atomic(folder / RECIPE) as partial:
        partial.write_text(resolved_yaml(recipe, continued), "utf-8")


def best_or_last(folder: Path) -> Path | None:
    """The checkpoint of a run that evaluated best, else the newest."""
    best = folder / "checkpoints" / BEST
    return best if best.is_dir() else last_checkpoint(folder)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, complete or not at all."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")
