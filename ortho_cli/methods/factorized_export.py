"""What a factored model leaves behind: the dense network of the original size, and its factors with their table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ortho_cli import __version__
from ortho_cli.checkpoints.factored import CONFIG_NAME, factored_config
from ortho_cli.checkpoints.output import atomic
from ortho_cli.checkpoints.writer import write_file

from .adapter_folder import tensor_piece
from .adapter_layer import whole
from .factorized_base import FactorizedLayer

__all__ = ["DENSE", "FACTORS", "dense_state", "factored_state", "write_exports"]

DENSE, FACTORS = "dense", "factors"


@torch.no_grad()
def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the network with every product multiplied out: it loads into the plain model.

    >>> import ortho_cli as ortho
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    >>> before = model(torch.ones(8))
    >>> _ = ortho.factorize_(model, rank=8, targets=["*"])
    >>> plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    >>> plain.load_state_dict(dense_state(model))
    <All keys matched successfully>
    >>> torch.allclose(plain(torch.ones(8)), before, atol=1e-5)
    True
    """
    return _state(model, lambda layer: {"weight": layer.weight})


@torch.no_grad()
def factored_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the network with two factors a layer; a third is taken into them."""
    return _state(model, lambda layer: dict(zip(("U", "VT"), layer.pair(), strict=True)))


def write_exports(model: nn.Module, folder: Path) -> None:
    """Write `dense/model.safetensors` and `factors/` (weights, and the table that `ortho.load_factorized` reads).

    Args:
        model: with factored layers in it; of a sharded one every process must ask.
        folder: to write; appears whole or not at all.
    """
    layers = dict(_layers(model))
    described = {"format": "pt", "ortho.version": __version__, "ortho.command": "ortho train"}
    config = factored_config({name: (layer.form, layer.rank) for name, layer in layers.items()})
    with atomic(folder) as partial:
        for name, state in ((DENSE, dense_state(model)), (FACTORS, factored_state(model))):
            (partial / name).mkdir(parents=True)
            pieces = [tensor_piece(key, value) for key, value in state.items()]
            write_file(partial / name / "model.safetensors", pieces, described)
        (partial / FACTORS / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _layers(model: nn.Module) -> Iterator[tuple[str, FactorizedLayer]]:
    """Factored layers under every name they have."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FactorizedLayer):
            yield name, module


def _state(model: nn.Module, weights: Callable[[FactorizedLayer], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The model's state, with other tensors in place of the factors."""
    factored = {f"{name}.{part}": (name, layer) for name, layer in _layers(model) for part in ("U", "VT", "M")}
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if key not in factored:
            state[key] = whole(value).detach()
        elif key.endswith(".U"):
            name, layer = factored[key]
            state |= {f"{name}.{part}": whole(made).detach() for part, made in weights(layer).items()}
    return state
