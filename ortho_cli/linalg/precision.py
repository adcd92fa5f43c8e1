"""Which precision the mathematics runs in, and which tensors it takes.

Reflections lose orthogonality at 1e-1 in bfloat16, so half types are raised to float32 once, at the door; small
triangular or block problems are solved in float64 and rounded at the end. Anything that is not a plain float
(integers, fp8: values that need a scale we would have to guess) is refused.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError

__all__ = ["adapter_tensor", "adapter_tensors", "at_least_float32", "require_working_dtype"]

WORKING = (torch.float32, torch.float64)
RAISED = (torch.float16, torch.bfloat16)


def at_least_float32(tensor: Tensor, what: str = "tensor") -> Tensor:
    """Raise half types to float32; float32 and float64 pass through unchanged, without a copy.

    Raises:
        TargetError: `tensor` is no plain float.

    >>> at_least_float32(torch.ones(2, dtype=torch.bfloat16)).dtype, at_least_float32(torch.ones(2).double()).dtype
    (torch.float32, torch.float64)
    """
    if tensor.dtype in WORKING:
        return tensor
    if tensor.dtype in RAISED:
        return tensor.to(torch.float32)
    raise TargetError(
        f"{what} holds {str(tensor.dtype).removeprefix('torch.')} values, expected a float type",
        hint="dequantise it first: float16, bfloat16, float32 and float64 are understood",
    )


def adapter_tensor(tensor: Tensor, what: str) -> Tensor:
    """Take one tensor of an adapter: at least float32, every value finite.

    Args:
        tensor: any shape, any plain float type.
        what: its name, for the error.

    Returns:
        The same values in float32 or float64.

    Raises:
        TargetError: not a plain float.
        NumericsError: a value is NaN or infinite.

    >>> adapter_tensor(torch.tensor([1.0, float("nan")]), "lora_up")
    Traceback (most recent call last):
    ortho_cli.errors.NumericsError: lora_up has 1 non-finite value of 2
    """
    tensor = at_least_float32(tensor, what)
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        bad = finite.numel() - int(finite.sum())
        raise NumericsError(
            f"{what} has {bad} non-finite value{'s' * (bad != 1)} of {finite.numel()}",
            hint="the training that wrote it diverged: take an earlier save",
        )
    return tensor


def adapter_tensors(what: str, *tensors: Tensor) -> list[Tensor]:
    """Take tensors that are multiplied with each other: each as :func:`adapter_tensor`, all in the widest dtype.

    >>> [t.dtype for t in adapter_tensors("LoRA factors", torch.ones(1).half(), torch.ones(1).double())]
    [torch.float64, torch.float64]
    """
    taken = [adapter_tensor(tensor, what) for tensor in tensors]
    widest = reduce(torch.promote_types, [tensor.dtype for tensor in taken])
    return [tensor.to(widest) for tensor in taken]


def require_working_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype to compute in that is not float32 or float64 (a caller's mistake: casts are explicit).

    >>> require_working_dtype(torch.float16)
    Traceback (most recent call last):
    ValueError: computed in float32 or float64, found float16: cast the weight first, round the result once
    """
    if dtype not in WORKING:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"computed in float32 or float64, found {name}: cast the weight first, round the result once")
