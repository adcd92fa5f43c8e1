"""The next values of series from the last ones: mean squared error over windows of a standardised series."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ortho_cli import registry
from ortho_cli.errors import RecipeError

from .image_specs import Split
from .series_data import Part, Series, load_series
from .series_specs import SPECS
from .task import Batch, Losses, Reduce, Task

if TYPE_CHECKING:
    from ortho_cli.recipe.data import Series as SeriesConfig
    from ortho_cli.recipe.tasks import Forecast

__all__ = ["ForecastTask", "Windows"]


class Windows(Dataset[dict[str, Tensor]]):
    """Every window of a part of a series, one a row.

    What is forecast lies in the part; what is seen may reach back into the part before it, as it may in use.

    Args:
        series: standardised.
        part: the rows to forecast.
        input: rows seen.
        horizon: rows forecast behind them.

    Raises:
        RecipeError: the part is shorter than one window.
    """

    def __init__(self, series: Series, part: Part, input: int, horizon: int) -> None:
        first, last = series.parts[part]
        self.first = max(first - input, 0)
        self.count = last - self.first - input - horizon + 1
        if self.count < 1:
            raise RecipeError(
                f"the part {part} has {last - first} rows, which hold no window of {input} seen and {horizon} forecast",
                hint="shorten task.input or task.horizon, or change data.shares",
            )
        self.values = series.values
        self.input = input
        self.offsets = torch.arange(input + horizon)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """One window, without the batch dimension."""
        return {name: value[0] for name, value in self.fetch(key[0], torch.tensor([key[1]])).items()}

    def fetch(self, epoch: int, index: Tensor) -> dict[str, Tensor]:
        """A batch: `input` (B, input, C) and `target` (B, horizon, C) float32, `index` (B,) as given.

        Args:
            epoch: changes nothing; windows are not augmented.
            index: `(B,)` int64, places in the part.
        """
        rows = self.values[self.first + index[:, None] + self.offsets]
        return {"input": rows[:, : self.input], "target": rows[:, self.input :], "index": index}


class ForecastTask(Task):
    """Train and judge a forecaster of series.

    Errors are of standardised values, which is what the field reports: 1 is what forecasting the training part's mean
    would give there.

    Args:
        task: the window's two lengths.
        data: the series, and which part evaluation is on.
        seed: of the run.
    """

    metrics = ("mse", "mae")

    def __init__(self, task: Forecast, data: SeriesConfig, *, seed: int) -> None:
        super().__init__(task, data, seed=seed)
        self.config: Forecast = task
        self.data: SeriesConfig = data
        self._series: Series | None = None
        self._splits: dict[Split, Windows] = {}

    @property
    def series(self) -> Series:
        """The whole series, opened when it is first asked for.

        Raises:
            RecipeError: it is not there, or malformed.
        """
        if self._series is None:
            self._series = load_series(self.data)
        return self._series

    def dataset(self, split: Split) -> Windows:
        """The windows of the training part, or of the part that the recipe judges by."""
        if split not in self._splits:
            part: Part = "train" if split == "train" else self.data.judge
            self._splits[split] = Windows(self.series, part, self.config.input, self.config.horizon)
        return self._splits[split]

    def build_model(self, config: Any) -> nn.Module:
        """The model of a recipe's `model` section, for these windows."""
        model: nn.Module = registry.resolve("models", config.name)(config, self.config.input, self.config.horizon)
        return model

    def example(self, batch: int) -> Batch | None:
        """Windows of zeros; None for a series of unknown channels."""
        channels = len(self.data.columns) if self.data.columns is not None else SPECS[self.data.name].channels
        if channels is None:
            return None
        shapes = {"input": self.config.input, "target": self.config.horizon}
        return {name: torch.zeros(batch, steps, channels) for name, steps in shapes.items()}

    def loss(self, model: nn.Module, batch: Batch, phase: str) -> Losses:
        """The mean squared error; beside it the mean absolute one."""
        forecast = model(batch["input"])
        wrong = forecast.float() - batch["target"]
        return wrong.square().mean(), forecast, {"mae": wrong.detach().abs().mean()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], reduce: Reduce | None = None) -> dict[str, float]:
        """Mean squared and mean absolute error over windows, steps and channels.

        Sums are added up over processes and divided once, so the result does not depend on how the part was shared out.
        """
        was_training = model.training
        model.eval()
        sums: Tensor | None = None
        for batch in batches:
            forecast, target = model(batch["input"]).float(), batch["target"]
            errors = [
                F.mse_loss(forecast, target, reduction="none"), F.l1_loss(forecast, target, reduction="none"),
                torch.ones_like(target),
            ]  # fmt: skip
            found = torch.stack([each.double().sum() for each in errors])
            sums = found if sums is None else sums + found
        model.train(was_training)
        if sums is None:
            raise ValueError("no batches to evaluate on")
        squares, absolutes, count = (sums if reduce is None else reduce(sums)).tolist()
        return {"mse": squares / count, "mae": absolutes / count}
