"""A pickle read as data: its opcodes build a tree of inert records, and nothing is imported or called.

A pickle is a program for a small stack machine. This one has the machine's stack, marks and memo, but an import is a
`Global` (a name), a call is a `Made` (who would have been called, with what), a persistent id is a `Reference`. There
is no class to call, no attribute to set and nothing to hash, so no input can run code, change this module, or grow
beyond a few words an opcode. (`pickle.Unpickler`, even restricted, calls, hashes, and sizes its memo by the input.)
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import IO, Any, Protocol, cast

from ortho_cli.checkpoints.pickle_records import Global, Made, Reference, show
from ortho_cli.errors import CheckpointError

__all__ = ["Admit", "ByteStream", "Tree", "read_tree"]

# A tensor takes 35 to 45 opcodes: room for 100,000 of them, and at most some 400 MB for a file made to be large.
MAX_OPCODES = 4_000_000
HIGHEST_PROTOCOL = 5

Admit = Callable[[str, str], str]


class ByteStream(Protocol):
    """What opcodes are read from; the reads of a stream must be bounded, since their sizes come from the pickle."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Tree:
    """What a pickle describes, its imports in order of appearance, and its persistent ids."""

    root: object
    globals: tuple[str, ...]
    references: tuple[Reference, ...]


def read_tree(data: bytes | ByteStream, admit: Admit) -> Tree:
    """Read one pickle, from its first opcode to its STOP, without running it.

    Lists, tuples, numbers, strings and bytes stand for themselves; dicts and sets are `Made` by `builtins.dict` and
    `builtins.set`, because their keys are never hashed. The tree may share branches and hold cycles.

    Args:
        data: the bytes, or a stream that stands at the pickle's first byte (it is left behind the last).
        admit: called with the module and the name of each import; returns the full name to record, or raises.

    Raises:
        CheckpointError: not a well-formed pickle of protocol 0 to 5, or too many opcodes; whatever `admit` raises.

    Cost: 1 to 2 microseconds an opcode; memory linear in the opcodes.

    >>> read_tree(b"cos\\nsystem\\n(S'ls'\\ntR.", lambda module, name: f"{module}.{name}").root
    Made(function=Global(path='os.system'), args=('ls',), pairs=None, items=None, states=None)
    """
    machine = _Machine(admit)
    position: int | None = 0
    try:
        stream = BytesIO(data) if isinstance(data, bytes) else data
        opcodes = pickletools.genops(cast("IO[bytes]", stream))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # genops decodes Python 2's strings with an escape_decode that warns
            for count, (opcode, arg, start) in enumerate(opcodes):
                position = start
                if count >= MAX_OPCODES:
                    raise CheckpointError(f"the pickle has more than {MAX_OPCODES:,} opcodes")
                machine.step(opcode.name, arg)
        return Tree(machine.stack.pop(), tuple(machine.globals), tuple(machine.references))
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"malformed pickle at or after byte {position}: {str(error)[:120]}") from None


