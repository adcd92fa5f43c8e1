"""Open the series of a recipe, split it in time, and bring it to the mean and spread of its training part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ortho_cli.checkpoints.hub import fetch, parse_hub_id
from ortho_cli.errors import CheckpointError, RecipeError

from .series_files import read_csv, read_eeg
from .series_specs import SPECS, SeriesSpec

if TYPE_CHECKING:
    from ortho_cli.recipe.data import Series as SeriesConfig

__all__ = ["Part", "Series", "load_series", "part_ranges"]

Part = Literal["train", "val", "test"]
MONTHS = {"train": 12, "val": 4, "test": 4}  # of ETT
SHARES = (0.6, 0.2)


@dataclass(frozen=True)
class Series:
    """`values` (rows, channels) float32, standardised; `parts`: the rows of each part, first and one behind last."""

    columns: tuple[str, ...]
    values: Tensor
    parts: dict[Part, tuple[int, int]]
    mean: Tensor
    std: Tensor


def load_series(config: SeriesConfig) -> Series:
    """Open a recipe's series.

    Each channel has mean 0 and standard deviation 1 over the training part: what errors are told in, by custom of the
    field. A channel that stands still there is only shifted.

    Args:
        config: the recipe's `data` section; `batch` and `workers` are not used.

    Raises:
        RecipeError: it is not there (with how to get it), is malformed (with the line), or is too short.
    """
    spec = SPECS[config.name]
    names = config.columns
    table = read_eeg(names) if spec.name == "eeg" else read_csv(_file(config, spec), names)
    parts = part_ranges(len(table.values), spec, config.shares)
    start, stop = parts["train"]
    values = torch.from_numpy(table.values)
    mean, std = values[start:stop].mean(0), values[start:stop].std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    return Series(table.columns, ((values - mean) / std).float(), parts, mean, std)


def part_ranges(rows: int, spec: SeriesSpec, shares: tuple[float, float] | None = None) -> dict[Part, tuple[int, int]]:
    """Which rows train, validate and test: in this order of time, one part behind the other.

    Args:
        rows: of the series.
        spec: tells whether the field splits it by months.
        shares: of all rows to train and to validate; None: the field's split, or 0.6 and 0.2.

    Raises:
        RecipeError: fewer rows than the months have.

    >>> part_ranges(10, SPECS["series-csv"])
    {'train': (0, 6), 'val': (6, 8), 'test': (8, 10)}
    >>> part_ranges(17_420, SPECS["etth1"])
    {'train': (0, 8640), 'val': (8640, 11520), 'test': (11520, 14400)}
    """
    if spec.month is not None and shares is None:
        first = MONTHS["train"] * spec.month
        second = first + MONTHS["val"] * spec.month
        last = second + MONTHS["test"] * spec.month
        if rows < last:
            raise RecipeError(
                f"{spec.name}: {rows:,} rows, expected {last:,} or more", hint="for a part of it, give data.shares"
            )
    else:
        train, val = shares or SHARES
        first, second, last = round(train * rows), round((train + val) * rows), rows
    return {"train": (0, first), "val": (first, second), "test": (second, last)}


def _file(config: SeriesConfig, spec: SeriesSpec) -> Path:
    """The file that holds the series: the recipe's, in a folder also as `hf download` puts it there, or the hub's."""
    if config.path is not None:
        path = Path(config.path).expanduser()
        inside = [path / name for name in (spec.file, (spec.hub or "").rpartition(":")[2]) if name]
        found = next((each for each in (path, *inside) if each.is_file()), None)
        if found is None:
            raise _missing(
                spec, f"data.path: there is no file {str(inside[0] if path.is_dir() and inside else path)!r}"
            )
        return found
    text = config.source or spec.hub or ""
    hub = parse_hub_id(text)
    if hub is None or hub.file is None:
        raise RecipeError(f"data.source: expected ORG/NAME[@revision]:FILE, found {text!r}")
    try:
        return fetch(hub, repo_type="dataset")
    except CheckpointError as error:
        raise _missing(spec, f"data {spec.name}: {error.message}") from error


def _missing(spec: SeriesSpec, message: str) -> RecipeError:
    return RecipeError(message, hint="\n  ".join(["get it:", *spec.fetch, "and name it: data.path"]))
