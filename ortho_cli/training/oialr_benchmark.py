"""Time a training step of a vision transformer's blocks with frozen bases, beside the same blocks dense."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.methods.basis_layers import BasisLayer
from ortho_cli.methods.oialr_model import OIALR
from ortho_cli.methods.side_by_side import Timing, check_device, kept_bytes, shuffled_rounds, threads_of
from ortho_cli.models.vit import VisionTransformer

__all__ = ["DENSE", "OURS", "OIALRTiming", "measure_oialr"]

DENSE, OURS = "dense", "oialr"
HEAD_WIDTH = 64
LR = 1e-4


@dataclass
class OIALRTiming(Timing):
    """Seconds of every step; bytes of gradients and optimizer state together, and of what backward keeps.

    Attributes:
        ratio: median seconds over the dense step's.
        held_bytes: gradients and the optimizer's moments.
        activation_bytes: what forward keeps for backward, parameters excluded.
        trained: parameters that train.
    """

    dim: int = 0
    rank: int | None = None
    ratio: float = 1.0
    held_bytes: int = 0
    activation_bytes: int = 0
    trained: int = 0
    sizes: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return super().as_dict() | {
            "dim": self.dim, "rank": self.rank, "ratio": self.ratio, "held_bytes": self.held_bytes,
            "activation_bytes": self.activation_bytes, "trained": self.trained, **self.sizes,
        }  # fmt: skip


def measure_oialr(
    dims: Sequence[int] = (768,),
    *,
    rank_share: float = 0.15,
    depth: int = 2,
    tokens: int = 197,
    batch: int = 8,
    rounds: int = 10,
    threads: int | None = 2,
    device: str = "cpu",
) -> Iterator[OIALRTiming]:
    """Time forward, backward and an AdamW step of some blocks, dense and with cores of one rank, in shuffled rounds.

    Args:
        dims: widths, multiples of 64.
        rank_share: rank of every core over the width.
        depth: blocks.
        tokens: of a picture; ViT-B/16 has 197.
        batch: pictures.
        rounds: how often each form runs.
        threads: of the CPU; None: torch's choice.
        device: where to train.

    Yields:
        For each width the dense blocks, then those with frozen bases.

    Raises:
        UsageError: the device is not here.
    """
    check_device(device)
    with threads_of(threads):
        for dim in dims:
            yield from _measure(dim, round(rank_share * dim), depth, tokens, batch, rounds, device)


def _measure(dim: int, rank: int, depth: int, tokens: int, batch: int, rounds: int, device: str) -> list[OIALRTiming]:
    torch.manual_seed(0)
    vit = VisionTransformer(1, 1, 1, patch=1, depth=depth, heads=max(1, dim // HEAD_WIDTH), dim=dim)
    dense = nn.Sequential(*vit.blocks).to(device)
    stacks = {DENSE: dense, OURS: _at_rank(copy.deepcopy(dense), rank)}
    inputs = torch.randn(batch, tokens, dim, device=device)
    steps: dict[str, Callable[[], object]] = {}
    optimizers = {}
    for name, stack in stacks.items():
        optimizers[name] = torch.optim.AdamW([each for each in stack.parameters() if each.requires_grad], LR)
        steps[name] = _step(stack, optimizers[name], inputs)
        steps[name]()  # warm, and with moments
    timed = shuffled_rounds(steps, rounds, device)
    sizes = {"depth": depth, "tokens": tokens, "batch": batch}
    return [
        OIALRTiming(
            name, timed[name].seconds, dim, rank if name == OURS else None, timed[name].median / timed[DENSE].median,
            _held(optimizers[name]), kept_bytes(partial(_forward, stack, inputs), stack.parameters()),
            sum(each.numel() for each in stack.parameters() if each.requires_grad), sizes,
        )
        for name, stack in stacks.items()
    ]  # fmt: skip


def _at_rank(stack: nn.Module, rank: int) -> nn.Module:
    """The blocks with frozen bases, all cores of one rank."""
    for layer in OIALR(stack, when="step", delay=0, keep_last=False).converted.values():
        _truncate(layer, rank)
    return stack


def _truncate(layer: BasisLayer, rank: int) -> None:
    rank = min(rank, layer.rank)
    layer.set_parts(layer.U[:, :rank], layer.M.diagonal()[:rank], layer.VT[:rank])


def _step(stack: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(_forward(stack, inputs).square().mean())
        optimizer.step()

    return step


def _forward(stack: nn.Module, inputs: Tensor) -> Tensor:
    """Outputs for inputs as from the layers below, which want their gradient."""
    outputs: Tensor = stack(inputs.detach().requires_grad_())
    return outputs


def _held(optimizer: torch.optim.Optimizer) -> int:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*moments, *gradients])
