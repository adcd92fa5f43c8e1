"""Made arithmetic in words, with held-out pairs of numbers, and English prose: a language to learn in minutes.

Each sample is a function of its number alone. Which pairs of numbers are held out is a hash of them, the same for every
operation and phrasing, so that no held-out question has been answered in training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib import resources

import numpy as np

from .draws import seed_of, uniform

__all__ = ["arithmetic", "is_held_out", "prose"]

SIGNS = {"plus": "+", "minus": "-", "times": "*"}
PHRASES = ("What is {a} {word} {b}?", "Compute {a} {word} {b}.", "{a} {word} {b} is what?")
STREAMS = {"train": 11, "eval": 12}
HELD_OUT = 8  # one pair of numbers in so many
LONGEST = 100  # letters of a piece of prose, where its sentences are no longer


def arithmetic(
    split: str, samples: int, operations: tuple[str, ...], digits: int, text: float = 0.0
) -> Iterator[tuple[str, str]]:
    r"""Make questions with their answers.

    Args:
        split: `train`, or `eval`, whose pairs of numbers `train` never has.
        samples: how many.
        operations: `plus`, `minus`, `times`.
        digits: of a number at most.
        text: share of samples that are prose: an empty query, and a piece of text.

    Yields:
        Query and response.

    >>> list(arithmetic("train", 2, ("plus",), 2))[0]
    ('27 plus 34 is what?', '27 + 34 = 61\nThe answer is: 61')
    """
    pieces = prose() if text else ()
    for kind, operation, phrase, where, numbers in uniform(0, 0, np.arange(samples), 5, STREAMS[split]):
        if kind < text:
            yield "", pieces[int(where * len(pieces))]
            continue
        a, b = _pair(numbers, 10**digits, held_out=split == "eval")
        word = operations[int(operation * len(operations))]
        result = {"plus": a + b, "minus": a - b, "times": a * b}[word]
        query = PHRASES[int(phrase * len(PHRASES))].format(a=a, b=b, word=word)
        yield query, f"{a} {SIGNS[word]} {b} = {result}\nThe answer is: {result}"


def _pair(drawn: float, below: int, *, held_out: bool) -> tuple[int, int]:
    """Two numbers below a bound: those drawn, else the next pair that is on the wanted side."""
    place = int(drawn * below**2)
    while is_held_out(*divmod(place, below)) != held_out:
        place = (place + 1) % below**2
    return divmod(place, below)


def is_held_out(a: int, b: int) -> bool:
    """Whether a pair of numbers is kept from training."""
    return seed_of(a, b) % HELD_OUT == 0


@cache
def prose() -> tuple[str, ...]:
    """Pieces of English: the sentences of scikit-learn's descriptions of its data sets, without tables and markup."""
    found = []
    for file in sorted(resources.files("sklearn.datasets.descr").iterdir(), key=lambda item: item.name):
        if file.name.endswith(".rst"):
            for paragraph in file.read_text("utf-8").split("\n\n"):
                line = re.sub(r"[`*_]", "", " ".join(paragraph.split()))
                if re.fullmatch(r"[A-Z].{30,}[.:]", line) and not re.search(r":\w+:|\.\. |==|--|https?:|>>>|::", line):
                    found += _cut(line)
    return tuple(found)


def _cut(line: str) -> list[str]:
    """Whole sentences, put together up to `LONGEST` letters."""
    pieces: list[str] = []
    for sentence in re.split(r"(?<=[.;]) ", line):
        if pieces and len(pieces[-1]) + len(sentence) < LONGEST:
            pieces[-1] += f" {sentence}"
        else:
            pieces.append(sentence)
    return [piece for piece in pieces if len(piece) <= 2 * LONGEST]
