"""Put adapters into a model: choose layers by the patterns and presets of checkpoints, wrap them, freeze the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ortho_cli.checkpoints import layouts, targets
from ortho_cli.errors import OrthoError, TargetError, UsageError
from ortho_cli.linalg.starts import orthonormal_start, paired_start, soft_start

from .adapter_layer import AdapterLayer, adapter_layers, base_of, geometry
from .families import automatic_patterns

__all__ = [
    "Named",
    "check_seen_once",
    "choose",
    "freeze",
    "initial_vectors",
    "inner_model",
    "named_layers",
    "own_head",
    "replace_modules",
    "set_biases",
    "train_modules",
    "wrap",
]

Shapes = Mapping[str, tuple[int, ...]]


class Named(dict[str, tuple[int, ...]]):
    """The layers of a model by name, with the shapes of their weights; and what naming these names are in."""

    layout: str = "plain"

    def canonical(self, name: str) -> str:
        """A layer's name in every layout of the same model."""
        return layouts.to_canonical(name, self.layout)

    def index(self) -> layouts.LayerIndex:
        """Finds layers by whatever name an adapter file gives them."""
        return layouts.LayerIndex(self, self.layout)


def inner_model(model: nn.Module) -> nn.Module:
    """The model that others know: of a wrapper of ours, which says so by `wraps`, what it wraps; else the model itself.

    Files hold the names of its layers, not the wrapper's.
    """
    return model.get_submodule(getattr(model, "wraps", ""))


def named_layers(model: nn.Module) -> Named:
    """Everything in a model that multiplies or looks up: names as in `named_modules`, adapted layers as one.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> dict(named_layers(model))
    {'0': (3, 2)}
    """
    found = Named()
    for name, module in model.named_modules():
        if ".fixed_linear." in f".{name}.":
            continue
        base = base_of(module)
        weight = getattr(base, "weight", None)
        sizes = getattr(base, "out_features", None), getattr(base, "in_features", None)
        if all(isinstance(size, int) for size in sizes) and next(base.children(), None) is None:
            found[name] = (int(sizes[0] or 0), int(sizes[1] or 0))
        elif isinstance(weight, Tensor) and weight.dim() >= 2:
            found[name] = tuple(weight.shape)
    found.layout = layouts.detect({f"{name}.weight": shape for name, shape in found.items()})
    return found


def choose(model: nn.Module, patterns: str | Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """The layers that patterns mean, each one that an adapter can act on.

    Args:
        model: any module.
        patterns: globs and presets as for `add-hra`, or "auto": the usual ones for this kind of model.
        exclude: patterns of layers to leave out.

    Returns:
        Names, in model order.

    Raises:
        TargetError: a pattern that matches nothing, or a layer that cannot be adapted; with the reason.

    >>> choose(nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)}), ["q"])
    ['q']
    """
    layers = named_layers(model)
    if patterns == "auto" or list(patterns) == ["auto"]:
        patterns = automatic_patterns(layers, layers.layout)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    chosen = targets.select(patterns, layers, layers.layout, exclude).layers
    for name in chosen:
        reason = _obstacle(model, name)
        if reason is not None:
            raise TargetError(f"layer {name!r} is {reason}", hint=f"leave it out: exclude {name}")
    return list(chosen)


def _obstacle(model: nn.Module, name: str) -> str | None:
    """Why a layer cannot be adapted, if so."""
    if not name:
        return "the whole model: an adapter replaces a layer inside one, so put it into an nn.Sequential"
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return f"inside torch's {type(owner).__name__}, whose fused path reads the weight around any adapter"
    try:
        geometry(model.get_submodule(name))
    except TargetError as error:
        return error.message
    return None


def wrap(model: nn.Module, names: Sequence[str], make: Callable[[str, nn.Module], AdapterLayer]) -> list[AdapterLayer]:
    """Put an adapter on each of some layers, wherever in the model the layer stands (shared ones stand twice).

    Args:
        model: changed in place.
        names: of layers, adapted ones too: a further adapter acts after those that are there.
        make: (name, layer) -> the adapted layer.

    Raises:
        OrthoError: whatever `make` raises, with the layer's name in front; the model is then as it was.
    """
    made: dict[int, AdapterLayer] = {}
    for name in names:
        layer = model.get_submodule(name)
        try:
            made[id(layer)] = make(name, layer).train(layer.training)
        except OrthoError as error:
            raise type(error)(f"layer {name}: {error.message}", hint=error.hint, where=error.where) from error
    replace_modules(model, made, inside=lambda owner: not isinstance(owner, AdapterLayer))
    return list(made.values())


def replace_modules(
    model: nn.Module, new: Mapping[int, nn.Module], inside: Callable[[nn.Module], bool] = lambda owner: True
) -> None:
    """Put modules where others stand, everywhere: a shared one may stand twice, also in one parent.

    Args:
        model: changed in place; not itself replaced.
        new: by the `id` of the module that each takes the place of.
        inside: which parents are looked into.

    >>> layer = nn.Linear(1, 1)
    >>> model = nn.Sequential(layer, nn.ReLU(), layer)
    >>> replace_modules(model, {id(layer): nn.Identity()})
    >>> [type(module).__name__ for module in model]
    ['Identity', 'ReLU', 'Identity']
    """
    for owner in [module for module in model.modules() if inside(module)]:
        for key, child in list(owner._modules.items()):  # named_children names a shared one once
            if child is not None and id(child) in new:
                setattr(owner, key, new[id(child)])


def check_seen_once(model: nn.Module, name: str) -> None:
    """Refuse a layer that changes with every batch it sees, inside a block that gradient checkpointing computes twice.

    Raises:
        UsageError: it is in one.
    """
    parts = name.split(".")
    owners = (model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts)))
    if any("forward" in vars(owner) for owner in owners):
        raise UsageError(
            f"gradient checkpointing would show every batch to {name} twice",
            hint="choose layers outside of the blocks, or leave train.checkpoint_gradients out",
        )


