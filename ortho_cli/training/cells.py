"""One run or a matrix of runs: every cell in its own folder, finished ones skipped, a table of all that are done."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ortho_cli.errors import NumericsError, UsageError, check_choice
from ortho_cli.recipe.train import MAY_GROW, TrainRecipe, cell_recipes, load_train

from .debug_run import KINDS, debug_recipe
from .processes import leave
from .run import Interrupted, Outcome, train
from .run_folder import OUTCOME, RECIPE, check_same_recipe
from .table import write_table

__all__ = ["Observe", "one_cell", "run_recipe"]

Observe = Callable[[str], AbstractContextManager[Any]]
"""Makes what looks on a run, from its title."""


def run_recipe(
    source: str,
    sets: Sequence[str] = (),
    *,
    resume: bool = False,
    force: bool = False,
    cell: int | None = None,
    debug_run: str | None = None,
    observe: Observe = lambda title: nullcontext(),
) -> list[Outcome]:
    """Train a recipe, or every cell of its matrix.

    Args:
        source: a file, or a shipped recipe's name.
        sets: changes, `KEY=VALUE` each.
        resume: go on from the last checkpoint; cells of a matrix always do.
        force: begin anew where something is already.
        cell: only this one of the matrix.
        debug_run: one of `debug_run.KINDS`, of the recipe or of the cell (without `cell` the first).
        observe: e.g. the live view.

    Raises:
        UsageError: a cell that does not exist, or a cell without a matrix.
        NumericsError: cells diverged; the others were carried out.
        OrthoError: as `run.train`.
    """
    recipe = load_train(source, sets)
    check_choice("--debug-run", debug_run, KINDS)
    found, chosen = cell_recipes(recipe), one_cell(recipe, cell)[1]
    try:
        if debug_run is not None:
            with observe(debug_run) as view:
                return [train(debug_recipe(chosen, debug_run), force=True, observer=view, debug=debug_run)]
        if recipe.matrix is None:
            with observe("train") as view:
                return [train(recipe, resume=resume, force=force, observer=view)]
        outcomes: list[Outcome] = []
        failed: list[str] = []
        for one, own in found if cell is None else [found[cell]]:
            outcome = None if force else _finished(Path(own.run.dir), own)
            if outcome is None:
                started = (Path(own.run.dir) / RECIPE).is_file() and not force
                try:
                    with observe(one.name) as view:
                        outcome = train(own, resume=started, force=force, observer=view, name=one.name)
                except Interrupted as stop:
                    left = len(found) - len(outcomes) - len(failed) if cell is None else 1
                    raise Interrupted(
                        f"{one.name}: {stop.message}",
                        hint=f"the same command goes on, with this cell first; {left} of {len(found)} are to be done",
                    ) from stop
                except NumericsError as error:
                    failed.append(f"{one.name}: {error.message}")  # the others of a matrix do not depend on it
                    continue
            outcomes.append(outcome)
            write_table(Path(recipe.run.dir), [other for other, _ in found])
        if failed:
            raise NumericsError(
                f"{len(failed)} of {len(outcomes) + len(failed)} cells diverged: {'; '.join(failed)}",
                hint=f"the others are done, see {recipe.run.dir}; change these values in the matrix",
            )
        return outcomes
    finally:
        leave()


def one_cell(recipe: TrainRecipe, cell: int | None) -> tuple[int, TrainRecipe]:
    """How many cells a recipe has, and the recipe of one of them; without a number the first.

    Raises:
        UsageError: there is no such cell.
    """
    found = cell_recipes(recipe)
    if cell is not None and recipe.matrix is None:
        raise UsageError("--cell is for recipes with a matrix")
    if cell is not None and not 0 <= cell < len(found):
        raise UsageError(f"--cell {cell}: the matrix has cells 0 to {len(found) - 1}")
    return len(found), found[cell or 0][1]


def _finished(folder: Path, recipe: Any) -> Outcome | None:
    """What a cell ended with, if it did and is not to go on.

    Raises:
        OutputError: the folder holds a run of another recipe.
    """
    if not (folder / OUTCOME).is_file() or MAY_GROW & set(check_same_recipe(folder, recipe)):
        return None
    return Outcome(**json.loads((folder / OUTCOME).read_text("utf-8")))
