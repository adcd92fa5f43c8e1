"""One run or a matrix of runs: every cell in its own folder, finished ones skipped, a table at the end."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ortho_cli.errors import UsageError
from ortho_cli.recipe.matrix import Cell
from ortho_cli.recipe.train import cell_recipes, load_train

from .run import Outcome, train
from .state import last_checkpoint

__all__ = ["CellOutcome", "run_recipe"]

DONE = "outcome.json"  # written last: a cell that has it is finished


@dataclass
class CellOutcome:
    """What one run ended with, as `--json` prints it."""

    name: str
    folder: str
    step: int
    metrics: dict[str, float]
    parameters: int
    trainable: int
    seconds: float
    best: float | None = None
    exports: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The outcome as JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """The outcome as lines of a table."""
        shown = {key: value for key, value in self.metrics.items() if key.startswith("eval/") or key == "train/loss"}
        return [
            (self.name or "run", self.folder),
            ("steps", f"{self.step:,}"),
            ("parameters", f"{self.trainable:,} of {self.parameters:,} train"),
            *((key, f"{value:.4f}") for key, value in shown.items()),
            *(("export", path) for path in self.exports),
            ("seconds", f"{self.seconds:.1f}"),
        ]


def run_recipe(
    source: str,
    sets: Sequence[str],
    *,
    resume: bool = False,
    force: bool = False,
    cell: int | None = None,
    debug_run: str | None = None,
    quiet: bool = False,
) -> list[CellOutcome]:
    """Train a recipe, or every cell of its matrix.

    Raises:
        UsageError: a cell that does not exist, or `--cell` without a matrix.
        OrthoError: as `run.train`.
    """
    from .live import observer

    recipe = load_train(source, sets)
    if recipe.matrix is None:
        if cell is not None:
            raise UsageError("--cell is for recipes with a matrix")
        with observer(recipe, quiet=quiet) as view:
            return [_finish("", train(recipe, resume=resume, force=force, observer=view))]
    found = cell_recipes(recipe)
    if cell is not None and not 0 <= cell < len(found):
        raise UsageError(f"--cell {cell}: the matrix has cells 0 to {len(found) - 1}")
    outcomes = []
    for one, own in found if cell is None else [found[cell]]:
        folder = Path(own.run.dir)
        if (folder / DONE).is_file() and not force:
            outcomes.append(CellOutcome(**json.loads((folder / DONE).read_text("utf-8"))))
            continue
        started = last_checkpoint(folder) is not None
        with observer(own, quiet=quiet, title=one.name) as view:
            outcome = train(own, resume=started and not force, force=force or folder.exists(), observer=view)
        outcomes.append(_finish(one.name, outcome))
    write_table(Path(recipe.run.dir), [one for one, _ in found], outcomes)
    return outcomes


def _finish(name: str, outcome: Outcome) -> CellOutcome:
    cell = CellOutcome(
        name, str(outcome.folder), outcome.step, outcome.metrics, outcome.parameters, outcome.trainable,
        outcome.seconds, outcome.best, outcome.exports, outcome.notes,
    )  # fmt: skip
    (outcome.folder / DONE).write_text(json.dumps(cell.as_dict(), indent=2) + "\n", "utf-8")
    return cell


def write_table(folder: Path, found: Sequence[Cell], outcomes: Sequence[CellOutcome]) -> None:
    """`table.csv` with a line a cell, `table.md` with mean and standard deviation over seeds."""
    metrics = sorted({key for outcome in outcomes for key in outcome.metrics if key.startswith("eval/")})
    keys = list(found[0].overrides)
    folder.mkdir(parents=True, exist_ok=True)
    by_name = {cell.name: cell for cell in found}
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, *metrics])
        for outcome in outcomes:
            values = [by_name[outcome.name].overrides[key] for key in keys]
            writer.writerow([*values, *(outcome.metrics.get(metric, "") for metric in metrics)])
    groups: dict[tuple[Any, ...], list[CellOutcome]] = {}
    others = [key for key in keys if key != "train.seed"]
    for outcome in outcomes:
        groups.setdefault(tuple(by_name[outcome.name].overrides[key] for key in others), []).append(outcome)
    lines = [f"| {' | '.join([*others, 'runs', *metrics])} |", "|" + "---|" * (len(others) + 1 + len(metrics))]
    for chosen, group in groups.items():
        row = [*map(str, chosen), str(len(group))]
        for metric in metrics:
            numbers = [outcome.metrics[metric] for outcome in group if metric in outcome.metrics]
            spread = f" ± {statistics.stdev(numbers):.4f}" if len(numbers) > 1 else ""
            row.append(f"{statistics.mean(numbers):.4f}{spread}" if numbers else "-")
        lines.append(f"| {' | '.join(row)} |")
    (folder / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
