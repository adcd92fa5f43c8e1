"""`ortho analyze stability`: when the basis of each layer has settled, over the checkpoints of a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ortho_cli.cli.arguments import gather, keep_recipe, required
from ortho_cli.cli.completion import presets, words
from ortho_cli.cli.layer_report import told_command
from ortho_cli.cli.options import (
    METHOD,
    OUTPUT,
    TARGETS,
    DebugOption,
    DryRunOption,
    ExcludeOption,
    ForceOption,
    FormatOption,
    JsonOption,
    QuietOption,
    RecipeOption,
    SaveRecipeOption,
    VerboseOption,
    WorkersOption,
)  # fmt: skip

if TYPE_CHECKING:
    from ortho_cli.analysis.report import Report
    from ortho_cli.analysis.stability_plan import StabilityPlan

__all__ = ["analyze_stability"]

ALL_FORMATS = "html,png,svg,csv,json"
LAYERS_SHOWN = 10  # without --verbose
USAGE = "ortho analyze stability CHECKPOINT...|RUN|FOLDER [-o FOLDER]"
ASKED = ("revisions", "lags", "reference", "top_rank", "targets", "exclude", "split_heads")
SHOWN = ("layer", "settled_at", "stays", "last_stability", "rank", "parameters", "trained", "resolved")


def analyze_stability(
    ctx: typer.Context,
    series: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHECKPOINT...|RUN|FOLDER|GLOB|ORG/NAME|TABLE.csv",
            help="Checkpoints of one training, what holds them, or an earlier stability.csv.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder to write the report to.", rich_help_panel=OUTPUT)
    ] = Path("stability-report"),
    revisions: Annotated[
        str | None, typer.Option("--revisions", metavar="GLOB", help="Of a repository on the hub, e.g. 'step*'.")
    ] = None,
    lags: Annotated[
        list[int] | None,
        typer.Option("--lag", metavar="N", help="Compare with the checkpoint N before; repeatable. Default: 1.",
                     rich_help_panel=METHOD),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="first|last|PATH", autocompletion=words("first", "last"),
                     help="Compare all with one checkpoint instead.", rich_help_panel=METHOD),
    ] = None,
    top_rank: Annotated[
        int | None,
        typer.Option("--top-rank", metavar="R", min=1, help="Also compare the R leading directions alone.",
                     rich_help_panel=METHOD),
    ] = None,
    threshold: Annotated[
        float, typer.Option("--threshold", help="The stability that counts as settled.", rich_help_panel=METHOD)
    ] = 0.95,
    patience: Annotated[
        int, typer.Option("--patience", help="Comparisons in a row that must reach it.", rich_help_panel=METHOD)
    ] = 2,
    targets: Annotated[
        list[str] | None,
        typer.Option("--targets", metavar="PATTERN|PRESET", autocompletion=presets, rich_help_panel=TARGETS,
                     help="Globs or a preset; by default all but embeddings, position tables and single rows."),
    ] = None,
    exclude: ExcludeOption = None,
    split_qkv: Annotated[
        bool, typer.Option("--split-qkv", help="Query, key and value of a fused projection apart.",
                           rich_help_panel=TARGETS)
    ] = False,
    split_heads: Annotated[
        int | None, typer.Option("--split-heads", metavar="N", help="Attention by head; N heads a layer.",
                                 rich_help_panel=TARGETS)
    ] = None,
    fail_below: Annotated[
        float | None, typer.Option("--fail-below", metavar="X", help="Exit 5 where a layer ends below.")
    ] = None,
    fail_above: Annotated[
        float | None, typer.Option("--fail-above", metavar="X", help="Exit 5 where a layer ends above.")
    ] = None,
    workers: WorkersOption = None,
    device: Annotated[str, typer.Option("--device", help="Where to compute, e.g. cuda.")] = "cpu",
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="FOLDER", help="Where results are kept to go on from.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no results, and use none.")] = False,
    formats: FormatOption = ALL_FORMATS,
    recipe: RecipeOption = None,
    save_recipe: SaveRecipeOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Show when the basis of each layer has settled, and what freezing it from then on would save (OIALR).

    Example: ortho analyze stability runs/digits-vit -o stability

    Checkpoints are ordered by state.json's step, else by the last number in their names. An interrupted or a longer
    series goes on from what was measured before.
    """
    values = gather(ctx, "analyze-stability", _typed_comparison_wins)
    required(values, USAGE, "series")
    from ortho_cli.analysis.limits import Limits
    from ortho_cli.analysis.report import parse_formats
    from ortho_cli.analysis.report_folder import check_folder, write_folder
    from ortho_cli.analysis.stability_advice import check_rule
    from ortho_cli.analysis.stability_cache import cache_folder
    from ortho_cli.analysis.stability_plan import plan_stability
    from ortho_cli.analysis.stability_report import MARK, read_changes, stability_report
    from ortho_cli.checkpoints.layer_pool import default_workers
    from ortho_cli.cli.progress import byte_bar
    from ortho_cli.cli.show import print_json
    from ortho_cli.methods.side_by_side import check_device

    check_device(values["device"])
    series, output, kinds = values["series"], values["output"], parse_formats(values["formats"])
    limits = Limits("stability", values["fail_above"], values["fail_below"])
    rule = {name: values[name] for name in ("threshold", "patience")}
    check_rule(**rule)
    asked = {name: values[name] for name in ASKED}
    notes: Sequence[str] = ()
    if len(series) == 1 and series[0].endswith(".csv"):
        check_folder(output, [Path(series[0])], MARK, force=force)
        changes = read_changes(Path(series[0]))
    else:
        lists = {name: asked[name] or () for name in ("lags", "targets", "exclude")}
        plan = plan_stability(series, **{**asked, **lists}, split_qkv=values["split_qkv"])
        check_folder(
            output, [file.path for entry in plan.entries for file in entry.checkpoint.files], MARK, force=force
        )
        if dry_run:
            _show_plan(plan, output, as_json=as_json)
            return
        with byte_bar("stability", hidden=quiet or as_json) as bar:
            changes = plan.measure(
                workers=workers or default_workers(),
                device=values["device"],
                cache=None if no_cache else cache or cache_folder(),
                **({"start": bar.start, "advance": bar.advance} if bar is not None else {}),
            )
        notes = plan.notes
    asked["lag"], reference = asked.pop("lags"), asked.pop("reference")
    command = told_command("stability", series, **asked, reference=reference and Path(reference).name)
    report = stability_report(changes, name=_title(series), command=command, notes=notes, **rule)
    if dry_run:
        written: list[dict[str, object]] = [{"path": str(output / name)} for name in report.files(kinds)]
    else:
        written = write_folder(report, output, kinds, force=force)
        keep_recipe(ctx)
    held = {change.layer: change.stability for change in sorted(changes, key=lambda change: change.step)}
    if as_json:
        limits.check(held)  # a failure is the one JSON object, then
        print_json({**(report.data or {}), "outputs": written, "dry_run": dry_run})
        return
    if not quiet:
        _show(report, notes, written, verbose=verbose, dry_run=dry_run)
    limits.check(held)


