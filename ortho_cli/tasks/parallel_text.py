"""Sentences in two languages, by part: text files of one's own, sets of the hub, or messages of installed packages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ortho_cli.errors import RecipeError

from .catalogues import catalogue_messages, message_part
from .text_files import open_dataset

if TYPE_CHECKING:
    from ortho_cli.recipe.translation import Parallel

__all__ = ["NAMES", "SPECS", "Pair", "ParallelSpec", "Part", "read_lines", "read_pairs"]

Part = Literal["train", "val", "test"]
Pair = tuple[str, str]
"""A sentence, and its translation."""

NAMES: dict[Part, tuple[str, ...]] = {
    "train": ("train",), "val": ("valid", "val", "validation", "dev"), "test": ("test",),
}  # fmt: skip
COLUMN = "translation"


@dataclass(frozen=True)
class ParallelSpec:
    """What is known about a set without opening it; `hub` is an id, `config` its configuration there."""

    name: str
    title: str
    hub: str | None = None
    revision: str | None = None
    config: str | None = None
    fetch: tuple[str, ...] = ()


_LOCAL = "or two files a part in a folder of your own: data.path (names as above)"
SPECS: dict[str, ParallelSpec] = {
    spec.name: spec
    for spec in (
        ParallelSpec(
            "iwslt14-de-en",
            "talks, German and English, 160,239 pairs to train on (fairseq's split, lower-cased, Moses tokens)",
            "bbaaaa/iwslt14-de-en-preprocess",
            "refs/convert/parquet",
            "de-en",
            ("from the hub: pip install 'ortho-cli[text]'", _LOCAL),
        ),
        ParallelSpec(
            "wmt14-de-en",
            "news and parliament, German and English, 4,508,785 pairs to train on",
            "wmt/wmt14",
            None,
            "de-en",
            ("from the hub: pip install 'ortho-cli[text]'", _LOCAL),
        ),
        ParallelSpec(
            "parallel-text",
            "your own sentences, a line each",
            fetch=("or name a set of the hub with a column `translation`: source: ORG/NAME[@revision]",),
        ),
        ParallelSpec(
            "catalogues",
            "messages of installed Python packages in English and another language",
            fetch=("pip install django; more packages: data.packages",),
        ),
    )
}


def read_pairs(config: Parallel, part: Part) -> list[Pair]:
    """One part of a set, as it is written; pairs with an empty side are left out.

    Raises:
        RecipeError: it is not there, or its two sides do not fit; the hint says what to type.
        UsageError: the library for sets of the hub is not installed.
    """
    if config.name == "catalogues":
        pairs = _messages(config, part)
    elif config.path is not None:
        pairs = _files(Path(config.path).expanduser(), config.languages, part)
    else:
        pairs = _hub(config, part)
    stripped = [(first.strip(), second.strip()) for first, second in pairs]
    kept = [pair for pair in stripped if all(pair)]
    if not kept:
        raise RecipeError(f"data {config.name}: the part {part} has no pairs of sentences")
    return kept


def read_lines(file: Path) -> list[str]:
    r"""The lines of a text file; only `\n` ends one, whatever else Unicode knows.

    Raises:
        RecipeError: no such file, or not UTF-8.
    """
    try:
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines and not lines[-1] else lines


def _messages(config: Parallel, part: Part) -> Iterable[Pair]:
    """Both languages of the messages of a part."""
    reads_english = config.languages[0] == "en"
    foreign = config.languages[1 if reads_english else 0]
    for message in catalogue_messages(config.packages, foreign):
        if message_part(message.english) == part:
            pair = (message.english, message.foreign)
            yield pair if reads_english else pair[::-1]


def _files(folder: Path, languages: tuple[str, str], part: Part) -> list[Pair]:
    """Two files, a line a sentence."""
    for name in NAMES[part]:
        paths = [folder / f"{name}.{language}" for language in languages]
        if not all(path.is_file() for path in paths):
            continue
        sides = [read_lines(path) for path in paths]
        if len(sides[0]) != len(sides[1]):
            raise RecipeError(
                f"{paths[0]} has {len(sides[0])} lines and {paths[1].name} {len(sides[1])}, expected as many"
            )
        return list(zip(sides[0], sides[1], strict=True))
    wanted = " and ".join(f"{NAMES[part][0]}.{language}" for language in languages)
    raise RecipeError(f"data.path: {folder} has no {wanted}", hint="see: ortho recipe check --data RECIPE")


def _hub(config: Parallel, part: Part) -> list[Pair]:
    """A split of a hub set, whose column `translation` holds both languages."""
    spec = SPECS[config.name]
    name, _, revision = (config.source or spec.hub or "").partition("@")
    usual = config.source is None
    found = open_dataset(
        f"data {config.name}: the hub set {name!r}", name, spec.config if usual else None,
        revision=revision or (spec.revision if usual else None),
        hint="name a local folder: data.path, see: ortho recipe check --data",
    )  # fmt: skip
    split = next((word for word in NAMES[part] if word in found), None)
    if split is None:
        raise RecipeError(f"the hub set {name!r} has the splits {', '.join(found)}, and none for {part}")
    rows: Any = found[split]
    if COLUMN not in rows.column_names:
        raise RecipeError(
            f"the hub set {name!r} has the columns {', '.join(rows.column_names)}, and no {COLUMN!r} of both languages"
        )
    first, second = config.languages
    pairs = []
    for row in rows[COLUMN]:
        if first not in row or second not in row:
            raise RecipeError(
                f"the hub set {name!r} has the languages {', '.join(row)}, expected {first} and {second}",
                hint="set data.languages",
            )
        pairs.append((row[first] or "", row[second] or ""))
    return pairs
