"""What a training recipe would do: layers, parameters, steps and memory, on the meta device: no weight is allocated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ortho_cli import registry
from ortho_cli.errors import RecipeError, UsageError
from ortho_cli.methods.inject import choose
from ortho_cli.methods.method import Context

from .base import gone_base
from .optimizers import build_optimizer, parameter_groups
from .recompute import recompute_activations
from .session import check_best, shrink_frozen

__all__ = ["describe"]

FLOAT = 4  # bytes of an averaged weight


def describe(recipe: Any) -> dict[str, Any]:
    """Layers, parameters, steps and memory of a recipe, without allocating a weight.

    Args:
        recipe: a resolved `TrainRecipe`.

    Returns:
        ``details``, a line for each pattern of each method; ``totals``: parameters, those that train, steps, and the
        memory of one process in bytes, by part; ``notes``.

    Raises:
        OrthoError: a method's targets match nothing.

    Cost: no tensor is allocated; full-size models take seconds. Data is opened to count the steps of an epoch.
    """
    task = registry.resolve("tasks", recipe.task.name)(recipe.task, recipe.data, seed=recipe.train.seed)
    check_best(recipe, task)
    notes = [f"model.base: {gone}" for gone in [gone_base(recipe.model.base)] if gone]
    details: list[dict[str, Any]] = []
    with torch.device("meta"):
        model: nn.Module = task.build_model(recipe.model)
        notes += [f"model: {note}" for note in getattr(model, "notes", ())]
        if recipe.train.checkpoint_gradients:
            recompute_activations(model)
        before = _count(model.parameters())
        methods = []
        for config in recipe.methods:
            method = registry.resolve("methods", config.name)(config)
            chosen = method.chosen(model) if hasattr(method, "chosen") else _chosen(config, model)
            held = {id(parameter) for parameter in model.parameters()}
            method.prepare(model, Context(recipe.train.seed, 1, recipe.task.name, recipe.model.base))
            added = {name: each for name, each in model.named_parameters() if id(each) not in held}
            details += _details(config.name, chosen, added)
            methods.append(method)
        shrink_frozen(model, getattr(recipe.model, "frozen", "fp32"))
        memory = _memory(recipe, task, model, methods)
    if "activations" not in memory:
        notes.append("memory: without activations, which this task cannot tell beforehand")
    steps = recipe.train.steps
    try:
        steps = steps or recipe.train.epochs * min(task.steps_per_epoch, recipe.train.limit_batches or 10**12)
    except (RecipeError, UsageError) as error:  # no data, or no library that could open it
        notes.append(f"steps: {recipe.train.epochs} epochs; the data is not here to count them ({error.message})")
    totals = {
        "parameters": before,
        "added": _count(model.parameters()) - before,
        "trainable": _count(parameter for parameter in model.parameters() if parameter.requires_grad),
        "steps": steps,
        "memory_bytes": sum(memory.values()),
        **{f"memory_{name}": value for name, value in memory.items()},
    }
    return {"details": details, "totals": totals, "notes": notes}


def _chosen(config: Any, model: nn.Module) -> dict[str, list[str]]:
    """The layers that each pattern of a method means, before the method has touched the model."""
    targets = getattr(config, "targets", None)
    if targets is None or getattr(config, "adapter", None) is not None:
        return {}
    patterns = [targets] if isinstance(targets, str) else list(targets)
    return {pattern: choose(model, [pattern], config.exclude) for pattern in patterns}


def _details(method: str, chosen: dict[str, list[str]], added: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    lines = []
    for pattern, layers in chosen.items():
        inside = tuple(f"{layer}." for layer in layers)
        own = _count(parameter for name, parameter in added.items() if name.startswith(inside))
        lines.append({"method": method, "pattern": pattern, "layers": len(layers), "added": own})
    return lines or [{"method": method, "pattern": "", "layers": None, "added": _count(added.values())}]


def _memory(recipe: Any, task: Any, model: nn.Module, methods: list[Any]) -> dict[str, int]:
    """Bytes of one process, by part: an optimizer step on the meta device shows what it keeps."""
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    memory = {"weights": _bytes([*model.parameters(), *model.buffers()]), "gradients": _bytes(training)}
    claimed = [group for method in methods for group in method.param_groups(model)]
    config = recipe.optimizer
    groups = parameter_groups(model, config.weight_decay, decay_norms=config.decay_norms, claimed=claimed)
    optimizer = build_optimizer(config, groups)
    for parameter in training:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    memory["moments"] = _bytes(
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )
    if recipe.train.ema is not None:
        memory["average"] = FLOAT * _count(training)
    with torch.device("cpu"), FakeTensorMode():  # autocast and some kernels know no meta device
        batch = task.example(recipe.data.batch // recipe.train.accumulate)
        if batch is not None:
            _fill(model)
            memory["activations"] = _activations(task, model, batch)
    return memory


def _fill(model: nn.Module) -> None:
    """Put tensors of the mode that is active in place of the meta ones."""
    filled: dict[int, nn.Parameter] = {}
    replaced = []  # an id is only a parameter's while that lives
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            replaced.append(parameter)
            if id(parameter) not in filled:  # tied ones stay one
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                filled[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, filled[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _activations(task: Any, model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that a forward pass keeps for backward, parameters excluded; each storage once."""
    kept: dict[int, Tensor] = {}
    weights = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = tensor
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = [task.loss(model, batch, phase) for phase in task.phases]
    del losses
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
