"""The Stable Diffusion that pictures are drawn with: a run's, or a base with adapters of any dialect put on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ortho_cli.checkpoints.adapters import read_adapter
from ortho_cli.errors import TargetError, UsageError
from ortho_cli.methods.adapter_layer import AdapterLayer, adapter_layers
from ortho_cli.methods.inject import named_layers
from ortho_cli.methods.load import attach, hold_reflections
from ortho_cli.models.hint_encoder import CONTROL, add_hint_encoder, load_hint_encoder
from ortho_cli.models.stable_diffusion import open_stable_diffusion
from ortho_cli.surgery.strengths import given_strengths

from .base import open_base
from .evaluate import find_checkpoint, restore_for_judging
from .generate import Source
from .session import open_session

__all__ = ["DTYPES", "Drawing", "Weights", "drawing_model", "own_device"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Weights:
    """What a command says of the weights to draw with; `adapters` as typed, `PATH` or `PATH=S`."""

    adapters: tuple[str, ...] = ()
    strengths: tuple[str, ...] = ()
    checkpoint: str | None = None
    precision: str | None = None
    config: str | None = None

    def told(self) -> list[str]:
        """The adapters by their names, without the folders that they lie in."""
        paths, strengths = given_strengths(self.adapters, self.strengths or 1.0)
        own = (f"{Path(path).name}={strengths.of(index):g}" for index, path in enumerate(paths))
        return [text.removesuffix("=1") for text in own]


@dataclass
class Drawing:
    """The model, and what is worth saying of it."""

    model: Any
    checkpoint: str | None
    precision: str | None = None
    notes: list[str] = field(default_factory=list)


def own_device() -> torch.device:
    """The accelerator that is this process's own, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    return torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def drawing_model(source: Source, wanted: Weights) -> Iterator[Drawing]:
    """Open what pictures are drawn with, for as long as this lasts: where it belongs, in evaluation, without a graph.

    Args:
        source: a run, averaged where it averages, or a base, with the reflections that it holds.
        wanted: adapters to put on it, in order, and strengths.

    Raises:
        UsageError: an option that a run decides itself; a library is missing.
        CheckpointError: weights or an adapter cannot be read, or do not fit.
        TargetError: a strength that an adapter does not have.
    """
    if source.recipe is not None:
        if wanted.precision is not None or wanted.config is not None:
            raise UsageError("--precision and --config are for a base; a run has its own", hint="leave them out")
        session = open_session(source.recipe, judging=True, drawing=True)
        state = find_checkpoint(source.folder, wanted.checkpoint)
        restore_for_judging(session, state)
        with session.for_judging():
            _put_on(session.model, wanted)
            session.model.to(session.accelerator.device)
            yield Drawing(session.model, state.name, notes=list(getattr(session.model, "notes", ())))
        return
    if wanted.checkpoint is not None:
        raise UsageError(f"--checkpoint is of a run, and {source.place} is a base", hint="leave it out")
    device = own_device()
    precision = wanted.precision or ("fp32" if device.type == "cpu" else "fp16")
    dtype = DTYPES[precision]
    model = open_stable_diffusion(source.place, config=wanted.config, dtype=dtype)
    checkpoint = open_base(source.place)[0]
    hold_reflections(model, checkpoint)
    if any(name.startswith(f"{CONTROL}.") for name in checkpoint.tensors):
        model.notes += load_hint_encoder(add_hint_encoder(model), checkpoint)
    _put_on(model, wanted)
    model.to(device).eval()
    with torch.no_grad():
        yield Drawing(model, None, precision, list(model.notes))


def _put_on(model: Any, wanted: Weights) -> None:
    """Put adapters on, each after those that are there, and set how strongly all of them act."""
    paths, strengths = given_strengths(wanted.adapters, wanted.strengths or 1.0)
    own: dict[int, float] = {}
    for index, path in enumerate(paths):
        before = {id(layer) for layer in _layers(model)}
        adapter = read_adapter(path)
        brings_hints = any(name.startswith(f"{CONTROL}.") for name in adapter.replacements)
        if brings_hints and not hasattr(model, CONTROL):
            add_hint_encoder(model)
        attach(model, adapter, ("hra", "lora"))
        own |= {id(layer): strengths.of(index) for layer in _layers(model) if id(layer) not in before}
    adapted = adapter_layers(model)
    if not adapted:
        if strengths.values:
            raise TargetError("--strength is of adapters, and there is none", hint="name one with --adapter")
        return
    named = named_layers(model)
    for name, value in strengths.by_layer({name: named[name] for name in adapted}, named.layout).items():
        for layer in _layers(adapted[name]):
            strength = value * own.get(id(layer), 1.0)
            if strength not in (0, 1):
                layer.operator().power(strength)  # says why where there is none
            layer.strength = strength


def _layers(model: nn.Module) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]
