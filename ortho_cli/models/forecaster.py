"""A transformer that forecasts series, in the spirit of Autoformer: trend and season apart, each part forecast whole.

Its blocks are the vision transformer's, so that name patterns carry over; every layer with a weight matrix is Linear.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli.errors import RecipeError

from .vit import LAYER_NORM_EPS, WEIGHT_STD, Block

if TYPE_CHECKING:
    from ortho_cli.recipe.models import Forecaster as ForecasterConfig

__all__ = ["Forecaster", "build", "moving_average"]


def build(config: ForecasterConfig, input: int, horizon: int) -> nn.Module:
    """The forecaster of a recipe's `model` section.

    Raises:
        RecipeError: the patch does not divide the input.
    """
    if input % config.patch:
        raise RecipeError(
            f"model.patch {config.patch} does not divide the {input} steps of task.input",
            hint=f"take one of {', '.join(str(size) for size in range(1, input + 1) if input % size == 0)}",
        )
    return Forecaster(
        input,
        horizon,
        patch=config.patch,
        depth=config.depth,
        heads=config.heads,
        dim=config.dim,
        mlp_ratio=config.mlp_ratio,
        window=config.moving_average,
        dropout=config.dropout,
    )


class Forecaster(nn.Module):
    """Forecast each channel of a series from its own past; all channels share the weights.

    A window is taken relative to its mean and split into a trend, its moving average, and the season that is left. One
    Linear carries the trend on. The season is cut into patches; they and a placeholder for every patch to come pass
    through the blocks, and the head turns the placeholders into values.

    Args:
        input: steps seen, a multiple of `patch`.
        horizon: steps forecast.
        patch: steps in a token.
        depth: number of blocks.
        heads: attention heads of a block; divides `dim`.
        dim: width of a token.
        mlp_ratio: width of a block's hidden layer over `dim`.
        window: steps over which the trend is the mean.
        dropout: share of the activations dropped behind the Linear layers of a block, while training.

    Shapes: `(B, input, channels)` to `(B, horizon, channels)`; any number of channels.

    References: Wu et al. 2021, arXiv:2106.13008 (decomposition, the future as placeholders); Nie et al. 2022,
    arXiv:2211.14730 (patches, channels apart).

    >>> model = Forecaster(96, 192, patch=8, depth=2, heads=8, dim=512)
    >>> model(torch.zeros(3, 96, 7)).shape
    torch.Size([3, 192, 7])
    """

    def __init__(
        self,
        input: int,
        horizon: int,
        *,
        patch: int,
        depth: int,
        heads: int,
        dim: int,
        mlp_ratio: float = 4.0,
        window: int = 25,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if input % patch or dim % heads:
            raise ValueError(f"patch {patch} must divide {input}, and heads {heads} must divide {dim}")
        self.patch, self.horizon, self.window = patch, horizon, window
        seen, coming = input // patch, -(-horizon // patch)
        self.trend = nn.Linear(input, horizon)
        self.patch_embed = nn.Linear(patch, dim)
        self.future = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, seen + coming, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, round(dim * mlp_ratio), True, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.head = nn.Linear(dim, patch)
        for name, parameter in self.named_parameters():
            if name in ("pos_embed", "future") or parameter.ndim == 2:
                nn.init.trunc_normal_(parameter, std=WEIGHT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, series: Tensor) -> Tensor:
        """Forecast the `horizon` steps behind a window."""
        level = series.mean(1, keepdim=True)
        rows = (series - level).transpose(1, 2)
        trend = moving_average(rows, self.window)
        season = (rows - trend).reshape(-1, rows.shape[-1] // self.patch, self.patch)
        tokens = self.patch_embed(season)
        coming = self.pos_embed.shape[1] - tokens.shape[1]
        tokens = torch.cat([tokens, self.future.expand(len(tokens), coming, -1)], dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        values = self.head(self.norm(tokens[:, -coming:])).flatten(1)[:, : self.horizon]
        forecast: Tensor = self.trend(trend) + values.reshape(*trend.shape[:2], -1)
        return forecast.transpose(1, 2) + level


def moving_average(series: Tensor, window: int) -> Tensor:
    """The mean over `window` steps around each step; beyond the ends the end values stand.

    Args:
        series: `(B, C, steps)`.
        window: steps; of an even number one more lies behind than before.

    >>> moving_average(torch.tensor([[[0.0, 3.0, 6.0, 0.0]]]), 3).tolist()
    [[[1.0, 3.0, 3.0, 2.0]]]
    """
    padded = F.pad(series, ((window - 1) // 2, window // 2), mode="replicate")
    return F.avg_pool1d(padded, window, stride=1)