def freeze(model: nn.Module) -> None:
    """Stop everything from training but the adapters that are there already."""
    kept = {id(p) for layer in _every(model) for p in layer.adapter_parameters() if p.requires_grad}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


def set_biases(model: nn.Module, bias: str) -> None:
    """Let biases train: `none`, `all` of the model, or those of adapted layers (`hra_only`)."""
    if bias == "none":
        return
    owners = model.modules() if bias == "all" else [base_of(layer) for layer in adapter_layers(model).values()]
    for module in owners:
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias" and parameter.is_floating_point():
                parameter.requires_grad_(True)


def train_modules(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let whole modules train beside the adapters, such as a new head.

    Args:
        model: with its adapters on.
        patterns: globs over module names.

    Raises:
        TargetError: a pattern that matches nothing, or a module that an adapter is in or on.

    >>> model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 3)}).requires_grad_(False)
    >>> train_modules(model, ["head"])
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['head.weight', 'head.bias']
    """
    sizes = {name: () for name, module in model.named_modules() if name and next(module.parameters(), None) is not None}
    for name in targets.select(patterns, sizes, "plain").layers if patterns else ():
        module = model.get_submodule(name)
        if _every(module):
            raise TargetError(
                f"module {name!r} holds an adapter, so it cannot be saved whole",
                hint="name modules without one in modules_to_save, or exclude its layers",
            )
        module.requires_grad_(True)


def own_head(model: nn.Module) -> list[str]:
    """The modules that a wrapper of ours says are the task's own: a new head trains beside any adapter.

    Names are those inside `inner_model`.
    """
    return list(getattr(model, "task_head", ()))


def initial_vectors(
    width: int, rank: int, *, seed: int, name: str, gram_schmidt: bool = False, soft: float | None = None
) -> Tensor:
    """Start vectors `(width, rank)` of a layer, from the seed and the layer's name without pipeline and layout.

    Those that `ortho add-hra` writes for the same seed: whoever draws them, in whatever order. `soft` is the eps of
    the soft form that starts short instead of in pairs.

    Raises:
        TargetError: a rank above the width; an odd one, unless for Gram-Schmidt.
    """
    generator = torch.Generator().manual_seed(layer_seed(seed, name))
    if soft is not None:
        return soft_start(width, rank, soft, generator)
    return (orthonormal_start if gram_schmidt else paired_start)(width, rank, generator=generator)


def layer_seed(seed: int, name: str) -> int:
    """A seed of its own for each layer, so that what one draws does not depend on the others."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")


def _every(model: nn.Module) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]
