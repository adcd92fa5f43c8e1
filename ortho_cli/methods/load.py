"""Put an adapter from a file on a model: `ortho.load_adapter`, and reflections that the base itself holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.checkpoints import adapters
from ortho_cli.checkpoints.checkpoint import Checkpoint
from ortho_cli.checkpoints.dialects.contents import ortho_method
from ortho_cli.checkpoints.reading import TensorReader
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.errors import CheckpointError, TargetError
from ortho_cli.linalg.lowrank import fold_core

from .adapter_layer import AdapterLayer, geometry
from .hra_layer import HRALayer
from .inject import Named, freeze, named_layers, wrap
from .lora_layer import LoRALayer
from .saved_modules import mark_replaced

__all__ = ["attach", "hold_reflections", "load_adapter"]

FLIPPED = {"input": "output", "output": "input"}
# Parameters of HRALayer in a state dict, and what they say of it.
HELD = re.compile(r"(?P<layer>.+)\.hra_(?P<form>u|span|soft)(?P<output>_output)?")


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put a saved adapter on a model, in ortho's fast layers: the base frozen, the adapter trainable.

    Args:
        model: any module whose layers have the names the adapter was trained on; changed in place. A model that has
            an adapter gets a second one, which acts after the first.
        folder: a PEFT folder of HRA or LoRA, or any adapter of these kinds that `ortho merge` reads.

    Returns:
        The model itself.

    Raises:
        CheckpointError: no adapter, or one of another kind.
        TargetError: its layers are not the model's.

    Reference: PEFT's HRA computes the same, at several times the cost.

    >>> import tempfile
    >>> import ortho_cli as ortho
    >>> model = ortho.add_adapter(nn.Sequential(nn.Linear(8, 8)), rank=2, targets=["0"])
    >>> _ = nn.init.normal_(model[0].vectors)
    >>> folder = ortho.save_adapter(model, tempfile.mkdtemp() + "/adapter")
    >>> fresh = nn.Sequential(nn.Linear(8, 8))
    >>> _ = fresh[0].load_state_dict(model[0].fixed_linear.state_dict())
    >>> x = torch.randn(3, 8)
    >>> torch.equal(ortho.load_adapter(fresh, folder)(x), model(x))
    True
    """
    attach(model, adapters.read_adapter(folder), ("hra", "lora"))
    return model


def attach(model: nn.Module, adapter: adapters.Adapter, kinds: tuple[str, ...]) -> list[str]:
    """Put a read adapter on a model, freeze the rest, and let train what the adapter trained.

    Args:
        model: changed in place; left as it was where anything does not fit.
        adapter: of `read_adapter`.
        kinds: those allowed, of ``hra`` and ``lora``.

    Returns:
        The names of the layers.
    """
    where = str(adapter.path)
    unknown = sorted({layer.kind for layer in adapter.layers.values()} - set(kinds))
    if unknown:
        raise CheckpointError(
            f"the adapter is of kind {unknown[0]}; read here: {', '.join(kinds)}",
            hint="train it with methods: [{name: peft, ...}], or fold it in: ortho merge BASE ADAPTER -o OUT",
            where=where,
        )
    if adapter.additions or adapter.row_replacements:
        raise CheckpointError(
            "the adapter changes biases or token rows of its base by parts, which cannot go on training here",
            hint="fold it in: ortho merge BASE ADAPTER -o OUT",
            where=where,
        )
    layers = named_layers(model)
    native = layers.index().resolve_all(list(adapter.layers))
    replaced = _replaced(model, layers, adapter)
    sources = {native[name]: layer for name, layer in adapter.layers.items()}
    with TensorReader() as reader:

        def make(name: str, base: nn.Module) -> AdapterLayer:
            tensors = {role: reader.read_copy(info) for role, info in sources[name].tensors.items()}
            if sources[name].kind == "hra":
                return _reflections(base, tensors["vectors"], sources[name].options, adapter.method)
            return _low_rank(base, tensors, sources[name])

        wrap(model, [name for name in layers if name in sources], make)
        freeze(model)
        for module, parameter, info in replaced:
            mark_replaced(module)
            with torch.no_grad():
                parameter.copy_(reader.read(info))
            parameter.requires_grad_(parameter.is_floating_point())
    return list(sources)


