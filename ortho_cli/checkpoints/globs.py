"""Globs over dotted layer names, compiled to regular expressions that cannot be made slow.

`*` and `?` stay inside one component of the name, `**` crosses components, `[a-z]` and `[!a-z]` are one character,
`{a,b}` are alternatives. A glob matches a whole name or a dotted suffix of it, as PEFT's target_modules do: `to_q`
matches `blocks.0.attn1.to_q`, not `blocks.0.not_to_q`. One that begins with `^` starts at the root, as a regular
expression would: `^conv1` is a network's own `conv1`, not those of its blocks.
"""

from __future__ import annotations

import re

from ortho_cli.errors import UsageError

__all__ = ["MAX_ALTERNATIVES", "ROOT", "compile_glob", "expand_braces"]

ROOT = "^"  # in front of a glob, or of an alternative: it matches whole names only

# Nested braces multiply; a pattern that means more than this was not typed by a person.
MAX_ALTERNATIVES = 1024


def compile_glob(pattern: str) -> re.Pattern[str]:
    """Compile a glob to a regular expression for `fullmatch`.

    Matching costs at most the square of the name's length per alternative, whatever the pattern: each wildcard but the
    last takes the first place that fits and never gives it back. That loses no match: what lies between two `**` may as
    well end as early as it can, since the next `**` reaches from there wherever it would have reached from later on;
    and inside it each `*` may as well be as short as it can, since all that a longer one adds are characters that the
    next `*` may take too (a dot cannot be among them).

    Raises:
        UsageError: an empty pattern, an unclosed `{` or `[`, a bad range, or too many alternatives.

    >>> bool(compile_glob("attn{1,2}.to_*").fullmatch("unet.mid_block.attn2.to_q"))
    True
    >>> bool(compile_glob("attn*").fullmatch("unet.mid_block.attn2.to_q"))
    False
    >>> [bool(compile_glob("^conv1").fullmatch(name)) for name in ("conv1", "layer1.0.conv1")]
    [True, False]
    """
    if not pattern.lstrip(ROOT):
        raise UsageError("a pattern is empty", hint="write a layer name, a glob such as '**.attn1.*' or a preset")
    branches = [_Branch(pattern, glob, i).regex() for i, glob in enumerate(dict.fromkeys(expand_braces(pattern)))]
    return re.compile("|".join(branches), re.DOTALL)


def expand_braces(pattern: str) -> list[str]:
    """Write out the alternatives of a glob, in order.

    Raises:
        UsageError: a `{` without `}` or the reverse, or more than :data:`MAX_ALTERNATIVES`.

    >>> expand_braces("a{b,c{d,}}e")
    ['abe', 'acde', 'ace']
    """
    # stack[-1]: the alternatives of the innermost open brace, each a list of what it may be so far.
    stack: list[list[list[str]]] = [[[""]]]
    for char in pattern:
        if char == "{":
            stack.append([[""]])
        elif char == "," and len(stack) > 1:
            stack[-1].append([""])
        elif char == "}":
            if len(stack) == 1:
                raise UsageError(f"pattern {pattern!r} has a '}}' without '{{'")
            inner = [text for alternative in stack.pop() for text in alternative]
            if len(inner) * len(stack[-1][-1]) > MAX_ALTERNATIVES:
                raise UsageError(f"pattern {pattern!r} has more than {MAX_ALTERNATIVES} alternatives")
            stack[-1][-1] = [start + text for start in stack[-1][-1] for text in inner]
        else:
            stack[-1][-1] = [text + char for text in stack[-1][-1]]
    if len(stack) > 1:
        raise UsageError(f"pattern {pattern!r} has a '{{' without '}}'")
    return stack[0][0]


_GAP = re.compile(r"((?<=\.)\*\*\.|\*\*)")
_TOKEN = re.compile(r"\[!?\]?[^\]]*\]|.", re.DOTALL)
_IN_BRACKETS = re.compile(r"(.)-(.)|(.)", re.DOTALL)
# What a gap is in an expression, as short as possible, or as long as possible where only the end can stop it.
# A `**.` after a dot stands for whole components, or none: `a.**.b` matches `a.b`.
_SHORT = {"*": r"[^.]*?", "**": r".*?", "**.": r"(?:.*?\.)??"}
_LONG = {"*": r"[^.]*", "**": r".*", "**.": r"(?:.*\.)?"}


class _Branch:
    """One alternative of a pattern on its way to a regular expression."""

    def __init__(self, pattern: str, glob: str, number: int) -> None:
        self.pattern, self.number, self.groups = pattern, number, 0
        rooted, glob = glob.startswith(ROOT), glob.removeprefix(ROOT)
        glob = re.sub(r"\*{3,}", "**", glob)
        glob = re.sub(r"(?<![^.])\*\*(?:\.\*\*)+(?![^.])", "**", glob)  # `**.**` is `**`
        self.glob = glob.removeprefix("**.")  # what suffix matching does anyway
        self.start = "" if rooted and self.glob == glob else r"(?:.*\.)?"

    def regex(self) -> str:
        first, *rest = _GAP.split(self.glob)
        out = self.start + self._segment(first, last=not rest)
        for i in range(0, len(rest), 2):
            gap, last = rest[i], i + 2 == len(rest)
            body = self._segment(rest[i + 1], last)
            out += _LONG[gap] + body if last else self._commit(_SHORT[gap] + body)
        return out

    def _segment(self, segment: str, last: bool) -> str:
        """What stands between two `**`: pieces of fixed length with `*` between them."""
        first, *rest = map(self._piece, segment.split("*"))
        committed, final = (rest[:-1], rest[-1:]) if last else (rest, [])
        return (
            first
            + "".join(self._commit(_SHORT["*"] + piece) for piece in committed)
            + "".join(_LONG["*"] + piece for piece in final)
        )

    def _piece(self, piece: str) -> str:
        return "".join(map(self._token, _TOKEN.findall(piece)))

    def _token(self, token: str) -> str:
        if token == "?":
            return r"[^.]"
        if token == "[":
            raise UsageError(f"pattern {self.pattern!r} has a '[' without ']'")
        if len(token) == 1:
            return re.escape(token)
        negate = token.startswith("[!")
        body = ""
        for low, high, single in _IN_BRACKETS.findall(token[1 + negate : -1]):
            if low > high:
                raise UsageError(f"pattern {self.pattern!r} has the empty range '{low}-{high}'")
            body += re.escape(single) if single else f"{re.escape(low)}-{re.escape(high)}"
        if not body:
            raise UsageError(f"pattern {self.pattern!r} has brackets with nothing inside")
        return rf"(?!\.)[{'^' if negate else ''}{body}]"

    def _commit(self, expression: str) -> str:
        """The expression without a way back: what a lookahead has matched is settled.

        The same as an atomic group, which Python has only from 3.11 on.
        """
        self.groups += 1
        name = f"g{self.number}_{self.groups}"
        return f"(?=(?P<{name}>{expression}))(?P={name})"
