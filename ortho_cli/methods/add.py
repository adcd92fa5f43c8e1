"""New adapters in a model: `ortho.add_adapter`, and the same with a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import nn

from ortho_cli.checkpoints import layouts
from ortho_cli.errors import TargetError

from .adapter_layer import geometry
from .hra_layer import HRALayer
from .inject import Named, choose, freeze, initial_vectors, layer_seed, named_layers, wrap
from .lora_layer import LoRALayer

__all__ = ["add_adapter", "insert_hra", "insert_lora"]


def add_adapter(
    model: nn.Module,
    rank: int = 8,
    targets: str | Sequence[str] = "auto",
    *,
    exclude: Sequence[str] = (),
    side: str = "input",
    gram_schmidt: bool = False,
    start: str = "identity",
    eps: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    r"""Put trainable Householder reflections (HRA) on layers of a model and freeze everything else.

    The weight of each layer becomes :math:`W D`, `D` a product of `rank` reflections, without being touched: inputs
    are reflected instead. At first `D` is the identity, so the model's function does not change (but for
    `start="reflection"`, and for `eps`, to about `4 eps / |u|^2`).

    Args:
        model: any module; changed in place.
        rank: reflections a layer; even, unless for Gram-Schmidt.
        targets: patterns of layer names, or a preset, as for `ortho add-hra`; "auto": the usual for this kind of model.
        exclude: patterns of layers to leave alone.
        side: "input", or "output" for :math:`D^\top W`.
        gram_schmidt: keep the reflections orthonormal; starts at the identity behind a frozen copy of its start.
        start: "reflection": without that copy, the paper's form, which is not the identity; "soft": with `eps`, the
            short columns that the LLaMA code starts from, in no pairs, so that the rank may be odd.
        eps: above 0, the soft reflections of the authors' LLaMA code.
        seed: of the start; a layer's depends on its name only, and is what `ortho add-hra` writes.

    Returns:
        The model itself. Its trainable parameters are the adapter.

    Raises:
        TargetError: a pattern that matches nothing, a layer that cannot take the adapter, an odd rank.

    Cost: of a training step, what a LoRA of the same rank costs.
    Reference: HRA, arXiv:2405.17484.

    >>> import ortho_cli as ortho
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> x, y = torch.randn(64, 16), torch.randint(4, (64,))
    >>> before = nn.functional.cross_entropy(model(x), y).item()
    >>> model = ortho.add_adapter(model, rank=4, targets=["0", "2"])
    >>> optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    >>> for _ in range(30):
    ...     loss = nn.functional.cross_entropy(model(x), y)
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
    >>> loss.item() < before, model[0].weight.grad is None
    (True, True)
    """
    insert_hra(
        model, rank, targets, exclude=exclude, side=side, gram_schmidt=gram_schmidt, start=start, eps=eps, seed=seed
    )
    return model


def insert_hra(
    model: nn.Module,
    rank: int,
    targets: str | Sequence[str],
    *,
    exclude: Sequence[str] = (),
    side: str = "input",
    gram_schmidt: bool = False,
    start: str = "identity",
    eps: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """What `add_adapter` does; gives the names of the layers."""
    if not {"identity": True, "reflection": gram_schmidt, "soft": eps > 0}.get(start, False):
        raise ValueError(f"start {start!r}: 'identity', for gram_schmidt 'reflection', with eps 'soft'")
    layers = named_layers(model)
    chosen = choose(model, targets, exclude)

    def make(name: str, base: nn.Module) -> HRALayer:
        shape = geometry(base)
        vectors = initial_vectors(
            shape.width if side == "input" else shape.out, rank,
            seed=seed, name=_start_name(layers, name), gram_schmidt=gram_schmidt, soft=eps if start == "soft" else None,
        )  # fmt: skip
        frozen = vectors if gram_schmidt and start == "identity" else None
        return HRALayer(base, vectors, side=side, span=gram_schmidt, start=frozen, eps=eps)

    wrap(model, chosen, make)
    freeze(model)
    return chosen


def insert_lora(
    model: nn.Module,
    rank: int,
    targets: str | Sequence[str],
    *,
    exclude: Sequence[str] = (),
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Put LoRA on layers of a model and freeze everything else; started as PEFT does, `B` at zero.

    Args:
        model: any module; changed in place.
        rank: of the update.
        targets: as for `add_adapter`.
        exclude: likewise.
        alpha: scale times rank; by default the rank.
        rslora: the scale is `alpha / sqrt(rank)` instead.
        dropout: share of the adapters' inputs that is dropped.
        seed: of the start, each layer's by its name.

    Returns:
        The names of the layers.
    """
    layers = named_layers(model)
    chosen = choose(model, targets, exclude)
    scale = (rank if alpha is None else alpha) / (sqrt(rank) if rslora else rank)

    def make(name: str, base: nn.Module) -> LoRALayer:
        shape = geometry(base)
        if rank > min(shape.out, shape.width):
            raise TargetError(
                f"rank {rank} on a layer of {shape.width} inputs and {shape.out} outputs",
                hint="lower the rank, or leave this layer out",
            )
        down = torch.empty(rank, shape.width)
        generator = torch.Generator().manual_seed(layer_seed(seed, _start_name(layers, name)))
        nn.init.kaiming_uniform_(down, a=sqrt(5), generator=generator)
        return LoRALayer(base, torch.zeros(shape.out, rank), down, scale=scale, dropout=dropout)

    wrap(model, chosen, make)
    freeze(model)
    return chosen


def _start_name(layers: Named, name: str) -> str:
    return layouts.fingerprint_name(layers.canonical(name))
