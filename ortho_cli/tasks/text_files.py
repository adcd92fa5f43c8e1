"""Tables of texts from local files and the hub, through `datasets`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ortho_cli.errors import RecipeError, UsageError

__all__ = ["EVALUATION", "hub_table", "local_table", "open_dataset"]

BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    # "NA" and "null" are words; an empty field stays an empty text, and is refused as one.
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}
EVALUATION = ("validation", "val", "valid", "dev", "test")  # what the split to judge by is called, first one first
SHOWN = 200  # letters of another library's message
EMPTY = "has no rows"


def local_table(path: str, split: str) -> Any | None:
    """One split of a file, or of a folder with a file (or several, numbered) for each.

    Args:
        path: a file, which is the split `train`; or a folder.
        split: `train`, `validation` ...: what the file's name begins with.

    Returns:
        A `datasets.Dataset`; None where the folder has no such split.

    Raises:
        RecipeError: no such file or folder, or one that cannot be read.
        UsageError: `datasets` is not installed.
    """
    place = Path(path).expanduser()
    if place.is_file():
        files = [place] if split == "train" else []
        if place.suffix not in BUILDERS:
            raise RecipeError(f"data.path: {path!r} is none of {', '.join(BUILDERS)}")
    elif place.is_dir():
        files = sorted(
            file for suffix in BUILDERS for pattern in (f"{split}{suffix}", f"{split}-*{suffix}")
            for file in place.glob(pattern)
        )  # fmt: skip
    else:
        raise RecipeError(f"data.path: there is no {path!r}")
    if not files:
        return None
    kinds = {file.suffix for file in files}
    if len(kinds) > 1:
        raise RecipeError(f"data.path: {path!r} has {split} as {' and as '.join(sorted(kinds))}; keep one of them")
    builder, options = BUILDERS[kinds.pop()]
    names = [str(file) for file in files]
    return open_dataset(f"data.path {path!r}", builder, data_files={"train": names}, split="train", **options)


def hub_table(source: str, config: str | None) -> dict[str, Any]:
    """All splits of a hub set.

    Args:
        source: `ORG/NAME[@revision]`.
        config: of its configurations; None: the only one.

    Raises:
        RecipeError: not reachable, gated, or no such set.
        UsageError: `datasets` is not installed.
    """
    name, _, revision = source.partition("@")
    return dict(open_dataset(f"the hub set {name!r}", name, config, revision=revision or None))


def open_dataset(what: str, *arguments: Any, hint: str | None = None, extra: str = "text", **options: Any) -> Any:
    """What `datasets.load_dataset` gives, or why it gives nothing.

    Args:
        what: is opened, as messages call it.
        arguments: of `load_dataset`.
        hint: of the error.
        extra: of ours that brings `datasets`, where it is missing.
        options: of `load_dataset`.

    Raises:
        RecipeError: not there, not reachable, gated, empty or malformed.
        UsageError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{what} needs the datasets library", hint=f"pip install 'ortho-cli[{extra}]'") from error
    logs = datasets.logging
    level, no_bars = logs.get_verbosity(), datasets.are_progress_bars_disabled()
    logs.set_verbosity(logs.CRITICAL)  # what it logs of a broken file, the error says again
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*arguments, **options)
    except StopIteration as error:  # a file of JSON lines without a line
        raise RecipeError(f"{what} {EMPTY}", hint=hint) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error  # "An error occurred while generating the dataset" says nothing
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0][:SHOWN]
        if reason.endswith("corresponds to no data!"):
            raise RecipeError(f"{what} {EMPTY}", hint=hint) from error
        raise RecipeError(f"{what} does not open: {reason}", hint=hint) from error
    finally:
        logs.set_verbosity(level)
        if not no_bars:
            datasets.enable_progress_bars()
