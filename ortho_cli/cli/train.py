"""`ortho train`: carry out a training recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ortho_cli.cli.completion import recipes
from ortho_cli.cli.options import (
    OUTPUT,
    DebugOption,
    DryRunOption,
    JsonOption,
    PrivateOption,
    PushOption,
    QuietOption,
)
from ortho_cli.cli.publish import check_upload, publish
from ortho_cli.errors import UsageError

if TYPE_CHECKING:
    from ortho_cli.training.run import Outcome

__all__ = ["train"]


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe file, or a shipped recipe's name.", autocompletion=recipes)
    ],
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. methods.hra.rank=16; repeatable."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out samples that are missing or broken (data.skip_bad).")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
    force: Annotated[
        bool, typer.Option("-f", "--force", help="Begin anew in a run folder that exists.", rich_help_panel=OUTPUT)
    ] = False,
    cell: Annotated[
        int | None, typer.Option("--cell", metavar="N", help="Only cell N of a matrix recipe, counted from 0.")
    ] = None,
    debug_run: Annotated[
        str | None,
        typer.Option("--debug-run", metavar="step|overfit|profile", help="One step, three batches, or a profile."),
    ] = None,
    dry_run: DryRunOption = False,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train with a recipe; a killed run goes on with --resume, bit for bit.

    Example: ortho train quickstart

    Many GPUs: accelerate launch -m ortho_cli train RECIPE
    """
    if resume and force:
        raise UsageError("--resume goes on and --force begins anew", hint="leave one of them out")
    if private and not push_to_hub:
        raise UsageError("--private is about --push-to-hub, which was not given")
    if dry_run and push_to_hub:
        raise UsageError("--dry-run writes nothing that --push-to-hub could upload", hint="leave one of them out")
    if push_to_hub:
        check_upload(push_to_hub)
    sets = [*(sets or []), *(["data.skip_bad=true"] if skip_bad else [])]
    if dry_run:
        _plan(recipe, sets, cell, resume=resume, force=force, as_json=as_json)
        return
    from ortho_cli.training.cells import run_recipe
    from ortho_cli.training.live import live_view
    from ortho_cli.training.processes import is_first

    outcomes = run_recipe(
        recipe, sets, resume=resume, force=force, cell=cell, debug_run=debug_run,
        observe=lambda title: live_view(title, hidden=quiet or as_json or not is_first()),
    )  # fmt: skip
    if not is_first():
        return
    if push_to_hub:
        _publish(outcomes, push_to_hub, private)
    _report(recipe, outcomes, as_json=as_json, quiet=quiet)


def _plan(recipe: str, sets: list[str], cell: int | None, *, resume: bool, force: bool, as_json: bool) -> None:
    """Say what would be trained."""
    from ortho_cli.cli.show import console_out, human_bytes, print_json, show_notes, table
    from ortho_cli.recipe.train import load_train
    from ortho_cli.training.cells import one_cell
    from ortho_cli.training.dry_run import describe
    from ortho_cli.training.run_folder import check_folder

    found, own = one_cell(load_train(recipe, sets), cell)
    if found == 1:  # cells of a matrix go on or are skipped
        check_folder(Path(own.run.dir), own, resume=resume, force=force)
    plan = describe(own)
    if found > 1:
        plan["notes"].append(f"this is cell {cell or 0} of {found}; another: --cell N")
    totals = {"task": own.task.name, "model": own.model.name, "cells": found, **plan["totals"]}
    if as_json:
        print_json({
            "command": "train", "dry_run": True, "inputs": [recipe], "outputs": [],
            "layers": sum(line["layers"] or 0 for line in plan["details"]), "parameters": totals["trainable"],
            "details": plan["details"], "totals": totals, "notes": plan["notes"], "seconds": 0.0,
        })  # fmt: skip
        return
    console = console_out()
    if plan["details"]:
        rows = [[line["method"], line["pattern"], line["layers"], line["added"]] for line in plan["details"]]
        table(console, ["method", "pattern", "layers", "parameters added"], rows)
    shown = {name: human_bytes(value) if name.startswith("memory") else value for name, value in totals.items()}
    rows = [
        [name.replace("_", " "), f"{value:,}" if isinstance(value, int) else value] for name, value in shown.items()
    ]
    table(console, None, [*rows, ["would write", own.run.dir]])
    show_notes(console, plan["notes"])


