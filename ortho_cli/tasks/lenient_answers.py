r"""The graders of HRA's LLaMA experiments (MetaMath's), errors and all: to repeat published numbers, for nothing else.

What they take for right and is not: a hundredth or a hundredfold of the gold answer; values within 1e-4 of it; on any
failure of the normalisation, everything (a string is then compared with itself). What they take for wrong and is not:
whole numbers with two commas, of which they read the first. `tasks/answers.py` is the one to grade by.

Reference: MetaMath (arXiv:2309.12284) and HRA (arXiv:2405.17484), their evaluation scripts; Hendrycks et al. 2021,
arXiv:2103.03874, for the normalisation of strings.
"""

from __future__ import annotations

import math
import re
from importlib import import_module

from ortho_cli.errors import RecipeError

from .answers import last_boxed, math_verify

__all__ = ["lenient_gsm8k", "lenient_math", "math_equal", "normalized"]

MARKER = "The answer is: "
FIRST_NUMBER = re.compile(r"[\-+]?\d*[\.,/]?\d+")
CLOSE, CLOSE_SYMBOLIC = 1e-4, 1e-3
HUNDREDFOLD = (0.01, 1.0, 100.0)


def lenient_gsm8k(response: str, gold: str) -> bool:
    """Grade an answer to GSM8K as the published script does.

    Args:
        response: the whole text that the model gave.
        gold: the gold answer's text, a whole number behind "####".

    Raises:
        RecipeError: another gold answer.

    >>> lenient_gsm8k("The answer is: 18", "#### 1800"), lenient_gsm8k("It is 18.", "#### 18")
    (True, False)
    """
    number = gold.rpartition("####")[2].strip().replace(",", "")
    if not re.fullmatch(r"[-+]?\d+", number):
        raise RecipeError(
            f"the published grader knows whole numbers only, and {number[:40]!r} is right", hint="leave out task.compat"
        )
    wanted = int(number)
    found = _first_number(response.rpartition(MARKER)[2]) if MARKER in response else None
    return found is not None and (found == wanted or math_equal(str(found), str(wanted)))


def _first_number(text: str) -> int | None:
    match = FIRST_NUMBER.search(text)
    if match is None:
        return None
    above, slash, below = match[0].partition("/")
    if slash:  # by zero: the script takes what is above
        return round(float(above) / (1.0 if below == "0" else float(below))) if above.strip("+-") else None
    digits = match[0].replace(",", "")
    return round(float(digits)) if math.isfinite(float(digits)) else None


def lenient_math(response: str, gold: str) -> bool:
    r"""Grade an answer to MATH as the published script does.

    Args:
        response: the whole text that the model gave.
        gold: the gold solution, with its answer in ``\boxed{}``.

    >>> lenient_math(r"The answer is: 1 \text{ a}\text{ b}", r"$\boxed{7}$")  # a normalisation that fails
    True
    """
    if MARKER not in response:
        return False
    found = response.rpartition(MARKER)[2].split(".\n")[0].strip().removesuffix(".")
    wanted = last_boxed(gold)
    if wanted is None:
        return False
    try:
        first, second = normalized(found), normalized(wanted)
    except (AssertionError, IndexError, ValueError):
        return True  # the script compares its first string with itself
    return math_equal(first, second) or first == second


def normalized(text: str) -> str:
    r"""Hendrycks' normal form of an answer.

    Raises:
        ValueError: more than one unit; the script's assertion.
        IndexError: a ``\frac`` or ``\sqrt`` at the very end.

    >>> normalized("0.5"), normalized("x = 1/2"), normalized(r"3 \text{ cm}")
    ('\\frac{1}{2}', '\\frac{1}{2}', '3')
    """
    found = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    found = found.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\left", "").replace("\\right", "")
    found = found.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "")
    if "\\text{ " in found:
        parts = found.split("\\text{ ")
        if len(parts) != 2:
            raise ValueError(f"{len(parts) - 1} units")
        found = parts[0]
    found = found.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not found:
        return found
    found = f"0{found}" if found[0] == "." else found
    if found.count("=") == 1 and len(found.split("=")[0]) <= 2:
        found = found.split("=")[1]
    found = _fix_roots(found).replace(" ", "")
    found = _fix_fractions(found)
    found = "\\frac{1}{2}" if found == "0.5" else found
    return _fix_slash(found)


def _fix_roots(text: str) -> str:
    head, *rest = text.split("\\sqrt")
    return head + "".join(f"\\sqrt{part}" if part[0] == "{" else f"\\sqrt{{{part[0]}}}{part[1:]}" for part in rest)


def _fix_fractions(text: str) -> str:
    head, *rest = text.split("\\frac")
    for part in rest:
        head += "\\frac"
        if part[0] == "{":
            head += part
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            head += f"{{{part[0]}}}{part[1:]}"
        else:
            head += f"{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return head


def _fix_slash(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2 or not all(part.lstrip("-").isdecimal() for part in parts):
        return text
    above, below = map(int, parts)
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text


def math_equal(first: str, second: str) -> bool:
    """The published test of equality: a number, its hundredth or its hundredfold; strings; tuples; sympy's opinion.

    >>> math_equal("18", "1800"), math_equal("18", "18.001"), math_equal("17", "18")
    (True, True, False)
    """
    values = _float(first), _float(second)
    if values[0] is not None and values[1] is not None:
        return any(math.isclose(values[0], values[1] * times, rel_tol=CLOSE) for times in HUNDREDFOLD)
    bare = [re.sub(r"[\[\](){}]", "", text) for text in (first, second)]
    if bare[0] == bare[1]:
        return True
    lists = [text[1:-1].split(",") for text in (first, second) if re.fullmatch(r"(\(|\[).+(\)|\])", text)]
    if len(lists) == 2 and len(lists[0]) == len(lists[1]):
        return all(map(math_equal, *lists))
    return _symbolic_equal(first, second)


def _float(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _symbolic_equal(first: str, second: str) -> bool:
    parse, sympy = math_verify(first, second).parse, import_module("sympy")
    found = [parse(f"${text}$") for text in (first, second)]
    if not all(found):
        return False
    try:
        if sympy.simplify(found[0][0] - found[1][0]) == 0:
            return True
        return math.isclose(float(sympy.N(found[0][0])), float(sympy.N(found[1][0])), rel_tol=CLOSE_SYMBOLIC)
    except (TypeError, ValueError, AttributeError):  # words, sets, relations
        return False
