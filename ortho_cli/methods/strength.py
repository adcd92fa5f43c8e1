r"""The strength of adapters in a model at run time: `ortho.set_strength`.

At strength s an HRA layer turns by s times its angles, `D^s = I + Z (K^s - I) Z^T`, as `ortho merge --strength` does;
a LoRA layer adds s times its product. What is kept is `Z (d, r)` and `K^s (r, r)`: no weight is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from torch import nn

from ortho_cli.checkpoints import targets
from ortho_cli.errors import TargetError, UsageError

from .adapter_layer import AdapterLayer, adapter_layers
from .inject import named_layers
from .saved_modules import replaced_modules

__all__ = ["set_strength"]


def set_strength(model: nn.Module, strength: float | str | Sequence[float | str]) -> nn.Module:
    """Slide a model between its base (0) and its adapters as they were trained (1), or beyond.

    Rotations turn by that share of their angles, so that singular values are kept all the way; LoRA is scaled. The
    state dict and what `save_adapter` writes stay those of strength 1, and only there can adapters be trained: a
    forward in training mode that would give them gradients says so, and in evaluation mode gradients reach the inputs,
    not the adapters. Whole tensors that came or train with an adapter (`modules_to_save`, biases) have nothing between
    base and trained here, as the base's are not kept: leave their modules whole, as in ``[0.5, "head=1"]``.

    Args:
        model: with adapters of `add_adapter`, `load_adapter`, or the methods `hra` and `lora`; changed in place.
        strength: for all layers; in a list, ``"PATTERN=0.3"`` speaks for some and the last one wins, as in
            ``[0.7, "up_blocks.**=0.3"]``. Layers that nothing speaks for keep what they have.

    Returns:
        The model itself.

    Raises:
        TargetError: no adapter, a pattern that matches no adapted layer, an adapter that has nothing between 0 and 1
            (an odd number of reflections, soft ones), or a strength other than 1 for a whole tensor. The model is left
            as it was.
        UsageError: a strength that is no finite number.

    Cost: `O(d r^2)` a layer, once; a forward costs what it does at strength 1.
    Reference: the geodesic of the rotation group; arXiv:2405.17484 for the adapter.

    >>> import torch
    >>> import ortho_cli as ortho
    >>> model = ortho.add_adapter(nn.Sequential(nn.Linear(8, 8)), rank=4, targets=["0"]).eval()
    >>> _ = nn.init.normal_(model[0].vectors)
    >>> x, base = torch.randn(3, 8), model[0].fixed_linear
    >>> trained = model(x)
    >>> half = ortho.set_strength(model, 0.5)(x)
    >>> torch.allclose(half, nn.functional.linear(x, model[0].merged_weight(), base.bias), atol=1e-5)
    True
    >>> torch.equal(ortho.set_strength(model, 0)(x), base(x)), torch.equal(ortho.set_strength(model, 1)(x), trained)
    (True, True)
    """
    several = [strength] if isinstance(strength, (int, float, str)) else list(strength)
    named = named_layers(model)
    adapted = adapter_layers(model)
    if not adapted:
        raise TargetError(
            "the model has no adapter of ortho's", hint="ortho.load_adapter(model, FOLDER) or ortho.add_adapter(model)"
        )
    replaced = replaced_modules(model)
    shapes = {name: named.get(name, ()) for name in (*replaced, *adapted)}
    given = targets.per_layer([str(value) for value in several], shapes, named.layout, float)
    bad = next((value for value in given.values() if not isfinite(value)), None)
    if bad is not None:
        raise UsageError(f"strength {bad} is not finite", hint="0 is the base, 1 the adapter as it was trained")
    for name, value in given.items():
        if name in replaced and value != 1:
            raise TargetError(
                f"the adapter replaced whole tensors of {name!r}, and what the base had there is not kept: there is "
                f"nothing at strength {value:g}",
                hint=f"merge at it instead: ortho merge BASE ADAPTER={value:g} -o OUT; or leave them whole: '{name}=1'",
            )
    chosen = [(layer, value) for name, value in given.items() if name in adapted for layer in _nested(adapted[name])]
    for layer, value in chosen:
        if value not in (0, 1):
            layer.operator().power(value)  # refused here, before the first is changed
    for layer, value in chosen:
        layer.strength = value
    return model


def _nested(layer: nn.Module) -> list[AdapterLayer]:
    """An adapted layer and those it is put on."""
    found = []
    while isinstance(layer, AdapterLayer):
        found.append(layer)
        layer = layer.fixed_linear
    return found
