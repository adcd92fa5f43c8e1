"""Real sentence pairs that come with Python packages: the message catalogues (`.mo`) of their translations.

Django and its applications say everything in English and in dozens of languages. Read, cleaned and freed of repeats,
their catalogues are a small parallel corpus that needs no download beyond the packages themselves.
"""

from __future__ import annotations

import gettext
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ortho_cli.errors import RecipeError

__all__ = ["DISTRIBUTIONS", "Message", "catalogue_messages", "message_part"]

Part = Literal["train", "val", "test"]

# What to install for packages whose distribution has another name; without what they depend on, of which no code runs.
DISTRIBUTIONS = {
    "allauth": "django-allauth", "cms": "django-cms", "oscar": "django-oscar", "rest_framework": "djangorestframework",
}  # fmt: skip
CONTEXT = "\x04"  # between the context of a message and the message (GNU gettext)
PLACEHOLDER = re.compile(r"%\(\w+\)[sdifr]|%[sdifr]|\{[\w.!:]*\}|\$\{\w+\}")
WORD = re.compile(r"[^\W\d_]{2,}")
SENTENCE_END = " .:!?…"
HELD_OUT = {0: "val", 1: "test"}  # of ten parts
TENTHS = 10


@dataclass(frozen=True)
class Message:
    """A message in English and in another language, and the part of a package it belongs to."""

    package: str
    component: str
    english: str
    foreign: str


def catalogue_messages(packages: Sequence[str], language: str) -> list[Message]:
    """Read the messages of installed packages in one language, cleaned, each English text once.

    White space is made single spaces; of messages with plurals the singular is taken. Left out are messages that are
    not translated (equal, or without a word), translations that lost or changed a placeholder such as `%(name)s`, and
    English texts that differ from an earlier one only in case or in the end of the sentence.

    Args:
        packages: names as they are imported; nothing of them is run.
        language: of the catalogues, e.g. `de` or `pt_BR`.

    Returns:
        In a fixed order: by package as given, then by file and text.

    Raises:
        RecipeError: a package that is not installed, or has no catalogue of the language; with what to type.
    """
    found: dict[str, Message] = {}
    for package in packages:
        for file in _files(package, language):
            component = file.parents[3].name
            for english, foreign in sorted(_pairs(file)):
                english, foreign = " ".join(english.split()), " ".join(foreign.split())
                if _is_translated(english, foreign):
                    found.setdefault(_key(english), Message(package, component, english, foreign))
    return list(found.values())


def message_part(english: str) -> Part:
    """The part that a message is in: a tenth to validate on, a tenth to test on, by a hash of its English text.

    So no two parts share a text (also not up to case and the end of the sentence), and a message stays in its part when
    packages are added or renewed.

    >>> message_part("Save changes") == message_part("save changes.")
    True
    """
    digest = hashlib.blake2b(_key(english).encode("utf-8"), digest_size=8).digest()
    part: Any = HELD_OUT.get(int.from_bytes(digest, "big") % TENTHS, "train")
    return part  # type: ignore[no-any-return]


def _files(package: str, language: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            f"data catalogues: the package {package} is not installed",
            hint=f"pip install --no-deps {DISTRIBUTIONS.get(package, package.replace('_', '-'))}",
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(root.glob(f"**/locale*/{language}/LC_MESSAGES/*.mo"))
    if not files:
        known = sorted({file.parents[1].name for file in root.glob("**/locale*/*/LC_MESSAGES/*.mo")})
        raise RecipeError(
            f"data catalogues: the package {package} has no messages in {language!r}",
            hint=f"it has: {', '.join(known) or 'none'}",
        )
    return files


def _pairs(file: Path) -> Iterator[tuple[str, str]]:
    """English and foreign texts of one catalogue, as they are."""
    with file.open("rb") as opened:
        translations: Any = gettext.GNUTranslations(opened)
    # The only way to list a catalogue: its public functions look single messages up.
    for key, foreign in translations._catalog.items():
        english, form = key if isinstance(key, tuple) else (key, 0)
        if english and form == 0:
            yield english.rpartition(CONTEXT)[2], foreign


def _is_translated(english: str, foreign: str) -> bool:
    if english == foreign or not (WORD.search(english) and WORD.search(foreign)):
        return False
    return sorted(PLACEHOLDER.findall(english)) == sorted(PLACEHOLDER.findall(foreign))


def _key(english: str) -> str:
    return " ".join(english.split()).casefold().rstrip(SENTENCE_END)
