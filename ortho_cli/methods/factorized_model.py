"""Replace layers of a model by factored ones, in place: `ortho.factorize_`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ortho_cli.errors import TargetError, UsageError, check_choice

from .factored_module import FactoredModule
from .factorized_layers import factorized_layer
from .factorized_select import Candidate, layer_ranks, select_candidates, tensor_scale
from .factorized_start import PLAIN_STARTS, draw_plain_, fill_spectral_
from .inject import layer_seed, replace_modules
from .tensor_layers import TENSOR_STARTS, TensorLayer

__all__ = ["FORMS", "factorize_"]

FORMS = ("factors", "tensor-train", "tucker")


def factorize_(
    model: nn.Module,
    rank: int | None = None,
    *,
    rank_scale: float | None = None,
    target_ratio: float | None = None,
    targets: str | Sequence[str] = "auto",
    exclude: Sequence[str] = (),
    spectral: bool = True,
    square: bool = False,
    form: str = "factors",
    plain_start: str | None = None,
    compat: str | None = None,
    seed: int = 0,
) -> dict[str, FactoredModule]:
    """Replace layers by factors `U VT` of low rank (or of high rank, to train overcomplete), in place.

    Exactly one of `rank`, `rank_scale` and `target_ratio` decides the ranks. Make the optimizer afterwards.

    Args:
        model: any module, fresh or trained; Linear, Embedding and convolutions of every kind can be factored.
        rank: of every layer.
        rank_scale: rank as a share of a layer's full one (`min(out, in)`, of a convolution `out * kh`); may exceed 1.
        target_ratio: parameters of the whole model after, over before; layers that would not shrink stay dense.
        targets: globs over layer names; "auto": all but the first convolution, embeddings and the output head.
        exclude: globs of layers to leave alone.
        spectral: start from the SVD of the weights; False draws factors anew (`plain_start`).
        square: put a square matrix, at first the identity, between the factors ("deep").
        form: "factors", or a "tensor-train" or "tucker" form of a separable convolution (`tensor_layers.py`).
        plain_start: "kaiming", "fan-in", "fan-out" or "uniform"; None: by the kind of layer.
        compat: "paper" repeats the paper's code where it is not the best way: its search for a target ratio, and its
            decomposition of convolutions, which is right for fresh weights only.
        seed: of what is drawn.

    Returns:
        The new layers by name.

    Raises:
        UsageError: not exactly one rank rule, or a ratio out of reach.
        TargetError: nothing to factor, or a layer that cannot be.
        NumericsError: a weight that is not finite.

    Cost: one eigendecomposition of each layer's smaller Gram matrix.
    Reference: FNL, arXiv:2105.01029.

    >>> import ortho_cli as ortho
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 1))
    >>> {name: layer.rank for name, layer in ortho.factorize_(model, target_ratio=0.25).items()}
    {'0': 12, '2': 12}
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> inputs = torch.randn(32, 64)
    >>> for _ in range(50):
    ...     loss = (model(inputs) - inputs[:, :1]).square().mean()
    ...     optimizer.zero_grad(); loss.backward(); ortho.frobenius_decay_(model, 1e-4); optimizer.step()
    >>> loss.item() < 0.1
    True
    """
    check_choice("form", form, FORMS)
    check_choice("plain_start", plain_start, PLAIN_STARTS if form == "factors" else TENSOR_STARTS)
    chosen = select_candidates(model, targets, exclude)
    if form == "factors":
        ranks = layer_ranks(
            model, chosen, rank=rank, rank_scale=rank_scale, target_ratio=target_ratio, square=square, compat=compat
        )
        if plain_start is None:
            plain_start = getattr(model, "plain_start", None)  # models of the paper say how it started their factors
        layers = _by_factors(chosen, ranks, spectral, square, plain_start, compat, seed)
    else:
        if rank is not None or square:
            raise UsageError(f"a {form} has several ranks and no square factor: give rank_scale or target_ratio")
        scale = tensor_scale(model, chosen, form, rank_scale=rank_scale, target_ratio=target_ratio)
        layers = _by_cores(chosen, form, scale, spectral, plain_start, seed)
    made = dict(layers)
    replace_modules(model, {id(layer.module): made[layer.name] for layer in chosen if layer.name in made})
    return made


def _by_factors(
    chosen: Sequence[Candidate],
    ranks: Sequence[int | None],
    spectral: bool,
    square: bool,
    plain_start: str | None,
    compat: str | None,
    seed: int,
) -> Iterator[tuple[str, FactoredModule]]:
    """The factored layers, filled; on the meta device shapes are all there is."""
    for layer, rank in zip(chosen, ranks, strict=True):
        if rank is None:
            continue
        made = factorized_layer(layer.module, rank, square=square)
        generator = torch.Generator().manual_seed(layer_seed(seed, layer.name))
        if spectral and not layer.weight.is_meta:
            fill_spectral_(made, layer.weight, generator, compat=compat)
        elif not layer.weight.is_meta:
            draw_plain_(made, generator, plain_start)
        yield layer.name, made


def _by_cores(
    chosen: Sequence[Candidate], form: str, scale: float, spectral: bool, plain_start: str | None, seed: int
) -> Iterator[tuple[str, FactoredModule]]:
    """The layers in tensor form, filled."""
    for layer in chosen:
        try:
            made = TensorLayer(layer.module, form, scale)
        except TargetError as error:
            raise TargetError(f"layer {layer.name!r} is {error.message}", hint=f"exclude {layer.name}") from error
        if not layer.weight.is_meta:
            generator = torch.Generator().manual_seed(layer_seed(seed, layer.name))
            made.fill_(layer.weight.detach() if spectral else None, generator, plain_start)
        yield layer.name, made
