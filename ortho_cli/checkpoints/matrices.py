"""The weight of a stored layer as a matrix: which view its name, shape and configuration call for, and its values.

A header says neither groups nor whether a convolution is transposed: the tensor as it is stored decides, `(out,
in/groups, kh, kw)` being one matrix `(out kh, in/groups kw)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .checkpoint import Checkpoint
from .reading import TensorReader
from .tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from ortho_cli.linalg.matricize import Matricization

__all__ = ["CONV1D_NAMES", "LOOKUPS", "has_conv1d", "layer_view", "read_matrix"]

# Layers that transformers may keep as Conv1D, weight (in, out): GPT-2 and its relatives.
CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
# Matrices that are looked up, never multiplied.
LOOKUPS = (
    "word_embeddings", "position_embeddings", "token_type_embeddings", "embed_tokens", "embed_positions",
    "token_embedding", "position_embedding", "wte", "wpe",
)  # fmt: skip


def has_conv1d(checkpoint: Checkpoint) -> bool:
    """Whether the blocks of a GPT-2 are Conv1D: its configuration says so, or a bias as long as its weight is wide."""
    if checkpoint.config.get("model_type") in CONV1D_MODELS:
        return True
    for name, shape in checkpoint.layers().items():
        bias = checkpoint.tensors.get(f"{name}.bias")
        if name.endswith(CONV1D_NAMES) and bias is not None and bias.shape == shape[1:] != shape[:1]:
            return True
    return False


def layer_view(name: str, shape: tuple[int, ...], *, conv1d: bool = False) -> Matricization:
    """See a stored weight as a matrix.

    Args:
        name: of the layer.
        shape: of its weight.
        conv1d: what `has_conv1d` says of the checkpoint.

    Raises:
        TargetError: more than five dimensions.

    >>> layer_view("block.conv", (8, 4, 3, 3)).matrix_shape
    (24, 12)
    """
    from ortho_cli.linalg.matricize import Matricization

    last = name.rpartition(".")[2]
    if len(shape) > 2:
        kind = "conv"
    elif conv1d and last in CONV1D_NAMES:
        kind = "conv1d"
    else:
        kind = "embedding" if last in LOOKUPS else "linear"
    return Matricization(kind, shape)


def read_matrix(info: TensorInfo, view: Matricization) -> Tensor:
    """Read a weight as its matrix, in float32 (float64 where it is stored so), in memory of its own."""
    import torch

    with TensorReader() as reader:
        stored = reader.read(info)
        return (
            view.to_matrix(stored.reshape(view.shape)).to(torch.promote_types(stored.dtype, torch.float32)).contiguous()
        )
