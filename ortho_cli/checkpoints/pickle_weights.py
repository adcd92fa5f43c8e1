"""Which part of a pickled checkpoint is its state dict, and what in it is no tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

from ortho_cli.checkpoints.header import printable
from ortho_cli.checkpoints.pickle_policy import is_known
from ortho_cli.checkpoints.pickle_records import Global, Made, show, walk
from ortho_cli.checkpoints.pickle_tensors import is_tensor
from ortho_cli.errors import CheckpointError

__all__ = ["Weights", "find_weights"]

Pairs = list[tuple[object, object]]

_DICTS = ("builtins.dict", "collections.OrderedDict", "collections.defaultdict")
# Where trainers put the weights when not under `state_dict`; the last five: super-resolution and GAN training.
_USUAL_NAMES = (
    "model",
    "module",
    "model_state_dict",
    "net",
    "weights",
    "params",
    "params_ema",
    "generator",
    "g_ema",
    "ema",
)
MAX_NESTING = 8  # of `state_dict` in `state_dict`; a pickle can say that a dict holds itself


@dataclass(frozen=True, slots=True)
class Weights:
    """A state dict, and what was passed by on the way to it."""

    tensors: dict[str, Made]
    inside: tuple[str, ...]  # the keys that led to it, where they were not just `state_dict`
    beside: tuple[str, ...]  # entries next to those
    leftovers: tuple[str, ...]  # entries of the state dict that are no tensors


def find_weights(root: object) -> Weights:
    """Find the state dict in a checkpoint's object and split it into tensors and the rest.

    Raises:
        CheckpointError: no dict, no tensors, or several candidates; a class that is neither torch's nor numpy's
            anywhere in the state dict; a tensor's name that repeats, is no string or no valid Unicode.
    """
    node = root
    inside: list[str] = []
    beside: list[str] = []
    while True:
        pairs = _pairs(node)
        if pairs is None:
            raise CheckpointError(
                f"the file holds {show(node)}, not a dict of tensors",
                hint="on a machine where you trust it: torch.save(MODEL.state_dict(), 'new.pt')",
            )
        key = _next_key(pairs)
        if key is None:
            break
        if len(inside) == MAX_NESTING:
            raise CheckpointError(f"more than {MAX_NESTING} dicts in one another before any weights")
        inside.append(key)
        beside += [_entry(name, value) for name, value in pairs if name != key]
        node = [value for name, value in pairs if name == key][-1]
    assert isinstance(node, Made)
    if not any(is_tensor(value) for _, value in pairs):
        found = [*beside, *(_entry(name, value) for name, value in pairs)]
        raise CheckpointError(
            f"no tensors found; the file holds: {', '.join(found[:10]) or 'an empty dict'}",
            hint="ortho reads a dict of tensors, or one under the key `state_dict`",
        )
    weights = _split(node, pairs)
    named = tuple(inside) if set(inside) - {"state_dict"} else ()
    return Weights(weights.tensors, named, tuple(beside), weights.leftovers)


def _pairs(node: object) -> Pairs | None:
    """Keys and values of a dict, None for what is none; Python 2 wrote OrderedDict as a call with a list of pairs."""
    if not isinstance(node, Made) or node.path not in _DICTS:
        return None
    given = node.args[0] if node.args else []
    pairs = [(pair[0], pair[1]) for pair in given if len(pair) == 2] if _is_rows(given) else []
    return pairs + (node.pairs or [])


def _is_rows(value: object) -> TypeGuard[list[list[object] | tuple[object, ...]]]:
    return isinstance(value, list) and all(isinstance(row, list | tuple) for row in value)


def _next_key(pairs: Pairs) -> str | None:
    """The key of the dict to go into for the weights, None where they are here."""
    named = {key: value for key, value in pairs if isinstance(key, str)}
    if _pairs(named.get("state_dict")) is not None:
        return "state_dict"
    if any(is_tensor(value) for _, value in pairs):
        return None
    holders = [key for key in _USUAL_NAMES if any(is_tensor(value) for _, value in _pairs(named.get(key)) or ())]
    if len(holders) > 1:
        raise CheckpointError(
            f"the file holds several sets of weights: {', '.join(holders)}",
            hint="save the one you want alone: torch.save(torch.load(FILE)[NAME], 'new.pt')",
        )
    return holders[0] if holders else None


def _split(node: Made, pairs: Pairs) -> Weights:
    """The state dict's tensors by name and its other entries; refuses what neither torch nor numpy writes."""
    tensors: dict[str, Made] = {}
    leftovers: list[str] = []
    seen: set[int] = set()
    for name, value in pairs:
        has_tensors = _refuse_strange(name, (name, value), seen)
        if not is_tensor(value):
            leftovers.append(_entry(name, value) + (" with tensors" if has_tensors else ""))
            continue
        if not isinstance(name, str):
            raise CheckpointError(f"a tensor of the weights is named {show(name)}, not by a string")
        if name in tensors:
            raise CheckpointError(f"tensor {show(name)} appears twice in the weights")
        if any("\ud800" <= char <= "\udfff" for char in name):  # half a character: no file can hold it
            raise CheckpointError(f"a tensor is named {show(name)}, which is no valid Unicode")
        assert isinstance(value, Made)
        tensors[name] = value
    _refuse_strange("_metadata", (node.args, node.states), seen)
    return Weights(tensors, (), (), tuple(leftovers))


def _refuse_strange(name: object, values: tuple[object, ...], seen: set[int]) -> bool:
    """Refuse classes that neither torch nor numpy writes; whether tensors were met that were not seen before."""
    has_tensors = False
    for record in walk(values, seen):
        if isinstance(record, Global) and not is_known(record.path):
            raise CheckpointError(
                f"entry {show(name)} of the weights holds {record.path[:200]}, not only tensors and plain values",
                hint="on a machine where you trust it: torch.save(MODEL.state_dict(), 'new.pt')",
            )
        has_tensors = has_tensors or is_tensor(record)
    return has_tensors


def _entry(name: object, value: object) -> str:
    shown = printable(name)[:80] if isinstance(name, str) else show(name)
    return f"{shown} ({show(value)})"
