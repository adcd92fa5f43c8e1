"""Everything that can go wrong, as one tree; each branch is one exit code.

    OrthoError             1   never raised itself: exit 1 is a bug, with a traceback
    |- UsageError          2   arguments that contradict each other
    |- RecipeError         3   a bad recipe: file:line: key: reason
    |- CheckpointError     4   unreadable, unknown layout, leftover or missing names
    |  `- TargetError      4   a pattern that matches nothing, a layer that cannot be adapted
    |- NumericsError       5   a non-finite value, lost orthogonality, `--fail-above`
    `- OutputError         6   exists, is an input, no space, not writable

Exit 130 is Ctrl-C. Library code raises; only `cli` catches and prints. `ValueError` and `assert` are for programmers.
"""

from __future__ import annotations

import difflib

__all__ = [
    "CheckpointError",
    "NumericsError",
    "OrthoError",
    "OutputError",
    "RecipeError",
    "TargetError",
    "UsageError",
    "check_choice",
]


class OrthoError(Exception):
    """A failure a user can act on.

    Args:
        message: what is wrong, with the value found.
        hint: what to do next, best a command to type.
        where: the file (and line) it was found in.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, where: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.where = where

    def as_dict(self) -> dict[str, object]:
        """The error as `--json` prints it."""
        return {
            "type": type(self).__name__,
            "message": self.message,
            "hint": self.hint,
            "where": self.where,
            "exit_code": self.exit_code,
        }


class UsageError(OrthoError):
    """Arguments that contradict each other or leave out what is needed."""

    exit_code = 2


class RecipeError(OrthoError):
    """A recipe that does not fit its schema."""

    exit_code = 3


class CheckpointError(OrthoError):
    """A checkpoint or adapter that cannot be read as what it claims to be."""

    exit_code = 4


class TargetError(CheckpointError):
    """A layer selection that matches nothing, or a layer that cannot take the adapter."""


class NumericsError(OrthoError):
    """A value that is not finite, or a property that arithmetic should have kept and did not."""

    exit_code = 5


class OutputError(OrthoError):
    """An output that may not or cannot be written."""

    exit_code = 6


def check_choice(option: str, value: str | None, choices: tuple[str, ...]) -> None:
    """Refuse a word that is none of an option's choices (None: the option was not given).

    Raises:
        UsageError: with the nearest choice.
    """
    if value is None or value in choices:
        return
    near = difflib.get_close_matches(value, choices, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(choices)}"
    raise UsageError(f"{option} {value!r} is none of {', '.join(choices)}", hint=hint)
