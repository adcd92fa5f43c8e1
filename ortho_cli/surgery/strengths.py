"""How strongly adapters act: `A=0.7` for one on all layers, `--strength 0.7 --strength 'up.**=0.3'` for all by layer.

The two multiply. A rotation at strength s turns by s times its angles, a sum adds s times its delta, a tensor that the
adapter brings whole is taken that share of the way; 0 is the base, 1 the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from ortho_cli.checkpoints import targets
from ortho_cli.checkpoints.adapters import Adapter
from ortho_cli.errors import UsageError

__all__ = ["WHOLE", "AdapterArgument", "Strengths", "given_strengths", "spelled", "split_strength", "strength_totals"]

AdapterArgument = str | Path | tuple[str | Path, float]  # what the Python functions take for one adapter


@dataclass(frozen=True)
class Strengths:
    """Of each adapter, in order (missing: 1), and of layers, as `targets.per_layer` reads them (none: 1)."""

    own: tuple[float, ...] = ()
    values: tuple[str, ...] = ()

    def of(self, index: int) -> float:
        """What the adapter at a place was given for itself."""
        return self.own[index] if index < len(self.own) else 1.0

    def by_layer(self, layers: Mapping[str, tuple[int, ...]], layout: str) -> dict[str, float]:
        """What each layer was given, for whichever adapter.

        Args:
            layers: the layers that any adapter acts on -> shapes of their weights.
            layout: their naming.

        Raises:
            TargetError: a pattern matches none of them.
            UsageError: a value that is no finite number.
        """
        given = dict.fromkeys(layers, 1.0) | targets.per_layer(self.values, layers, layout, float)
        for value in given.values():
            _check(value)
        return given


WHOLE = Strengths()


def given_strengths(
    adapters: str | Path | Sequence[AdapterArgument], strength: float | str | Sequence[float | str]
) -> tuple[list[str | Path], Strengths]:
    """Paths of adapters, and all that was said of their strengths.

    Args:
        adapters: one or several, each as `split_strength` takes it.
        strength: of all of them: a number, a `PATTERN=number`, or several of either.

    >>> given_strengths(["A=0.7", "B"], [0.5, "up_blocks.**=0.3"])
    (['A', 'B'], Strengths(own=(0.7, 1.0), values=('0.5', 'up_blocks.**=0.3')))
    """
    split = [split_strength(item) for item in ([adapters] if isinstance(adapters, (str, Path)) else adapters)]
    several = [strength] if isinstance(strength, (int, float, str)) else list(strength)
    values = () if several == [1] else tuple(str(value) for value in several)
    own = tuple(value for _, value in split)
    return [path for path, _ in split], Strengths(own if any(value != 1 for value in own) else (), values)


def split_strength(argument: AdapterArgument) -> tuple[str | Path, float]:
    """An adapter's path and its strength: `A=0.7`, unless there is a file or folder of that very name.

    >>> split_strength("A=0.7"), split_strength("A"), split_strength(("A=0.7", 1.0))
    (('A', 0.7), ('A', 1.0), ('A=0.7', 1.0))

    Raises:
        UsageError: `A=nan`.
    """
    if isinstance(argument, tuple):
        return argument[0], _check(argument[1])
    path, equals, text = str(argument).rpartition("=")
    if not equals or not path or Path(argument).expanduser().exists():
        return argument, 1.0
    try:
        value = float(text)
    except ValueError:
        if Path(path).expanduser().exists():
            raise UsageError(f"strength {text!r} of {path} is not a number", hint=f"as in {path}=0.7") from None
        return argument, 1.0  # an equals sign in a name: whether it exists is for the reader to say
    return path, _check(value)


def spelled(adapters: Sequence[Adapter], strengths: Strengths) -> list[str]:
    """Adapters as they are typed, with their own strengths."""
    own = [strengths.of(index) for index in range(len(adapters))]
    return [
        adapter.source.rstrip("/") + ("" if value == 1 else f"={value:g}")
        for adapter, value in zip(adapters, own, strict=True)
    ]


def strength_totals(adapters: Sequence[Adapter], found: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """What a report says of the least and largest strengths of adapters, where any is not 1."""
    if all(span == (1.0, 1.0) for span in found):
        return {}
    said = [f"{least:g}" + (f" to {largest:g}" if largest != least else "") for least, largest in found]
    return {"strengths": [f"{adapter.path.name}: {text}" for adapter, text in zip(adapters, said, strict=True)]}


def _check(value: float) -> float:
    if not isfinite(value):
        raise UsageError(f"strength {value} is not finite", hint="0 is the base, 1 the adapter as it was trained")
    return value
