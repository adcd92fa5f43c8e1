"""The table of a matrix: a line for each finished cell, and means over seeds; made anew from the cells' own folders."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ortho_cli.checkpoints.output import atomic
from ortho_cli.recipe.matrix import Cell, short_keys

from .run_folder import OUTCOME

__all__ = ["write_table"]

SEED = "train.seed"


def write_table(folder: Path, cells: Sequence[Cell]) -> None:
    """Write `table.csv` with a line for each finished cell, and `table.md` with means and deviations over seeds.

    What is finished is read from the cells' folders, so that cells may be run one by one, in any order, at once.
    """
    done = [(cell, metrics) for cell in cells if (metrics := _metrics(folder / cell.name)) is not None]
    names = sorted({name for _, metrics in done for name in metrics if name.startswith("eval/")})
    keys = list(cells[0].overrides)
    with atomic(folder / "table.csv") as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", *keys, *names])
        for cell, metrics in done:
            row = [_text(cell.overrides[key]) for key in keys]
            writer.writerow([cell.index, *row, *(metrics.get(name, "") for name in names)])
    with atomic(folder / "table.md") as partial:
        partial.write_text(_markdown(cells, done, names), "utf-8")


def _metrics(folder: Path) -> dict[str, float] | None:
    path = folder / OUTCOME
    if not path.is_file():
        return None
    outcome: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return {name: value for name, value in outcome["metrics"].items() if value is not None}


def _markdown(cells: Sequence[Cell], done: Sequence[tuple[Cell, dict[str, float]]], names: Sequence[str]) -> str:
    short = short_keys(list(cells[0].overrides))
    keys = [key for key in cells[0].overrides if key != SEED]
    groups: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for cell, metrics in done:
        groups.setdefault(tuple(_text(cell.overrides[key]) for key in keys), []).append(metrics)
    rows = [[*(short[key] for key in keys), "runs", *names], ["---"] * (len(keys) + 1) + ["---:"] * len(names)]
    for chosen, group in groups.items():
        values = ([metrics[name] for metrics in group if name in metrics] for name in names)
        rows.append([*chosen, str(len(group)), *map(_mean, values)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", f"{len(done)} of {len(cells)} cells are finished; ± is the deviation over runs.", ""])


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