_CONSTANTS = frozenset(
    {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)
_ATOMS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_DICT, _SET, _FROZENSET = Global("builtins.dict"), Global("builtins.set"), Global("builtins.frozenset")


class _Machine:
    """Stack, marks and memo. A pickle that asks for what cannot be surfaces as ValueError or IndexError."""

    def __init__(self, admit: Admit) -> None:
        self.admit = admit
        self.stack: list[object] = []
        self.below: list[list[object]] = []  # one put-aside stack for each open mark
        self.memo: dict[int, object] = {}  # a dict: a huge memo number must not size anything
        self.globals: dict[str, Global] = {}
        self.references: list[Reference] = []

    def above_mark(self) -> list[object]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def import_(self, module: object, name: object) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("an import whose name is no string")
        path = self.admit(module, name)
        self.stack.append(self.globals.setdefault(path, Global(path)))

    def call(self, function: object, args: object) -> None:
        if not (isinstance(function, Global | Made) and isinstance(args, tuple)):
            raise ValueError(f"a call of {show(function)} with {show(args)}")
        self.stack.append(Made(function, args))

    def put_pairs(self, flat: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, Made) or len(flat) % 2:
            raise ValueError(f"keys and values put into {show(target)}")
        if target.pairs is None:
            target.pairs = []
        target.pairs += zip(flat[::2], flat[1::2], strict=True)

    def put_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, Made):
            if target.items is None:
                target.items = []
            target.items += items
        elif isinstance(target, list):
            target += items
        else:
            raise ValueError(f"items put into {show(target)}")

    def put_state(self, state: object) -> None:
        target = self.stack[-1]
        if not isinstance(target, Made):  # on a class or a function, BUILD would set its attributes
            raise ValueError(f"attributes set on {show(target)}")
        if target.states is None:
            target.states = []
        target.states.append(state)

    def step(self, code: str, arg: Any) -> None:
        """Carry out one opcode, the frequent ones first."""
        stack = self.stack
        if code in _CONSTANTS:
            stack.append(arg)
        elif code in _ATOMS:
            stack.append(_ATOMS[code])
        elif code in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[arg] = stack[-1]
        elif code == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET", "GET"):
            if arg not in self.memo:
                raise ValueError(f"memo {arg} was never set")
            stack.append(self.memo[arg])
        elif code == "MARK":
            self.below.append(stack)
            self.stack = []
        elif code == "TUPLE":
            items = self.above_mark()
            self.stack.append(tuple(items))
        elif code in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(code[-1])
            if len(stack) < size:
                raise IndexError("a tuple of more than there is")
            stack[-size:] = [tuple(stack[-size:])]
        elif code in ("REDUCE", "NEWOBJ"):
            args = stack.pop()
            self.call(stack.pop(), args)
        elif code == "BINPERSID":
            self.references.append(Reference(stack.pop()))
            stack.append(self.references[-1])
        elif code == "GLOBAL":
            self.import_(*arg.split(" ", 1))
        else:
            self.step_rare(code, arg)

    def step_rare(self, code: str, arg: Any) -> None:
        """The opcodes that come once per container or less."""
        stack = self.stack
        if code == "EMPTY_DICT":
            stack.append(Made(_DICT))
        elif code == "EMPTY_LIST":
            stack.append([])
        elif code == "EMPTY_SET":
            stack.append(Made(_SET))
        elif code == "SETITEM":
            value = stack.pop()
            key = stack.pop()
            self.put_pairs([key, value])
        elif code == "APPEND":
            self.put_items([stack.pop()])
        elif code == "BUILD":
            self.put_state(stack.pop())
        elif code in ("SETITEMS", "APPENDS", "ADDITEMS"):
            put = self.put_pairs if code == "SETITEMS" else self.put_items
            put(self.above_mark())
        elif code in ("LIST", "DICT", "FROZENSET"):
            items = self.above_mark()
            if code == "DICT":
                self.stack.append(Made(_DICT))
                self.put_pairs(items)
            else:
                self.stack.append(items if code == "LIST" else Made(_FROZENSET, (items,)))
        elif code == "STACK_GLOBAL":
            name = stack.pop()
            self.import_(stack.pop(), name)
        elif code == "INST":
            items = self.above_mark()
            self.import_(*arg.split(" ", 1))
            self.call(self.stack.pop(), tuple(items))
        elif code == "OBJ":
            function, *rest = self.above_mark() or [None]
            self.call(function, tuple(rest))
        elif code == "NEWOBJ_EX":
            keywords, args, function = stack.pop(), stack.pop(), stack.pop()
            self.call(function, (args, keywords))
        elif code in ("EXT1", "EXT2", "EXT4"):
            self.import_("copyreg", f"extension_{arg}")
        elif code == "PERSID":
            self.references.append(Reference(arg))
            stack.append(self.references[-1])
        elif code == "DUP":
            stack.append(stack[-1])
        elif code == "POP" and stack:
            stack.pop()
        elif code in ("POP", "POP_MARK"):
            self.above_mark()
        elif code not in ("PROTO", "FRAME", "STOP") or (code == "PROTO" and arg > HIGHEST_PROTOCOL):
            raise ValueError(f"{code} {show(arg)} does not belong in a checkpoint")
