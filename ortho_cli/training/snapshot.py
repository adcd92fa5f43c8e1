"""The whole state of a run as named tensors and JSON, and back: of any process layout, sharded weights gathered.

What trains must be finite: a state that is not is never saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import CheckpointError, NumericsError
from ortho_cli.methods.adapter_layer import whole
from ortho_cli.methods.method import Method

from .base_weights import BaseWeights

__all__ = [
    "Snapshot", "as_held", "capture", "check_finite", "held_as_parameters", "load_methods", "load_model",
    "load_optimizer", "optimizer_state", "without_prefix",
]  # fmt: skip

SEPARATOR = "|"  # between a parameter's name, which has dots, and the moment's


@dataclass
class Snapshot:
    """What a checkpoint folder holds; empty on processes that write nothing."""

    model: dict[str, Tensor]
    moments: dict[str, Tensor]
    average: dict[str, Tensor] | None
    state: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def capture(
    model: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    methods: list[Method],
    average: Mapping[str, Tensor] | None = None,
    *,
    base: BaseWeights | None = None,
    keep: bool = True,
) -> Snapshot:
    """Everything that training changes; every process must ask, since sharded tensors are gathered one by one.

    Args:
        model: unwrapped.
        optimizers: by phase.
        methods: in recipe order.
        average: averaged weights.
        base: what the model was loaded from, of which nothing is kept that is still the same.
        keep: False on processes that only help to gather.

    Returns:
        Tensors, the model's as they are held (not copied), and ``state`` for JSON.
    """
    moments: dict[str, Tensor] = {}
    state: dict[str, Any] = {"optimizers": {}, "methods": {}}
    for phase, optimizer in optimizers.items():
        tensors, state["optimizers"][phase] = optimizer_state(optimizer, model)
        moments |= {f"{phase}/{name}": tensor for name, tensor in tensors.items()}
    for index, method in enumerate(methods):
        own = dict(method.state())
        moments |= {f"method/{index}/{name}": tensor for name, tensor in own.pop("tensors", {}).items()}
        state["methods"][str(index)] = {"name": method.name, "state": own}
    weights = model.state_dict()
    if base is not None:
        weights, state["base"] = base.without(model, weights), base.describe(model)
    return Snapshot(
        _gathered(weights, keep),
        _gathered(moments, keep),
        None if average is None else _gathered(average, keep),
        state,
    )


def _gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if keep:  # a gathered tensor is as large as all shards together: it does not stay on the device
            found[name] = gathered if gathered is tensor else gathered.cpu()
    return found


def check_finite(model: nn.Module, snapshot: Snapshot, step: int) -> None:
    """Refuse a state that training would not come back from.

    Raises:
        NumericsError: weights that train or the optimizer's moments are not finite, or a buffer is not a number.
    """
    for name, buffer in model.named_buffers():
        if name in snapshot.model and buffer.is_floating_point() and bool(snapshot.model[name].isnan().any()):
            raise NumericsError(f"{name} is not a number after step {step}")
    for name in (name for name, parameter in model.named_parameters() if parameter.requires_grad):
        if not bool(snapshot.model[name].isfinite().all()):
            raise NumericsError(f"weight {name} is not finite after step {step}")
    for name, tensor in snapshot.moments.items():
        if not bool(tensor.isfinite().all()):
            raise NumericsError(f"the optimizer's {name} is not finite after step {step}")


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's moments as named tensors, and its numbers as JSON."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            flat = f"{names[id(parameter)]}{SEPARATOR}{key}"
            if isinstance(value, Tensor):
                tensors[flat] = value
            elif value is not None:
                numbers[flat] = value
    return tensors, {"state": numbers, "groups": [dict(_numbers(group)) for group in optimizer.param_groups]}


def _numbers(group: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in group.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, value


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Put saved moments back, each where its parameter is and in the dtype it was saved in.

    Raises:
        CheckpointError: a moment belongs to a parameter the model does not have.
    """
    parameters = dict(model.named_parameters())
    for flat, value in [*tensors.items(), *numbers["state"].items()]:
        name, _, key = flat.rpartition(SEPARATOR)
        if name not in parameters:
            raise CheckpointError(f"the saved optimizer has a moment for {name!r}, which the model lacks")
        parameter = parameters[name]
        # torch keeps its step counters on the CPU; everything of the parameter's shape lives beside it.
        placed = as_held(value, parameter) if isinstance(value, Tensor) and value.dim() else value
        optimizer.state[parameter][key] = placed
    for group, saved in zip(optimizer.param_groups, numbers["groups"], strict=True):
        group.update(saved)


def load_model(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    base: BaseWeights | None = None,
    said: Mapping[str, Any] | None = None,
) -> None:
    """Put saved weights back, into sharded parameters too; every tensor must be there or the base's, and no other.

    Args:
        model: as it was built.
        tensors: that were saved.
        base: what the model was loaded from.
        said: the state's `base`, where it leaves some weights to that.

    Raises:
        CheckpointError: names or shapes differ, or the base does.
    """
    held = model.state_dict()
    elsewhere = set[str]()
    if base is not None and said is not None:
        base.check(model, tensors, said)
        elsewhere = base.untouched(model)
    try:
        placed = {name: as_held(value, held.get(name, value)) for name, value in tensors.items()}
        missing, strange = model.load_state_dict(placed, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit the model: {error}") from error
    missing = [name for name in missing if name not in elsewhere]
    if missing or strange:
        raise CheckpointError(
            f"the checkpoint does not fit the model: {len(missing)} tensors missing, {len(strange)} of no place here, "
            f"first {(missing or strange)[0]}"
        )


def load_methods(methods: list[Method], saved: Mapping[str, Any], moments: Mapping[str, Tensor]) -> None:
    """Put the methods' own state back, and with it the shapes they gave the model; before the weights."""
    for index, method in enumerate(methods):
        method.load_state({**saved[str(index)]["state"], "tensors": without_prefix(moments, f"method/{index}/")})


def held_as_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, named as parameters and buffers, placed and sharded as those are."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: as_held(value, held[name]) for name, value in tensors.items()}


def as_held(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of another, and sharded as that one is."""
    if not hasattr(like, "full_tensor"):
        return value.to(like.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    # Every process has read the whole file, so none needs to send.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
