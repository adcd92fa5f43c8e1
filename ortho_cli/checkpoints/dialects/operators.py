"""From the stored tensors of a layer to the operator of `linalg` that acts as they do.

One small builder for each kind of `kinds.py`. The tensors are cast to the working precision as they are read, so
that an exact merge is float64 from the first product on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ortho_cli.checkpoints.adapters import AdapterLayer
from ortho_cli.checkpoints.reading import TensorReader
from ortho_cli.errors import NumericsError, TargetError

from .kinds import block_size, rank_of

if TYPE_CHECKING:
    from torch import Tensor

    from ortho_cli.linalg.operator import Operator

__all__ = ["build"]


def build(name: str, layer: AdapterLayer, dtype: str) -> Operator:
    """The operator of one layer, in `dtype` ("float32" or "float64").

    Raises:
        NumericsError: a value that no operator can be made of: non-finite, or a reflection of length zero.
        TargetError: shapes that do not chain.
    """
    import torch

    working: torch.dtype = getattr(torch, dtype)
    try:
        with TensorReader() as reader:
            tensors = {role: reader.read(info).to(working, copy=True) for role, info in layer.tensors.items()}
        return BUILDERS[layer.kind](layer, tensors).to(working)
    except (NumericsError, TargetError) as error:
        where = str(next(iter(layer.tensors.values())).path)
        raise type(error)(f"layer {name!r}: {error.message}", hint=error.hint, where=where) from error


Tensors = dict[str, "Tensor"]


def _scale(layer: AdapterLayer, tensors: Tensors) -> float:
    """alpha / rank: what the configuration says, else the stored alpha; 1 where neither is known (alpha = rank)."""
    if "scale" in layer.options:
        return float(str(layer.options["scale"]))
    rank = rank_of(layer)
    # LyCORIS ignores alpha where both Kronecker factors are whole. An alpha of 0 means the rank in every trainer.
    alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
    return alpha / rank if alpha and rank else 1.0


def _decomposed(layer: AdapterLayer, tensors: Tensors, delta: Operator) -> Operator:
    """DoRA around an additive operator, where the layer has magnitudes."""
    from ortho_cli.linalg.dora import Dora

    if "magnitude" not in tensors:
        return delta
    return Dora(delta, tensors["magnitude"], axis=str(layer.options.get("dora_axis", "output")))


def _hra(layer: AdapterLayer, tensors: Tensors) -> Operator:
    from ortho_cli.linalg.householder import Householder

    return Householder(
        tensors["vectors"],
        side=str(layer.options.get("side", "input")),
        eps=float(str(layer.options.get("eps", 0.0))),
        gram_schmidt=bool(layer.options.get("gram_schmidt", False)),
    )


def _lora(layer: AdapterLayer, tensors: Tensors) -> Operator:
    from ortho_cli.linalg.lowrank import LowRank, fold_core
    from ortho_cli.linalg.operator import Transposed

    down, up, scale = tensors["down"], tensors["up"], _scale(layer, tensors)
    if "mid" in tensors:
        down = fold_core(tensors["mid"], down)
    if not layer.options.get("transposed"):
        return _decomposed(layer, tensors, LowRank(up, down, scale))
    if "magnitude" in tensors:
        return Transposed(_decomposed(layer, tensors, LowRank(up, down, scale)))
    return LowRank(down.T, up.T, scale)  # the factors transposed: an embedding still merges in blocks of rows


def _loha(layer: AdapterLayer, tensors: Tensors) -> Operator:
    from ortho_cli.linalg.kronecker import Hadamard

    delta = Hadamard(
        tensors["w1_a"],
        tensors["w1_b"],
        tensors["w2_a"],
        tensors["w2_b"],
        _scale(layer, tensors),
        t1=tensors.get("t1"),
        t2=tensors.get("t2"),
    )
    return _decomposed(layer, tensors, delta)


def _lokr(layer: AdapterLayer, tensors: Tensors) -> Operator:
    from ortho_cli.linalg.kronecker import Kronecker

    def factor(index: int) -> Tensor | tuple[Tensor, Tensor]:
        whole = tensors.get(f"w{index}")
        return whole if whole is not None else (tensors[f"w{index}_a"], tensors[f"w{index}_b"])

    return _decomposed(layer, tensors, Kronecker(factor(1), factor(2), _scale(layer, tensors), t2=tensors.get("t2")))


def _oft(layer: AdapterLayer, tensors: Tensors) -> Operator:
    from ortho_cli.linalg.block_rotation import BlockRotation
    from ortho_cli.linalg.cayley import cayley, cayley_neumann, limit_skew, skew_from_upper

    skew = skew_from_upper(tensors["skew"], block_size(tensors["skew"].shape[1]))
    if "coft_eps" in layer.options:
        skew = limit_skew(skew, float(str(layer.options["coft_eps"])), each=True)
    form, terms = layer.options["cayley"], int(str(layer.options.get("terms", 0)))
    if form == "exact":
        blocks = cayley(skew)
    else:
        blocks = cayley_neumann(skew, terms) if form == "neumann" else _neumann_017(skew, terms)
    if layer.options.get("embedding"):
        blocks = blocks.mT  # PEFT turns the rows of an embedding forwards, the inputs of a Linear backwards
    return BlockRotation(blocks, shared=bool(layer.options.get("block_share")))


def _neumann_017(skew: Tensor, terms: int) -> Tensor:
    """The series of PEFT 0.16 and 0.17, I + 2Q + ... + 2Q^(k-1): 0.18 halved its last term and went one further."""
    import torch

    total = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew).clone()
    power = skew
    for _ in range(1, terms):
        total += 2 * power
        power = power @ skew
    return total


def _boft(layer: AdapterLayer, tensors: Tensors) -> Operator:
    from ortho_cli.linalg.block_rotation import BlockRotation, Rescale
    from ortho_cli.linalg.cayley import cayley, skew_part
    from ortho_cli.linalg.operator import Chain

    # With one butterfly factor the permutations are the identity, and BOFT is OFT with row factors.
    return Chain((BlockRotation(cayley(0.5 * skew_part(tensors["blocks"][0]))), Rescale(tensors["scale"])))


def _diag_oft(layer: AdapterLayer, tensors: Tensors) -> Operator:
    from ortho_cli.linalg.block_rotation import BlockRotation, Rescale
    from ortho_cli.linalg.cayley import diag_oft
    from ortho_cli.linalg.operator import Chain

    blocks = tensors["blocks"]
    alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
    # Both tools bound the norm by alpha * out; for LyCORIS an alpha of 0 means no bound, for kohya there always is one.
    bounded = alpha > 0 or layer.options.get("clamp") == "always"
    limit = alpha * blocks.shape[0] * blocks.shape[1] if bounded else None
    rotation = BlockRotation(diag_oft(blocks, limit), side="output")
    return Chain((rotation, Rescale(tensors["rescale"]))) if "rescale" in tensors else rotation


BUILDERS: dict[str, Callable[[AdapterLayer, Tensors], Operator]] = {
    "hra": _hra,
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "oft": _oft,
    "boft": _boft,
    "diag-oft": _diag_oft,
}
