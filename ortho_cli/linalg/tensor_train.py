r"""Computing with a weight in tensor-train or Tucker form: applied, measured and decayed without being rebuilt.

Activations go through the cores one after the other, and the norm is one sweep over them. A Tucker form is a train
whose middle core is the product of its own core and its middle factor. Decompositions: `tensor.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ortho_cli.linalg.precision import at_least_float32
from ortho_cli.linalg.tensor import Train, Tucker

__all__ = [
    "apply_train",
    "train_decay_gradients",
    "train_squared_norm",
    "train_to_matrix",
    "tucker_as_train",
    "tucker_decay_gradients",
]


def tucker_as_train(core: Tensor, first: Tensor, middle: Tensor, last: Tensor) -> Train:
    """See a Tucker form as a tensor train: the core absorbs the middle factor; differentiable."""
    return first, torch.einsum("akb,dk->adb", core, middle), last.mT


def train_to_matrix(cores: Train, shape: tuple[int, ...]) -> Tensor:
    """Rebuild the weight of a train, for export; differentiable."""
    head, middle, tail = cores
    return (head @ middle.flatten(1)).reshape(-1, tail.shape[0]).matmul(tail).reshape(shape)


def apply_train(x: Tensor, cores: Train, out_features: int) -> Tensor:
    """Compute `x W^T` for a weight held as a train, core by core.

    Where the cut between outputs and inputs falls inside a core that does not divide there, that core is first
    multiplied with a neighbour; only if neither end allows it is the whole weight rebuilt.

    Args:
        x: `(..., in)`.
        cores: of a weight `(out_features, in)`.
        out_features: of the weight.

    Returns:
        `(..., out_features)`; differentiable.

    Cost: per row of x, with `d2 = o i` dealt to outputs and inputs, `in r2 + r1 d2 r2 + out r1` multiply-adds.

    >>> from ortho_cli.linalg.tensor import tensor_train
    >>> weight, x = torch.randn(8, 8), torch.randn(3, 8)
    >>> cores = tensor_train(weight, (4, 4, 4), (4, 4))
    >>> torch.allclose(apply_train(x, cores, 8), x @ weight.mT, atol=1e-5)
    True
    """
    head, middle, tail = cores
    in_features = x.shape[-1]
    cut_left, cut_right = out_features % head.shape[0] == 0, in_features % tail.shape[1] == 0
    if not cut_left and not cut_right:
        return torch.nn.functional.linear(x, train_to_matrix(cores, (out_features, in_features)))
    flat = x.reshape(-1, in_features)
    if cut_left and cut_right:
        outer, inner = out_features // head.shape[0], in_features // tail.shape[1]
        state = flat.reshape(-1, inner, tail.shape[1]) @ tail.mT
        bridge = middle.reshape(head.shape[1], outer, inner, tail.shape[0]).permute(2, 3, 1, 0)
        state = state.flatten(1) @ bridge.reshape(inner * tail.shape[0], -1)
        state = state.reshape(-1, outer, head.shape[1]) @ head.mT
        return state.mT.reshape(*x.shape[:-1], out_features)
    if cut_left:
        outer = out_features // head.shape[0]
        bridge = (middle @ tail).reshape(head.shape[1], outer, in_features).permute(2, 1, 0)
        state = (flat @ bridge.reshape(in_features, -1)).reshape(-1, outer, head.shape[1]) @ head.mT
        return state.mT.reshape(*x.shape[:-1], out_features)
    inner = in_features // tail.shape[1]
    state = (flat.reshape(-1, inner, tail.shape[1]) @ tail.mT).flatten(1)
    bridge = (head @ middle.flatten(1)).reshape(out_features, -1)
    flat_out: Tensor = state @ bridge.mT
    return flat_out.reshape(*x.shape[:-1], out_features)


def train_squared_norm(cores: Train) -> Tensor:
    """Compute `||W||_F^2` of a train by a sweep over its cores; differentiable.

    Cost: `d1 r1^2 + d2 r1 r2 (r1 + r2) + d3 r2^2`.

    >>> train_squared_norm((torch.ones(2, 1), torch.ones(1, 2, 1), torch.full((1, 2), 3.0))).item()
    72.0
    """
    head, middle, tail = (at_least_float32(core, "core") for core in cores)
    left: Tensor = torch.tensordot(head.mT @ head, middle, dims=1)
    return (left * (middle @ (tail @ tail.mT))).sum()


def train_decay_gradients(cores: Train) -> Train:
    r"""Differentiate :math:`\tfrac12 \|W\|_F^2` with respect to the cores of a train, in closed form.

    Cost: twice that of :func:`train_squared_norm`.

    >>> cores = torch.randn(2, 3), torch.randn(3, 4, 2), torch.randn(2, 5)
    >>> gradients = train_decay_gradients(cores)
    >>> all(torch.allclose((core * g).sum(), train_squared_norm(cores)) for core, g in zip(cores, gradients))
    True
    """
    head, middle, tail = (at_least_float32(core, "core") for core in cores)
    right = middle @ (tail @ tail.mT)
    left = torch.tensordot(head.mT @ head, middle, dims=1)
    into_head = right.flatten(1) @ middle.flatten(1).mT
    into_tail = left.flatten(0, 1).mT @ middle.flatten(0, 1)
    return head @ into_head, torch.tensordot(head.mT @ head, right, dims=1), into_tail @ tail


def tucker_decay_gradients(core: Tensor, first: Tensor, middle: Tensor, last: Tensor) -> Tucker:
    """As :func:`train_decay_gradients`, for the core and the factors of a Tucker form."""
    core, first, middle, last = (at_least_float32(part, "Tucker factor") for part in (core, first, middle, last))
    d_first, bridge, d_last = train_decay_gradients(tucker_as_train(core, first, middle, last))
    d_core = torch.einsum("adb,dk->akb", bridge, middle)
    d_middle = torch.einsum("adb,akb->dk", bridge, core)
    return d_core, d_first, d_middle, d_last.mT
