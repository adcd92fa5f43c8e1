"""What a dialect has understood of a file so far, and the error for what it has not.

Every tensor must be accounted for: a name that no rule claims is an error with the nearest name that would have been
understood, because a silently skipped tensor is a silently wrong merge.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from typing import Any, NamedTuple

from ortho_cli.checkpoints.adapters import AdapterLayer, Addition
from ortho_cli.checkpoints.header import printable
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.errors import CheckpointError

__all__ = ["Contents", "Dialect", "nearest", "ortho_method", "unclaimed"]

MAX_COMPARED = 2000  # names a hint is looked for among: comparing is slow, and an adapter has no more


class Dialect(NamedTuple):
    """One dialect, as `registry` lists it.

    Attributes:
        claims: (tensor names, ``adapter_config.json`` or empty, metadata) -> whether the file is the dialect's.
        read: (tensors, configuration, metadata, file) -> the dialect's exact name, the contents, the configuration.
    """

    claims: Callable[[Collection[str], Mapping[str, Any], Mapping[str, str]], bool]
    read: Callable[
        [Mapping[str, TensorInfo], Mapping[str, Any], Mapping[str, str], str], tuple[str, Contents, dict[str, Any]]
    ]


@dataclass
class Contents:
    """The parts of an adapter, filled in by its dialect."""

    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    replacements: dict[str, TensorInfo] = field(default_factory=dict)
    additions: dict[str, Addition] = field(default_factory=dict)
    row_replacements: dict[str, tuple[tuple[int, ...], TensorInfo]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    bound: bool = False

    @property
    def empty(self) -> bool:
        """Nothing was found."""
        return not (self.layers or self.replacements or self.additions or self.row_replacements)

    def add_layer(self, name: str, layer: AdapterLayer, where: str) -> None:
        """Add a layer that no other tensors have described yet.

        Raises:
            CheckpointError: two sets of tensors are for the same layer.
        """
        if name in self.layers:
            other = next(iter(self.layers[name].tensors.values())).name
            found = next(iter(layer.tensors.values())).name
            raise CheckpointError(
                f"{printable(other)!r} and {printable(found)!r} are for the same layer {name!r}", where=where
            )
        self.layers[name] = layer

    def rename(self, rename: Callable[[str], str]) -> None:
        """Give every layer and tensor another name."""
        self.layers = {rename(name): layer for name, layer in self.layers.items()}
        self.replacements = {rename(name): info for name, info in self.replacements.items()}
        self.additions = {rename(name): addition for name, addition in self.additions.items()}
        self.row_replacements = {rename(name): rows for name, rows in self.row_replacements.items()}

    def take(self, other: Contents, component: str = "") -> None:
        """Add the parts of another folder or component, its names under ``component.``."""
        prefix = f"{component}." if component else ""
        self.layers.update({prefix + name: layer for name, layer in other.layers.items()})
        self.replacements.update({prefix + name: info for name, info in other.replacements.items()})
        self.additions.update({prefix + name: addition for name, addition in other.additions.items()})
        self.row_replacements.update({prefix + name: rows for name, rows in other.row_replacements.items()})
        self.notes += [note for note in other.notes if note not in self.notes]
        self.bound = self.bound or other.bound


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint with the known names closest to `name`, or an empty one.

    >>> nearest("to_qq", ["to_q", "to_k", "ff.net"])
    'nearest names: to_q, to_k'
    """
    close = get_close_matches(name, list(islice(known, MAX_COMPARED)), n=2, cutoff=0.5)
    return f"nearest names: {', '.join(close)}" if close else ""


def unclaimed(names: Collection[str], known: Collection[str], where: str) -> CheckpointError:
    """The error for tensors that no rule of the dialect accounts for."""
    first = min(names)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return CheckpointError(
        f"unknown tensor {printable(first)!r}{more}: nothing says what it does",
        hint=nearest(first, known) or "write to the authors of ortho if this is a format it should read",
        where=where,
    )


def ortho_method(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """What `ortho` wrote of the method into a file's metadata (`ortho.method`), else empty.

    Raises:
        CheckpointError: it is no JSON object.
    """
    text = metadata.get("ortho.method")
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("metadata field ortho.method is not JSON", where=where) from error
    if not isinstance(content, dict):
        raise CheckpointError("metadata field ortho.method is not a JSON object", where=where)
    return content
