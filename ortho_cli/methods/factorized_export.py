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
from .factored_module import FactoredModule
from .factorized_attention import whole_heads
from .factorized_base import FactorizedLayer
from .projected_attention import closed_names

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
    """The state of the network with two factors a layer, a third taken into them; tensor cores are multiplied out."""

    def two(layer: FactoredModule) -> dict[str, Tensor]:
        if isinstance(layer, FactorizedLayer):
            return dict(zip(("U", "VT"), layer.pair(), strict=True))
        return {"weight": layer.weight}

    return _state(model, two)


def write_exports(model: nn.Module, folder: Path) -> None:
    """Write `dense/model.safetensors` and `factors/` (weights, and the table that `ortho.load_factorized` reads).

    Args:
        model: with factored layers in it; of a sharded one every process must ask.
        folder: to write; appears whole or not at all.
    """
    described = {"format": "pt", "ortho.version": __version__, "ortho.command": "ortho train"}
    layers = {name: layer for name, layer in _layers(model) if isinstance(layer, FactorizedLayer)}
    states = {DENSE: dense_state(model)}
    if layers:  # the table knows no tensor cores
        states[FACTORS] = factored_state(model)
    with atomic(folder) as partial:
        for name, state in states.items():
            (partial / name).mkdir(parents=True)
            pieces = [tensor_piece(key, value) for key, value in state.items()]
            write_file(partial / name / "model.safetensors", pieces, described)
        if layers:
            config = factored_config({name: (layer.form, layer.rank) for name, layer in layers.items()})
            (partial / FACTORS / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _layers(model: nn.Module) -> Iterator[tuple[str, FactoredModule]]:
    """Factored layers under every name they have."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FactoredModule):
            yield name, module


def _state(model: nn.Module, weights: Callable[[FactoredModule], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The model's state, with other tensors in place of the factors."""
    owners: dict[str, tuple[str, FactoredModule]] = {}
    for name, layer in _layers(model):
        owners |= {f"{name}.{part}": (name, layer) for part in layer._parameters if part != "bias"}
    state: dict[str, Tensor] = {}
    done: set[str] = set()
    for key, value in model.state_dict().items():
        if key not in owners:
            state[key] = whole(value).detach()
            continue
        name, layer = owners[key]
        if name not in done:
            done.add(name)
            state |= {f"{name}.{part}": whole(made).detach() for part, made in weights(layer).items()}
    return whole_heads(model, closed_names(model, state))
