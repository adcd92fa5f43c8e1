r"""Which answers mean the same: pairs judged by hand, every trap of the published graders among them."""

from __future__ import annotations

import doctest
import importlib
import sys
import threading

import pytest

from ortho_cli.errors import RecipeError, UsageError
from ortho_cli.tasks.answers import final_answer, last_boxed, same_answer
from ortho_cli.tasks.lenient_answers import lenient_gsm8k, lenient_math, math_equal

pytest.importorskip("math_verify")

RIGHT = [
    ("18", "18"), ("18", "18.00"), ("18", " 18. "), ("1800", "1,800"), ("1234567", "1,234,567"), ("-5", "-5"),
    ("0", "-0"), (r"\$18", "18"), ("18", "$18"), ("10,\\!000", "10000"), ("0.5", "1/2"), ("6.5", r"\frac{13}{2}"),
    (r"\frac{1}{2}", "0.5"), (r"\frac12", r"\frac{1}{2}"), (r"\dfrac{3}{4}", r"\tfrac34"),
    (r"-\frac{1}{3}", r"\frac{-1}{3}"), (r"11\frac{1}{2}", "11.5"), (r"50\%", "50"), (r"50\%", r"50\%"), ("50", "50%"),
    (r"3\text{ cm}", "3"), (r"90^\circ", "90"), ("90", r"90^{\circ}"), (r"10^3", "1000"), ("5!", "120"), ("1 + 2", "3"),
    (r"\sqrt{8}", r"2\sqrt{2}"), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"), (r"3\sqrt{2}+1", r"1+3\sqrt{2}"),
    (r"2\pi", r"2 \pi"), ("i", "i"), ("2+3i", "3i+2"), ("(x+1)^2", "x^2+2x+1"), ("x=5", "5"), ("5", "x=5"),
    (r"x\le 3", r"x \leq 3"), ("(1,2)", "(1, 2)"), ("[1,2)", "[1, 2)"), (r"(-\infty,3]", r"(-\infty, 3]"),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3, \pi/2)"), (r"\{1,2\}", r"\{2,1\}"), ("1,2", "2,1"), ("1,2,3", "3, 2, 1"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"), ("1011_2", "1011_{2}"),
    (r"\text{Evelyn}", "Evelyn"), ("Evelyn", r"\text{evelyn}"), (r"\text{even}", "even"), (r"\text{ yes }", "Yes"),
    (r"\text{(B)}", "B"), ("(B)", "B"),
]  # fmt: skip
WRONG = [
    # A hundredth and a hundredfold, which the published grader takes for right.
    ("1800", "18"), ("18", "1800"), ("18", "0.18"), ("50", "0.5"), ("0.5", "50"),
    # Near is not equal.
    ("2", "2.0001"), ("1/3", "0.3333"), (r"2\pi", "6.28"), (r"\sqrt{2}", "1.414"), ("0.1", "0.10000001"),
    (r"\sqrt{2}", "1.41421356"), (r"\frac{1}{3}", "0.333333"), (r"\pi", "3.14159265"),
    # Digits that a comma cuts off, and those that a space or an order parts.
    ("1234567", "1234"), ("1,234", "1.234"), ("12", "1 2"), ("42", "24"), ("10", "10^{10}"),
    # Units in place of an answer, which make the published normalisation fail and then compare a text with itself.
    (r"\text{ a }\text{ b}", r"\text{ c }\text{ d}"), ("7", r"1 \text{ a}\text{ b}"),
    # Words are no products of letters, and a base is part of a numeral.
    ("Evelyn", "lynEve"), (r"\text{even}", r"\text{odd}"), ("B", "C"), (r"\text{(B)}", "(C)"), ("1234_8", "1234"),
    ("1011_2", "1011_3"), ("6", "six"),
    # Order and ends of tuples, intervals, matrices; members of sets.
    ("(1,2)", "(2,1)"), ("[1,2)", "(1,2]"), ("(1,2)", "[1,2]"), ("1,2", "1,2,3"), (r"\{1,2\}", r"\{1,3\}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    # Signs, exponents, relations.
    ("-5", "5"), (r"\infty", r"-\infty"), ("x^2", "x^3"), ("3x+1", "3x-1"), ("2+3i", "2-3i"), ("x<3", "x>3"),
    (r"\frac{1}{2}", r"\frac{2}{1}"), ("x=5", "6"),
    # No answer, and more than one.
    ("5", ""), ("Evelyn", None), (None, "5"), ("5", "I do not know"), ("7", "7 or 8"), ("3", "3/0"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_what_means_the_same(gold: str, answer: str) -> None:
    assert same_answer(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_what_does_not(gold: str | None, answer: str | None) -> None:
    assert not same_answer(gold, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $4^2 = \boxed{16}$.The answer is: 16", "16"),
        ("The answer is: 3. But wait. The answer is: 4.", "4"),
        ("The answer is: $18.50.\nThe next question ...", "$18.50"),
        ("The final answer is 5. Hence Tom has 5.", "5"),
        (r"The answer is: $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        ("2 + 2 = 4\n#### 1,234", "1,234"),
        (r"thus \boxed{\frac{a}{\sqrt{b}}} or \fbox{3}", "3"),
        (r"Since the answer is even, it is $\boxed{6}$.", "6"),
        (r"The answer is 3. But wait: \boxed{4}", "4"),
        (r"Hence $\boxed 5$.", "5"),
        (r"that is \boxed -\frac{1}{2}", r"-\frac{1}{2}"),
        (r"put it in \boxed, or \boxed it", None),
        (r"never closed \boxed{\frac{1}{2}", None),
        ("The answer is:", None),
        ("I would say 5", None),
        ("", None),
    ],
)
def test_the_last_answer_of_a_text(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_another_thread_compares_too() -> None:
    """math-verify's clock is a signal, which only the main thread may set."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(same_answer(r"\sqrt{8}", r"2\sqrt{2}")))
    thread.start()
    thread.join()
    assert found == [True]


def test_the_library_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert same_answer("18", "18.0")  # numbers need none
    with pytest.raises(UsageError, match="needs math-verify") as caught:
        same_answer(r"\sqrt{8}", r"2\sqrt{2}")
    assert "ortho-cli[text]" in str(caught.value.hint)
    with pytest.raises(UsageError, match="needs math-verify"):
        lenient_math(r"The answer is: \sqrt{8}", r"\boxed{2\sqrt{2}}")


@pytest.mark.parametrize(
    ("answer", "gold", "published", "correct"),
    [
        ("18", "1800", True, False),  # a hundredth
        ("180000", "1800", True, False),  # and a hundredfold
        ("1,234,567", "1234567", False, True),  # read as 1234
        ("17.6", "18", True, False),  # rounded
        ("35/2", "18", True, False),  # a fraction, rounded to even
        ("18001", "18000", True, False),  # within 1e-4
        ("18/0", "18", True, False),  # a fraction over nothing
        ("18.", "18", True, True),
        ("17", "18", False, False),
    ],
)
def test_the_published_grader_of_gsm8k_and_its_errors(answer: str, gold: str, published: bool, correct: bool) -> None:
    response = f"... The answer is: {answer}"
    assert lenient_gsm8k(response, f"because\n#### {gold}") is published
    assert same_answer(gold, final_answer(response)) is correct


@pytest.mark.parametrize(
    ("answer", "gold", "published", "correct"),
    [
        (r"1 \text{ a}\text{ b}", "7", True, False),  # the normalisation fails: everything is right
        (r"\sqrt", "7", True, False),
        ("18", "1800", True, False),
        ("x=1/2", r"\frac{1}{2}", True, True),
        (r"3 \text{ cm}", "3", True, True),
        ("(1,2)", "[1,2]", True, False),  # brackets are dropped
        ("[1,2)", "(1,2]", True, False),
        (r"\frac12", r"\dfrac{1}{2}", True, True),
        (r"\sqrt2", r"\sqrt{2}", True, True),
        (r"2\sqrt{2}", r"\sqrt{8}", True, True),
        ("8", "7", False, False),
    ],
)
def test_the_published_grader_of_math_and_its_errors(answer: str, gold: str, published: bool, correct: bool) -> None:
    response = f"so it is. The answer is: {answer}"
    assert lenient_math(response, rf"Hence $\boxed{{{gold}}}$.") is published
    assert same_answer(gold, final_answer(response)) is correct


def test_the_published_graders_want_their_marker() -> None:
    assert not lenient_gsm8k("It is 18", "#### 18")
    assert not lenient_math(r"\boxed{18}", r"\boxed{18}")
    assert not lenient_math("The answer is: 18", "no box")
    assert not lenient_gsm8k("The answer is: none", "#### 18")


def test_the_published_grader_of_gsm8k_knows_whole_numbers_only() -> None:
    with pytest.raises(RecipeError, match="knows whole numbers only"):
        lenient_gsm8k("The answer is: 3.5", "#### 3.5")


def test_numbers_a_hundredfold_are_equal_to_the_published_one() -> None:
    assert math_equal("18", "0.18")
    assert not math_equal("18", "180")
    assert math_equal("(1,50)", "(1,0.5)")


@pytest.mark.parametrize("module", ["answers", "lenient_answers", "templates", "packing", "arithmetic", "generation"])
def test_examples_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"ortho_cli.tasks.{module}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_boxes_hold_braces() -> None:
    assert last_boxed(r"\boxed{\left\{1,2\right\}}") == r"\left\{1,2\right\}"