def _number(value: object) -> object:
    return f"{value:,}" if isinstance(value, int) else "unknown" if value is None else value


def _publish(outcomes: list[Outcome], repo: str, private: bool) -> None:
    """Upload the run's folder, or the folder of all cells: of the checkpoints the best or else the last, to be used."""
    from ortho_cli.training.run_folder import best_or_last

    folders = [Path(outcome.folder) for outcome in outcomes]
    root = folders[0].parent if len(folders) > 1 else folders[0]
    unused = [
        f"{checkpoint.relative_to(root).as_posix()}/*"
        for folder in folders
        for checkpoint in sorted((folder / "checkpoints").iterdir())
        if checkpoint != best_or_last(folder)
    ]
    only_to_resume = ["*optimizer.safetensors", "*trackers/*", "*timing.jsonl"]
    publish(root, repo, private=private, command="ortho train", ignore=[*only_to_resume, *unused])


def _report(recipe: str, outcomes: list[Outcome], *, as_json: bool, quiet: bool) -> None:
    from ortho_cli.cli.show import console_out, print_json, show_notes, table

    if as_json:
        print_json({
            "command": "train", "inputs": [recipe],
            "outputs": [output for outcome in outcomes for output in _outputs(outcome)],
            "layers": 0, "parameters": sum(outcome.trainable for outcome in outcomes),
            "details": [vars(outcome) for outcome in outcomes],
            "totals": {"runs": len(outcomes), "steps": sum(outcome.step for outcome in outcomes)},
            "notes": list(dict.fromkeys(note for outcome in outcomes for note in outcome.notes)),
            "seconds": sum(outcome.seconds for outcome in outcomes),
        })  # fmt: skip
    elif not quiet:
        console = console_out()
        if len(outcomes) > 1:
            _matrix(console, outcomes)
            return
        for outcome in outcomes:
            table(console, None, _rows(outcome))
            show_notes(console, outcome.notes)


def _matrix(console: Any, outcomes: list[Outcome]) -> None:
    """A line for each cell, finished now or before, and where their table is."""
    from ortho_cli.cli.show import show_notes, table

    names = list(dict.fromkeys(name for each in outcomes for name in each.metrics if name.startswith("eval/")))
    rows = [
        [each.name, *(_shown(each.metrics.get(name)) for name in names), f"{each.step:,}", f"{each.trainable:,}"]
        for each in outcomes
    ]
    table(console, ["cell", *names, "steps", "trained parameters"], rows)
    show_notes(console, (note for each in outcomes for note in each.notes))
    folder = Path(outcomes[0].folder).parent
    console.print(f"wrote {folder / 'table.md'} and table.csv: means over seeds", markup=False, soft_wrap=True)
    console.print(f"with pictures: ortho analyze runs {folder} -o comparison", markup=False, soft_wrap=True)


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _rows(outcome: Outcome) -> list[tuple[str, Any]]:
    """An outcome for people."""
    metrics = [(name, value) for name, value in outcome.metrics.items() if name.startswith(("eval/", "train/"))]
    return [
        (outcome.name or "run", outcome.folder),
        ("steps", f"{outcome.step:,}"),
        ("parameters", f"{outcome.trainable:,} of {outcome.parameters:,} train"),
        *((name, _shown(value)) for name, value in metrics),
        *([("best", f"{outcome.best:.4g} at step {outcome.best_step:,}")] if outcome.best_step is not None else []),
        *(("export", path) for path in outcome.exports),
        ("seconds", f"{outcome.seconds:.1f}"),
    ]


def _outputs(outcome: Outcome) -> list[dict[str, Any]]:
    """The weights and exports that a run left."""
    from ortho_cli.training.run_folder import best_or_last

    folder = Path(outcome.folder)
    kept = best_or_last(folder)
    files = [kept / "model.safetensors"] if kept is not None else []
    for export in map(Path, outcome.exports):
        files += [export] if export.is_file() else sorted(path for path in export.rglob("*") if path.is_file())
    return [{"path": str(path), "bytes": path.stat().st_size} for path in files]
