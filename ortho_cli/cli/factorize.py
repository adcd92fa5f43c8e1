"""`ortho factorize`: low-rank factors in place of weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ortho_cli.cli.arguments import NOTHING, gather, required
from ortho_cli.cli.completion import presets, words
from ortho_cli.cli.options import (
    METHOD,
    OUTPUT,
    TARGETS,
    DebugOption,
    DryRunOption,
    ForceOption,
    JsonOption,
    OutputOption,
    PrivateOption,
    PushOption,
    QuietOption,
    RecipeOption,
    SaveRecipeOption,
    VerboseOption,
)  # fmt: skip

if TYPE_CHECKING:
    from ortho_cli.surgery.plan import Report

__all__ = ["factorize"]

USAGE = "ortho factorize CHECKPOINT -o OUT --rank-scale 0.25"
RANKS = "Rank (exactly one)"


def factorize(
    ctx: typer.Context,
    checkpoint: Annotated[str | None, typer.Argument(metavar="CHECKPOINT", help="File, folder or hub id.")] = None,
    output: OutputOption = None,
    rank: Annotated[
        list[str] | None,
        typer.Option("--rank", metavar="N|PATTERN=N", help="Of a layer; repeatable.", rich_help_panel=RANKS),
    ] = None,
    rank_scale: Annotated[
        float | None,
        typer.Option("--rank-scale", metavar="F", help="Share of each layer's full rank.", rich_help_panel=RANKS),
    ] = None,
    target_ratio: Annotated[
        float | None,
        typer.Option(
            "--target-ratio",
            metavar="F",
            help="Parameters of the whole checkpoint, after / before.",
            rich_help_panel=RANKS,
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", metavar="F", help="Share of each ||W||² that is kept.", rich_help_panel=RANKS),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option("--max-error", metavar="F", help="Relative error of each layer.", rich_help_panel=RANKS),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            metavar="F",
            rich_help_panel=RANKS,
            help="Cost of the targeted layers, after / before; all ranks together for the smallest total error.",
        ),
    ] = None,
    budget_unit: Annotated[
        str | None,
        typer.Option(
            "--budget-unit",
            metavar="params|flops",
            autocompletion=words("params", "flops"),
            rich_help_panel=RANKS,
            help="What the budget counts (default params).",
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="FILE",
            rich_help_panel=METHOD,
            help='Lines of text, or .jsonl with "text": fit the factors to what layers see (transformers models).',
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", help="How many lines of it.", rich_help_panel=METHOD)
    ] = 256,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="auto|svd|randomized",
            autocompletion=words("auto", "svd", "randomized"),
            help="auto: the cheapest within 1 % of the smallest squared error.",
            rich_help_panel=METHOD,
        ),
    ] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            rich_help_panel=METHOD,
            help="Layers at a time (default: processors); the result does not depend on it.",
        ),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--targets",
            metavar="PATTERN|PRESET",
            autocompletion=presets,
            rich_help_panel=TARGETS,
            help="Default: Linear and conv layers with no side below 64, but embeddings, first conv and output head.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", help="Layers to leave whole.", rich_help_panel=TARGETS),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--as",
            metavar="factors|dense|lora-residual",
            autocompletion=words("factors", "dense", "lora-residual"),
            help="Factors, truncated weights (a drop-in), or base/ and adapter/ as PiSSA.",
            rich_help_panel=OUTPUT,
        ),
    ] = "factors",
    report: Annotated[
        str | None,
        typer.Option(
            "--report", metavar="DIR", help="Pictures and tables (default: OUT-report).", rich_help_panel=OUTPUT
        ),
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write none.", rich_help_panel=OUTPUT)] = False,
    recipe: RecipeOption = None,
    save_recipe: SaveRecipeOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Replace weights by low-rank factors, with the smallest error for the chosen ranks.

    Example: ortho factorize all-MiniLM-L6-v2 -o minilm-small --budget 0.7

    Load the result with ortho.load_factorized(model, OUT); with --as dense it loads like the original.
    """
    values = gather(ctx, "factorize", _typed_rule_wins)
    required(values, USAGE, "checkpoint", "output")
    from ortho_cli.analysis.factorization import MARK, factorization_report
    from ortho_cli.analysis.report_folder import check_folder, write_folder
    from ortho_cli.checkpoints.store import open_checkpoint
    from ortho_cli.cli.carry import carry
    from ortho_cli.cli.progress import byte_bar
    from ortho_cli.surgery.factorize import FactorizePlan, plan_factorize

    source, target, named = values.pop("checkpoint"), values["output"], values.pop("report")
    folder = None if no_report else Path(named) if named else target.with_name(f"{target.stem}-report")
    options = {**values, "exclude": values["exclude"] or [], "workers": workers, "force": force}
    options["calibrate_on"] = options.pop("calibrate")
    plans: list[FactorizePlan] = []

    def plan() -> object:
        checkpoint = open_checkpoint(source)
        if folder is not None:
            check_folder(folder, [file.path for file in checkpoint.files], MARK, force=force)
        with byte_bar("spectra", hidden=quiet or as_json) as bar:
            plans.append(plan_factorize(checkpoint, progress=bar, **options))
        return plans[0]

    def after(done: Report) -> None:
        if folder is not None:
            command = plans[0].files[0].metadata["ortho.command"]
            report = factorization_report(done.as_dict(), plans[0].spectra, command)
            done.outputs.extend(write_folder(report, folder, ("html", "png", "csv", "json"), force=force))

    carry(ctx, plan, after)


def _typed_rule_wins(values: dict[str, Any], typed: set[str]) -> None:
    """A rank rule on the command line takes the place of the recipe's, whichever that is."""
    from ortho_cli.surgery.factorize_ranks import RULES

    if not typed.isdisjoint(RULES):
        values.update({name: None for name in RULES if name not in typed})
        if typed.isdisjoint({"budget", "budget_unit"}):
            values["budget_unit"] = None
    values.update({name: None for name in RULES if values[name] in NOTHING})
