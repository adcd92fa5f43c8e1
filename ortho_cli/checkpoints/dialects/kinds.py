"""The kinds of adapted layer: which tensors each has, in which shapes, and which weights it fits.

    kind      roles (shape)                                                       options
    hra       vectors (width, r)                                                  side, eps, gram_schmidt
    lora      down (r, in) up (out, r) [mid (r, r, k, k)] [magnitude]              scale, transposed, dora, dora_axis
    loha      w1_a (out, r) w1_b (r, in) w2_a w2_b [t1 t2] [magnitude]             scale, dora, dora_axis
    lokr      w1 or w1_a w1_b, w2 or w2_a w2_b [t2] [magnitude]                    scale, dora, dora_axis
    oft       skew (blocks, b(b-1)/2), PEFT's, input side                          cayley, terms, block_share, coft_eps
    boft      blocks (1, n, b, b) scale (out, 1), PEFT's, input side
    diag-oft  blocks (n, b, b) [rescale (out, 1)], kohya and LyCORIS, output side  clamp

The additive kinds may bring `alpha`, a stored scalar: scale = alpha / r where no option says it. In the Tucker forms
(`mid`, `t1`, `t2`) kernel and channels are factored apart; LyCORIS stores `w*_a` there as `(r, out)`.
Everything here needs shapes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt, prod

from ortho_cli.checkpoints.adapters import AdapterLayer
from ortho_cli.checkpoints.tensors import FLOAT_DTYPES
from ortho_cli.errors import CheckpointError

__all__ = ["block_size", "check_layer", "dimensions", "misfit", "rank_of"]

REQUIRED = {
    "hra": {"vectors"},
    "lora": {"down", "up"},
    "loha": {"w1_a", "w1_b", "w2_a", "w2_b"},
    "lokr": set[str](),  # either form of each factor: see _lokr_flaw
    "oft": {"skew"},
    "boft": {"blocks", "scale"},
    "diag-oft": {"blocks"},
}
DIMS = {"hra": {"vectors": 2}, "oft": {"skew": 2}, "boft": {"blocks": 4}, "diag-oft": {"blocks": 3}}


def _shapes(layer: AdapterLayer) -> dict[str, tuple[int, ...]]:
    return {role: info.shape for role, info in layer.tensors.items()}


def rank_of(layer: AdapterLayer) -> int | None:
    """The rank parameter of a layer, None where the kind has none."""
    shape = _shapes(layer)
    if layer.kind == "hra":
        return shape["vectors"][1]
    for role in ("down", "w1_b", "w2_b"):
        if shape.get(role):
            return shape[role][0]
    return None


def block_size(elements: int) -> int:
    """The side b of a skew matrix with b(b-1)/2 numbers above its diagonal, 0 where there is no such b.

    >>> block_size(496), block_size(5)
    (32, 0)
    """
    side = (1 + isqrt(1 + 8 * elements)) // 2
    return side if side * (side - 1) // 2 == elements else 0


def dimensions(layer: AdapterLayer) -> tuple[int | None, int | None]:
    """(out, in) of the weights a layer fits, a convolution as `in/groups * kh * kw`; None where any number will do."""
    shape = _shapes(layer)
    if layer.kind == "hra":
        width = shape["vectors"][0]
        return (width, None) if layer.options.get("side") == "output" else (None, width)
    if layer.kind == "lora":
        inputs = prod(shape["down"][1:]) * prod(shape.get("mid", ())[2:])
        return (inputs, shape["up"][0]) if layer.options.get("transposed") else (shape["up"][0], inputs)
    if layer.kind == "loha":
        if "t1" in shape:
            return shape["w1_a"][1], shape["w1_b"][1] * prod(shape["t1"][2:])
        return shape["w1_a"][0], shape["w1_b"][1]
    if layer.kind == "lokr":
        (rows1, columns1), (rows2, columns2) = _lokr_factor(shape, 1), _lokr_factor(shape, 2)
        return rows1 * rows2, columns1 * columns2
    if layer.kind == "oft":
        return None, None if layer.options.get("block_share") else shape["skew"][0] * block_size(shape["skew"][1])
    if layer.kind == "boft":
        return prod(shape["scale"]), shape["blocks"][1] * shape["blocks"][2]
    return shape["blocks"][0] * shape["blocks"][1], None  # diag-oft


def _lokr_factor(shape: dict[str, tuple[int, ...]], index: int) -> tuple[int, int]:
    whole = shape.get(f"w{index}")
    if whole is not None:
        return whole[0], prod(whole[1:])
    left, right = shape[f"w{index}_a"], shape[f"w{index}_b"]
    core = shape.get(f"t{index}")
    return (left[1], right[1] * prod(core[2:])) if core is not None else (left[0], right[1])


def misfit(layer: AdapterLayer, weight_shape: Sequence[int]) -> str | None:
    """Why a weight of this shape cannot take the layer, or None."""
    if len(weight_shape) < 2:
        return f"a weight of shape {tuple(weight_shape)} is not a matrix or a convolution"
    rows, columns = weight_shape[0], prod(weight_shape[1:])
    out, inputs = dimensions(layer)
    if out is not None and out != rows:
        return f"the adapter has {out} rows (outputs), the weight {tuple(weight_shape)} has {rows}"
    if inputs is not None and inputs != columns:
        return f"the adapter has {inputs} columns (inputs), the weight {tuple(weight_shape)} has {columns}"
    if layer.kind == "oft" and layer.options.get("block_share"):
        block = block_size(layer.tensors["skew"].shape[1])
        if columns % block:
            return f"shared blocks of {block} do not divide the {columns} inputs of the weight {tuple(weight_shape)}"
    magnitude = layer.tensors.get("magnitude")
    if magnitude is not None:
        by_input = layer.options.get("dora_axis") == "input" or bool(layer.options.get("transposed"))
        wanted = weight_shape[1] if by_input else rows
        if magnitude.numel != wanted:
            return f"the magnitude has {magnitude.numel} numbers, the weight {tuple(weight_shape)} needs {wanted}"
    return None


def check_layer(name: str, layer: AdapterLayer) -> AdapterLayer:
    """The layer itself, once its tensors are known to belong together.

    Raises:
        CheckpointError: a tensor of the layer is missing, no float, or of a shape that its kind does not have.
    """
    where = str(next(iter(layer.tensors.values())).path)
    missing = REQUIRED[layer.kind] - layer.tensors.keys()
    if missing:
        raise CheckpointError(f"layer {name!r} ({layer.kind}) lacks its tensor {min(missing)!r}", where=where)
    for info in layer.tensors.values():
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"tensor {info.name!r} is {info.dtype}, an adapter's must be floats", where=where)
    for role, dims in DIMS.get(layer.kind, {}).items():
        if len(layer.tensors[role].shape) != dims:
            found = layer.tensors[role].shape
            raise CheckpointError(f"layer {name!r}: {role} has shape {found}, {dims} dimensions expected", where=where)
    reason = FLAWS.get(layer.kind, _no_flaw)(_shapes(layer))
    if reason:
        raise CheckpointError(f"layer {name!r} ({layer.kind}): {reason}", where=where)
    return layer


def _no_flaw(shape: dict[str, tuple[int, ...]]) -> None:
    return None


def _diag_oft_flaw(shape: dict[str, tuple[int, ...]]) -> str | None:
    count, block, other = shape["blocks"]
    if block != other:
        return f"blocks are not square: {shape['blocks']}"
    rows = prod(shape.get("rescale", (count * block,)))
    return None if rows == count * block else f"rescale has {rows} numbers for {count * block} rows"


def _lora_flaw(shape: dict[str, tuple[int, ...]]) -> str | None:
    down, up, mid = shape["down"], shape["up"], shape.get("mid")
    if len(down) < 2 or len(up) < 2 or 0 in (*down, *up):
        return f"factors {up} and {down} are not matrices (a sharded adapter saved without gathering?)"
    inner = prod(up[1:])
    if mid is None and inner != down[0]:
        return f"factors {up} and {down} do not multiply (the adapter of a grouped convolution cannot be merged)"
    if mid is not None and (len(mid) < 3 or mid[0] != inner or mid[1] != down[0] or prod(down[2:]) != 1):
        return f"factors {up}, {mid} and {down} do not multiply"
    return None


def _loha_flaw(shape: dict[str, tuple[int, ...]]) -> str | None:
    if ("t1" in shape) != ("t2" in shape):
        return "one of t1 and t2 is missing"
    for left, right, core in (("w1_a", "w1_b", "t1"), ("w2_a", "w2_b", "t2")):
        reason = _pair_flaw(shape[left], shape[right], shape.get(core))
        if reason:
            return reason
    return None


def _lokr_flaw(shape: dict[str, tuple[int, ...]]) -> str | None:
    for index in (1, 2):
        if f"w{index}" in shape:
            if len(shape[f"w{index}"]) < 2:
                return f"w{index} has shape {shape[f'w{index}']}"
            if {f"w{index}_a", f"w{index}_b", f"t{index}"} & shape.keys():
                return f"w{index} is there whole and in factors"
            continue
        if f"w{index}_a" not in shape or f"w{index}_b" not in shape:
            return f"neither w{index} nor both of w{index}_a and w{index}_b are there"
        reason = _pair_flaw(shape[f"w{index}_a"], shape[f"w{index}_b"], shape.get(f"t{index}"))
        if reason:
            return reason
    return None


def _pair_flaw(left: tuple[int, ...], right: tuple[int, ...], core: tuple[int, ...] | None) -> str | None:
    if len(left) != 2 or len(right) != 2:
        return f"factors {left} and {right} are not matrices"
    fits = left[1] == right[0] if core is None else len(core) >= 3 and (left[0], right[0]) == core[:2]
    return None if fits else f"factors {left}, {core or ''} and {right} do not multiply".replace(",  and", " and")


def _oft_flaw(shape: dict[str, tuple[int, ...]]) -> str | None:
    return None if block_size(shape["skew"][1]) else f"no skew matrix has {shape['skew'][1]} numbers above its diagonal"


def _boft_flaw(shape: dict[str, tuple[int, ...]]) -> str | None:
    blocks = shape["blocks"]
    if blocks[2] != blocks[3]:
        return f"blocks are not square: {blocks}"
    return None if blocks[0] == 1 else f"{blocks[0]} butterfly factors; only one (which is OFT) can be merged exactly"


FLAWS = {
    "lora": _lora_flaw,
    "loha": _loha_flaw,
    "lokr": _lokr_flaw,
    "oft": _oft_flaw,
    "boft": _boft_flaw,
    "diag-oft": _diag_oft_flaw,
}