def _reflections(base: nn.Module, vectors: Tensor, options: Any, method: dict[str, Any]) -> HRALayer:
    """One layer of reflections, in the form it was trained in."""
    side, eps = str(options.get("side", "input")), float(options.get("eps", 0.0))
    if geometry(base).kind == "transposed":  # the file knows the weight as it is stored
        side = FLIPPED[side]
    if options.get("gram_schmidt"):
        return HRALayer(base, vectors, side=side, span=True)
    if method.get("gram_schmidt") and vectors.shape[1] % 2 == 0:  # [Q0 | Q]: the frozen start, and what trains
        half = vectors.shape[1] // 2
        return HRALayer(base, vectors[:, half:], side=side, span=True, start=vectors[:, :half])
    return HRALayer(base, vectors, side=side, eps=eps)


def _low_rank(base: nn.Module, tensors: dict[str, Tensor], layer: adapters.AdapterLayer) -> LoRALayer:
    if "magnitude" in tensors:
        raise TargetError("a DoRA adapter has magnitudes, which have no layer here", hint="train it with name: peft")
    up, down = tensors["up"], tensors["down"]
    rank = down.shape[0]
    if "mid" in tensors:
        down = fold_core(tensors["mid"], down)
    alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
    scale = float(str(layer.options.get("scale", alpha / rank if alpha else 1.0)))
    return LoRALayer(base, up, down, scale=scale)


def _replaced(model: nn.Module, layers: Named, adapter: adapters.Adapter) -> list[tuple[nn.Module, Tensor, TensorInfo]]:
    """The model's own tensors that the adapter brings anew, trained biases and whole modules, and where they are."""
    own = {
        f"{place}.{key}".lstrip(".").replace(".fixed_linear.", "."): (module, tensor)
        for place, module in model.named_modules()
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    spelled = own | {layers.canonical(name): found for name, found in own.items()}
    found = []
    for name, info in adapter.replacements.items():
        module, tensor = spelled.get(name, (model, None))
        if tensor is None or tuple(tensor.shape) != info.shape:
            has = "which the model lacks" if tensor is None else f"of shape {info.shape}, here {tuple(tensor.shape)}"
            raise TargetError(f"the adapter brings {name!r}, {has}", where=str(adapter.path))
        found.append((module, tensor, info))
    return found


def hold_reflections(model: nn.Module, checkpoint: Checkpoint) -> set[str]:
    """Make a model ready for a base that holds HRA itself: wrap the layers for which it has vectors.

    After this the model's state dict has the checkpoint's names (`X.fixed_linear.weight`, `X.hra_u`), so that loading
    by name loads the adapter too. Where the stored vectors are another form of what trains (a Gram-Schmidt adapter and
    its frozen start), they are filled in here.

    Args:
        model: unadapted; changed in place.
        checkpoint: what `add-hra --as checkpoint`, the HRA authors' code, or a run of `ortho train` wrote.

    Returns:
        Names in the model's state dict that are filled already and that the checkpoint has in another form.

    Raises:
        CheckpointError: vectors for layers that the model lacks.
    """
    held = {name: match for name in checkpoint.tensors if (match := HELD.fullmatch(name))}
    if not held:
        return set()
    layers = named_layers(model)
    native = layers.index().resolve_all([match["layer"] for match in held.values()])
    method = ortho_method(checkpoint.metadata, str(checkpoint.root))
    vectors: dict[str, tuple[re.Match[str], Tensor]] = {}
    made: dict[str, HRALayer] = {}
    with TensorReader() as reader:

        def stored(layer: str, role: str) -> Tensor | None:
            info = checkpoint.tensors.get(f"{layer}.{role}")
            return None if info is None else reader.read_copy(info)

        for name, match in held.items():
            vectors[native[match["layer"]]] = (match, reader.read_copy(checkpoint.tensors[name]))

        def make(name: str, base: nn.Module) -> HRALayer:
            match, values = vectors[name]
            if match["form"] == "u" and not match["output"]:
                options = {"gram_schmidt": method.get("apply_GS"), "eps": method.get("eps", 0.0)}
                made[name] = _reflections(base, values, options | {"side": method.get("side", "input")}, method)
                return made[name]
            eps = stored(match["layer"], "hra_eps")
            side = "output" if match["output"] else "input"
            made[name] = HRALayer(
                base, values, side=side, span=match["form"] == "span", start=stored(match["layer"], "hra_start"),
                eps=0.0 if eps is None else float(eps),
            )  # fmt: skip
            return made[name]

        wrap(model, [name for name in layers if name in vectors], make)
    return {
        f"{name}.{key}"
        for name, layer in made.items()
        for key in layer.state_dict()
        if key.startswith("hra_") and f"{name}.{key}" not in checkpoint.tensors
    }
