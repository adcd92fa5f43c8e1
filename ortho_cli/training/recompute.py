"""Gradient checkpointing: the blocks of a model keep their inputs only, and compute the rest anew in backward."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ortho_cli.errors import UsageError

__all__ = ["recompute_activations"]

COUNTS_BATCHES = nn.modules.batchnorm._BatchNorm  # a second forward would count every batch twice


def recompute_activations(model: nn.Module) -> None:
    """Trade a second forward for the memory of activations, block by block, in place.

    A model that knows how (transformers, diffusers) does it itself. Of others, the entries of each list of modules of
    one class are blocks: the stages of a residual network, the layers of a transformer. Numbers do not change.

    Raises:
        UsageError: there are no blocks, or they hold batch norms.

    >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3)))
    >>> recompute_activations(nn.Sequential(model))
    """
    own = getattr(model, "gradient_checkpointing_enable", None) or getattr(model, "enable_gradient_checkpointing", None)
    if own is not None:
        own()
        return
    blocks = _blocks(model)
    if not blocks:
        raise UsageError(
            f"{type(model).__name__} has no repeated blocks, which gradient checkpointing could recompute",
            hint="leave train.checkpoint_gradients out",
        )
    if any(isinstance(inner, COUNTS_BATCHES) for block in blocks for inner in block.modules()):
        raise UsageError(
            "gradient checkpointing would show every batch to batch norm twice",
            hint="--set model.norm=group, or leave train.checkpoint_gradients out",
        )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The outermost modules that stand in a list with others of their class, and have children."""
    children = list(module.children())
    kinds = {type(child) for child in children}
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) > 1 and len(kinds) == 1:
        return [child for child in children if next(child.children(), None) is not None]
    return [block for child in children for block in _blocks(child)]
