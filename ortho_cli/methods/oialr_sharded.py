"""OIALR under torch's `fully_shard`: a layer in a new form becomes a unit of its own, sharded as the old one was.

Shards cannot change their shapes, and nothing takes a module out of the unit it was sharded with. So a layer whose
shapes change is made anew from whole tensors and sharded by itself, inside the unit of its block. Shards of the dense
weight stay with that unit until the model is sharded anew, as on resuming.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .adapter_layer import is_sharded
from .basis_layers import BasisLayer, BasisLinear

__all__ = ["shard_like", "unsharded"]

COMPOSABLE = "__composable_api"  # how torch begins the names under which a module knows what was done to it


def unsharded(layer: nn.Module) -> nn.Module:
    """The dense layer that a sharded one is, or stands for, outside of FSDP.

    Returns:
        A layer of the same settings, with a whole bias of its own, and a weight without memory.
    """
    from torch.distributed.fsdp import FSDPModule

    dense = layer._outline[0] if isinstance(layer, BasisLayer) else layer
    kinds = (each for each in type(dense).__mro__ if issubclass(each, nn.Module) and not issubclass(each, FSDPModule))
    kind = next(kinds)
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)  # no hooks
    settings = {key: value for key, value in dense.__dict__.items() if not key.startswith(COMPOSABLE)}
    twin.__dict__.update({key: value for key, value in settings.items() if key not in twin.__dict__})
    weight, bias = dense._parameters["weight"], layer._parameters.get("bias")
    assert weight is not None
    empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    twin.register_parameter("weight", nn.Parameter(empty, weight.requires_grad))
    twin.register_parameter("bias", None if bias is None else nn.Parameter(_own(bias), bias.requires_grad))
    return twin.train(layer.training)


def shard_like(layer: BasisLayer, weight: Tensor) -> None:
    """Shard a layer over the processes among which a weight is; nothing where that is whole."""
    if not is_sharded(weight):
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor

    assert isinstance(weight, DTensor)
    fully_shard(layer, mesh=weight.device_mesh, reshard_after_forward=True)
    if isinstance(layer, BasisLinear):
        register_fsdp_forward_method(layer, "rows_of")


def _own(tensor: Tensor) -> Tensor:
    found: Tensor = tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]
    return found.clone()