def _typed_comparison_wins(values: dict[str, Any], typed: set[str]) -> None:
    """A lag on the command line takes the place of the recipe's reference, and the other way round."""
    for name, other in (("lags", "reference"), ("reference", "lags")):
        if name in typed and other not in typed:
            values[other] = None


def _show_plan(plan: StabilityPlan, output: Path, *, as_json: bool) -> None:
    """What would be done."""
    from ortho_cli.cli.show import console_out, human_bytes, print_json, table

    if as_json:
        print_json({
            "command": "analyze stability", "inputs": [entry.name for entry in plan.entries],
            "layers": len(plan.layers), "comparisons": len(plan.pairs), "bytes_read": plan.nbytes,
            "outputs": [{"path": str(output)}], "notes": plan.notes, "dry_run": True,
        })  # fmt: skip
        return
    console = console_out()
    steps = [(entry.name, "-" if entry.step is None else entry.step) for entry in plan.entries]
    table(console, ["checkpoint", "step"], steps)
    facts = [("layers", len(plan.layers)), ("comparisons of each", len(plan.pairs))]
    table(console, None, [*facts, ("reads", human_bytes(plan.nbytes)), ("would write", output)])


def _show(
    report: Report, notes: Sequence[str], written: Sequence[dict[str, object]], *, verbose: bool, dry_run: bool
) -> None:
    """What a terminal shows: the least stable layers, the advice, and where the report is."""
    from ortho_cli.analysis.table import Table, cell_text
    from ortho_cli.cli.show import console_out, show_notes, table

    console = console_out()
    shown = next(part for part in report.parts() if isinstance(part, Table) and part.name == "advice")
    advice = next(parts for title, parts in report.sections if title == "Advice")
    places = [shown.headers.index(name) for name in SHOWN]
    by_stability = shown.headers.index("last_stability")
    rows = shown.rows if verbose else sorted(shown.rows, key=lambda row: row[by_stability])[:LAYERS_SHOWN]  # type: ignore[arg-type, return-value]
    if len(rows) < len(shown.rows):
        console.print(
            f"the {len(rows)} of {len(shown.rows)} layers with the lowest stability (all with -v)", style="bold"
        )
    table(
        console,
        [name.replace("_", " ") for name in SHOWN],
        [[cell_text(row[place]) for place in places] for row in rows],
    )
    for text in (part for part in advice if isinstance(part, str) and not part.startswith("Note: ")):
        console.print(text, markup=False)
    show_notes(console, notes)
    names = [str(item["path"]) for item in written]
    console.print(f"{'would write' if dry_run else 'wrote'} {len(names)} files, first {names[0]}", markup=False)


def _title(sources: Sequence[str]) -> str:
    """The series as a report calls it: no folder of this machine."""
    first = Path(sources[0])
    if len(sources) == 1:
        return f"{first.parent.resolve().name}/{first.name}" if first.suffix == ".csv" else first.resolve().name
    return first.parent.resolve().name or first.name
