r"""Is a model's answer to a mathematical question right? The last answer in a text, and whether two mean the same.

Equivalence is math-verify's (sympy behind it), with a guard before it for what a parser of formulas cannot know: words
are no products of letters, and a numeral's base belongs to its value. Nothing is "nearly" right: a hundredth or a
hundredfold of the gold answer is wrong, so are the first digits of an irrational, and what cannot be read.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from fractions import Fraction
from importlib import import_module
from typing import Any

from ortho_cli.errors import UsageError

__all__ = ["final_answer", "last_boxed", "math_verify", "plain", "same_answer"]

MARKER = re.compile(r"(?:the\s+(?:final\s+)?answer\s+is\s*:?|####)\s*", re.IGNORECASE)
SENTENCE_END = re.compile(r"\.(?=\s+[A-Z])")  # behind it another sentence begins
BOXED = re.compile(r"\\f?box(?:ed)?(?:\s*(?=\{)|\s+(?=[-\d\\]))")
UNBRACED = re.compile(r"[^$\s]*[^$\s.]")  # of "\boxed 5$.", as some solutions of MATH have it
WRAPPER = re.compile(r"\\(?:text|textbf|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
NUMBER = re.compile(r"(?P<sign>[-+]?)(?P<whole>\d{1,3}(?:,\d{3})+|\d*)(?P<part>\.\d+)?(?:/(?P<below>\d+))?")
NUMERAL = re.compile(r"(?P<digits>[0-9A-Za-z]+)_\{?(?P<base>\d{1,2})\}?")
WORD = re.compile(r"[A-Za-z][A-Za-z' -]+[A-Za-z.]")
CHOICE = re.compile(r"\(?([A-Za-z])\)?")
DIGITS = 12  # behind the point, to which numbers are the same: as many as floating point is sure of
TIMEOUT = 5  # seconds for sympy to parse or compare; then they are not the same


def final_answer(text: str) -> str | None:
    r"""The answer that a text ends with: behind "The answer is" or "####", or in a ``\boxed{}``, whichever is last.

    Args:
        text: a whole response; of several answers the last counts.

    Returns:
        The answer as it is written, without the sentence around it; None: the text gives none.

    >>> final_answer("So 4^2 = 16. The answer is: 16."), final_answer("2 + 2 = 4\n#### 4"), final_answer("I think 5")
    ('16', '4', None)
    """
    marker = max((match.end() for match in MARKER.finditer(text)), default=-1)
    start, boxed = _last_box(text)
    if boxed is not None and start >= marker:
        return plain(boxed) or None
    if marker < 0:
        return None
    line = text[marker:].strip().split("\n", 1)[0]
    return plain(SENTENCE_END.split(line, maxsplit=1)[0]) or None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}``, braces matched; None without one, or where it is not closed.

    >>> last_boxed(r"$\boxed{1}$, so $\boxed{\frac{1}{2}}$."), last_boxed(r"It is $\boxed 5$.")
    ('\\frac{1}{2}', '5')
    """
    return _last_box(text)[1]


def _last_box(text: str) -> tuple[int, str | None]:
    """Where the last box begins, and what is in it."""
    boxes = list(BOXED.finditer(text))
    if not boxes:
        return -1, None
    start, place = boxes[-1].span()
    if text[place] != "{":
        bare = UNBRACED.match(text, place)
        return start, bare[0] if bare else None
    depth = 0
    for end in range(place, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return start, text[place + 1 : end]
    return start, None


def plain(answer: str) -> str:
    r"""An answer without dollars, outer spaces and the full stop of its sentence.

    >>> plain(r" $\frac{1}{2}$. "), plain("18.00")
    ('\\frac{1}{2}', '18.00')
    """
    found = answer.strip()
    while found[-1:] == "." or (found[:1] == "$" and found[-1:] == "$" and len(found) > 1):
        found = (found[1:-1] if found[-1] == "$" else found[:-1]).strip()
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        if found.startswith(opening) and found.endswith(closing):
            found = found[len(opening) : -len(closing)].strip()
    return found


def same_answer(gold: str | None, answer: str | None) -> bool:
    r"""Whether an answer means the gold one: equal numbers, expressions, sets, intervals, matrices or words.

    Args:
        gold: as the data gives it.
        answer: as the model gives it, e.g. by `final_answer`; None: it gave none.

    Raises:
        UsageError: math-verify is needed (the answer is neither a number nor a word) and not installed.

    >>> same_answer("1800", "1,800.0"), same_answer("1800", "18"), same_answer("0.5", "1/2"), same_answer("5", None)
    (True, False, True, False)
    """
    if gold is None or answer is None:
        return False
    first, second = plain(gold), plain(answer)
    if not first or not second:
        return False
    numbers = _number(first), _number(second)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] == numbers[1]
    numerals = NUMERAL.fullmatch(first), NUMERAL.fullmatch(second)
    if any(numerals):
        return all(numerals) and _digits(numerals[0]) == _digits(numerals[1])
    words = _word(first), _word(second)
    if any(words):
        return words[0] == words[1]
    return first == second or _verified(first, second)


def _number(text: str) -> Fraction | None:
    """The exact value of digits with grouping commas, a decimal part or a denominator; a currency's sign is nothing."""
    match = NUMBER.fullmatch(re.sub(r"\\?\$|\\!", "", text).strip())
    if match is None or not (match["whole"] or match["part"]):
        return None
    below = int(match["below"] or 1)
    if not below:
        return None
    value = Fraction(f"{match['whole'].replace(',', '') or '0'}{match['part'] or ''}") / below
    return -value if match["sign"] == "-" else value


def _digits(match: re.Match[str] | None) -> tuple[str, int] | None:
    return (match["digits"].lstrip("0").upper(), int(match["base"])) if match else None


def _word(text: str) -> str | None:
    """A word, name or choice in one spelling; None for what may be a formula."""
    inner = WRAPPER.fullmatch(text)
    bare = (inner[1] if inner else text).strip()
    choice = CHOICE.fullmatch(bare)
    if choice:
        return choice[1].upper() if inner or bare.isupper() or "(" in bare else None
    return " ".join(bare.rstrip(".").casefold().split()) if WORD.fullmatch(bare) else None


def math_verify(gold: str, answer: str) -> Any:
    """The library that compares two answers, which an error names.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module("math_verify")
    except ImportError as error:
        raise UsageError(
            f"comparing the answers {gold[:40]!r} and {answer[:40]!r} needs math-verify",
            hint="pip install 'ortho-cli[text]'; or give task.grader: exact, and no task.compat",
        ) from error


def _verified(gold: str, answer: str) -> bool:
    """Whether math-verify takes the answer for the gold one."""
    library = math_verify(gold, answer)
    # Its clock is a signal, which only the main thread may set.
    timeout = TIMEOUT if threading.current_thread() is threading.main_thread() else None
    found = [library.parse(f"${_ungrouped(text)}$", parsing_timeout=timeout) for text in (gold, answer)]
    return all(found) and bool(library.verify(found[0], found[1], DIGITS, timeout_seconds=timeout))


def _ungrouped(text: str) -> str:
    """A formula whose numbers have no grouping commas, which would make a list of them."""
    return "".join(_pieces(text.replace("\\!", "")))


def _pieces(text: str) -> Iterator[str]:
    last = 0
    for match in re.finditer(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", text):
        yield text[last : match.start()]
        yield match[0].replace(",", "")
        last = match.end()
    yield text[last:]
