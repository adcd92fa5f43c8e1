"""The vision transformer, with timm's parameter names: its checkpoints load, and name patterns carry over.

Query, key and value are one Linear (`blocks.N.attn.qkv`), a plain layer that every method can work on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ortho_cli.errors import RecipeError

if TYPE_CHECKING:
    from ortho_cli.recipe.models import VitB16, VitMini

__all__ = ["Block", "VisionTransformer", "build"]

LAYER_NORM_EPS = 1e-6  # timm's and the original's; torch's default is 1e-5
WEIGHT_STD = 0.02


def build(config: VitMini | VitB16, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The transformer of a recipe's `model` section.

    Raises:
        RecipeError: the patch does not divide the picture.
    """
    if image_size % config.patch:
        raise RecipeError(
            f"model.patch {config.patch} does not divide the picture's {image_size} pixels",
            hint=f"take one of {', '.join(str(side) for side in range(1, image_size + 1) if image_size % side == 0)}",
        )
    return VisionTransformer(
        num_classes,
        in_channels,
        image_size,
        patch=config.patch,
        depth=config.depth,
        heads=config.heads,
        dim=config.dim,
        mlp_ratio=config.mlp_ratio,
        qkv_bias=config.qkv_bias,
        dropout=config.dropout,
    )


class VisionTransformer(nn.Module):
    """Classify pictures by attention over their patches; the class token's last state feeds the head.

    Args:
        num_classes: outputs.
        in_channels: of the pictures.
        image_size: side of the square pictures, a multiple of `patch`.
        patch: side of a patch.
        depth: number of blocks.
        heads: attention heads of a block; divides `dim`.
        dim: width of the residual stream.
        mlp_ratio: width of a block's hidden layer over `dim`.
        qkv_bias: whether query, key and value have biases (B/16 does, the mini-ViT of OIALR does not).
        dropout: share of the activations dropped behind the Linear layers of a block, while training.

    Shapes: `(B, in_channels, image_size, image_size)` to `(B, num_classes)`.
    Reference: Dosovitskiy et al. 2020, arXiv:2010.11929; the mini form is OIALR's, arXiv:2401.08505.

    >>> with torch.device("meta"):
    ...     model = VisionTransformer(10, 3, 32, patch=8, depth=6, heads=6, dim=768, qkv_bias=False)
    >>> sum(p.numel() for p in model.parameters())
    42684682
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        patch: int,
        depth: int,
        heads: int,
        dim: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if image_size % patch or dim % heads:
            raise ValueError(f"patch {patch} must divide {image_size}, and heads {heads} must divide {dim}")
        self.patch_embed = _PatchEmbed(in_channels, dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch) ** 2 + 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, round(dim * mlp_ratio), qkv_bias, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.head = nn.Linear(dim, num_classes)
        self.checkpointing = False
        nn.init.trunc_normal_(self.pos_embed, std=WEIGHT_STD)
        nn.init.normal_(self.cls_token, std=LAYER_NORM_EPS)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=WEIGHT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def gradient_checkpointing_enable(self) -> None:
        """Keep only the inputs of the blocks in the forward pass and compute the rest again in the backward."""
        self.checkpointing = True

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            if self.checkpointing and self.training:
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits


class _PatchEmbed(nn.Module):
    def __init__(self, in_channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.proj(images)
        return patches.flatten(2).transpose(1, 2)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, qkv_bias: bool, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, dim = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.drop(self.proj(mixed.transpose(1, 2).reshape(batch, length, dim)))
        return projected


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        narrowed: Tensor = self.drop(self.fc2(self.drop(F.gelu(self.fc1(tokens)))))
        return narrowed


class Block(nn.Module):
    """Attention, then a two-layer network, each on the normalised stream and added to it.

    Args:
        dim: width of the stream.
        heads: of the attention; divides `dim`.
        hidden: width of the two-layer network's hidden layer.
        qkv_bias: whether query, key and value have biases.
        dropout: share of the activations dropped behind the Linear layers, while training.

    Shapes: `(B, tokens, dim)` to the same.
    """

    def __init__(self, dim: int, heads: int, hidden: int, qkv_bias: bool, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.attn = _Attention(dim, heads, qkv_bias, dropout)
        self.norm2 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.mlp = _Mlp(dim, hidden, dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        stream: Tensor = tokens + self.mlp(self.norm2(tokens))
        return stream
