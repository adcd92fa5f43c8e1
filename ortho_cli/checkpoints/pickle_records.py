"""What a pickle's tree is made of: imports that were not made, calls that were not made, names of storages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["Global", "Made", "Reference", "show", "walk"]


@dataclass(eq=False, slots=True)
class Global:
    """An import that was not made: `module.name`."""

    path: str


@dataclass(eq=False, slots=True)
class Made:
    """A call that was not made, and what would have been put into its result. Dicts and sets are this too."""

    function: Global | Made
    args: tuple[object, ...] = ()
    pairs: list[tuple[object, object]] | None = None  # `result[key] = value`, in order
    items: list[object] | None = None  # `result.append(item)` or `.add(item)`
    states: list[object] | None = None  # `result.__setstate__(state)`

    @property
    def path(self) -> str:
        """The full name of what would have been called; "" where that is itself the result of a call."""
        return self.function.path if isinstance(self.function, Global) else ""


@dataclass(eq=False, slots=True)
class Reference:
    """A persistent id: in torch's files, the tuple that names a storage."""

    id: object


def show(value: object) -> str:
    """A value in a few words for a message, however large, deep or strange it is."""
    if isinstance(value, Global):
        return value.path[:120]
    if isinstance(value, Made):
        if value.path in ("builtins.dict", "collections.OrderedDict"):
            return f"a dict of {len(value.pairs or ())}"
        return f"an object of {(value.path or 'a computed class')[:120]}"
    if isinstance(value, Reference):
        return "a storage"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        return ascii(value[:80]) + ("..." if len(value) > 80 else "")
    return repr(value)


def walk(values: Iterable[object], seen: set[int]) -> Iterator[Global | Made | Reference]:
    """Every record reachable from some parts of a tree, once; `seen` keeps the ids of what was met, over many walks."""
    todo = [*values]
    while todo:
        value = todo.pop()
        if not isinstance(value, Global | Made | Reference | list | tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, list | tuple):
            todo += value
            continue
        yield value
        if isinstance(value, Reference):
            todo.append(value.id)
        elif isinstance(value, Made):
            todo += (value.function, value.args, value.items, value.states)
            todo += (part for pair in value.pairs or () for part in pair)
