"""`ortho evaluate`: judge a run's model again, or a folder of pictures by another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ortho_cli.cli.completion import words
from ortho_cli.cli.options import OUTPUT, DebugOption, DryRunOption, ForceOption, JsonOption, QuietOption
from ortho_cli.errors import UsageError

if TYPE_CHECKING:
    from ortho_cli.analysis.evaluation import Evaluation
    from ortho_cli.training.model_judge import Drawing

__all__ = ["evaluate"]

PICTURES = "Pictures and GANs"


def evaluate(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="The folder of a run, the run.dir of its recipe.")
    ] = None,
    generated: Annotated[
        Path | None,
        typer.Option(
            "--generated", metavar="DIR", help="Pictures to judge, in place of RUN.", rich_help_panel=PICTURES
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", metavar="DIR", help="Pictures to compare with.", rich_help_panel=PICTURES),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            "--features",
            metavar="inception|RUN|ID",
            help="The network of fid and kid: inception, a run that classifies, a hub id or a folder.",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    number: Annotated[
        int | None,
        typer.Option(
            "--num",
            metavar="N",
            min=2,
            help="Of a GAN: pictures, paths and pairs at most; default: 50,000, 10,000 and 10,000.",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    extent: Annotated[
        float | None,
        typer.Option(
            "--extent", metavar="X", help="Of a GAN: pairs' coordinates from -X to X; 4.", rich_help_panel=PICTURES
        ),
    ] = None,
    sefa: Annotated[
        bool,
        typer.Option("--sefa", help="Of a GAN: turn the code first, as generate does.", rich_help_panel=PICTURES),
    ] = False,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", min=0, help="Of what is drawn; 0.", rich_help_panel=PICTURES)
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            metavar="best|last|STEP",
            help="Default: best, else last.",
            autocompletion=words("best", "last"),
        ),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option("--metrics", metavar="LIST", help="Names with commas; default: all there are.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="val|train", help="Default: val.", autocompletion=words("val", "train")),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A key of data, as data.classes=[0,1], or METRIC.KEY; repeatable."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The folder to write; default: RUN/evaluation.", rich_help_panel=OUTPUT),
    ] = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Evaluate a run's best model: by class, by more metrics, on other data; or compare two folders of pictures.

    Writes evaluation.json and a report.

    Example: ortho evaluate runs/quickstart --set 'data.classes=[5,6,7,8,9]' -o second-half

    Example: ortho evaluate runs/digits-eigengan --features runs/digits-vit --num 2000

    Example: ortho evaluate --generated made --reference real --metrics fid,kid --features facebook/dinov2-small

    A metric whose library or weights are missing is skipped by name, with the command that fetches it.
    """
    from ortho_cli.analysis.evaluation import MARK
    from ortho_cli.analysis.report_folder import check_folder
    from ortho_cli.cli.progress import status_line
    from ortho_cli.cli.show import console_out, print_json, table
    from ortho_cli.training.processes import is_first, leave

    if extent is not None and extent <= 0:
        raise UsageError(f"--extent {extent} is not above 0", hint="e.g. --extent 4")
    names = [name.strip() for name in metrics.split(",") if name.strip()] if metrics is not None else None
    if names == []:
        raise UsageError(f"--metrics {metrics!r} names none", hint="e.g. --metrics fid,kid; leave it out for all")
    if run is not None and generated is None and reference is None:
        from ortho_cli.analysis.run_folder import open_run
        from ortho_cli.training.evaluate import evaluate_run, find_checkpoint

        open_run(run)
        state = find_checkpoint(run, checkpoint)
        inputs, protected, folder = [run], [state], output or run / "evaluation"
        plan: dict[str, object] = {"checkpoint": state.name, "split": split or "val"}
    elif run is None and generated is not None and reference is not None:
        from ortho_cli.analysis.picture_folder import open_folder
        from ortho_cli.analysis.picture_metrics import chosen_metrics
        from ortho_cli.training.evaluate_pictures import evaluate_pictures

        if checkpoint is not None or split is not None or number is not None or extent is not None or sefa:
            raise UsageError(
                "--checkpoint, --split, --num, --extent and --sefa are of a run", hint="leave them out, or name a RUN"
            )
        inputs = protected = [generated, reference]
        folder = output or generated.parent / f"{generated.resolve().name}-evaluation"
        counts = {"pictures": len(open_folder(generated)), "references": len(open_folder(reference))}
        plan = {"metrics": ", ".join(chosen_metrics(names)), **counts}
    else:
        given = {"RUN": run, "--generated": generated, "--reference": reference}
        found = " and ".join(name for name, value in given.items() if value is not None) or "neither"
        raise UsageError(
            f"expected a RUN, or two folders of pictures; found {found}",
            hint="ortho evaluate RUN, or ortho evaluate --generated DIR --reference DIR",
        )
    check_folder(folder, protected, MARK, force=force)
    if dry_run:
        plan["would write"] = str(folder / MARK)
        if as_json:
            print_json({"command": "evaluate", "dry_run": True, "inputs": [str(path) for path in inputs], **plan})
        else:
            table(console_out(), None, list(plan.items()))
        return
    try:
        with status_line(hidden=quiet or not is_first()) as say:
            if run is not None:
                evaluation = evaluate_run(
                    run, checkpoint=checkpoint, metrics=names, split=split or "val", sets=sets or [],
                    drawing=_drawing(features=features, number=number, seed=seed, extent=extent, sefa=sefa or None),
                    say=say,
                )  # fmt: skip
            else:
                assert generated is not None
                assert reference is not None
                evaluation = evaluate_pictures(
                    generated, reference, metrics=names, sets=sets or [], features=features or "inception",
                    seed=seed or 0, say=say,
                )  # fmt: skip
    finally:
        leave()
    if is_first():
        _report(evaluation, inputs, folder, force=force, as_json=as_json, quiet=quiet)


def _drawing(**options: Any) -> Drawing | None:
    """The options that were given, None of them where none was."""
    from ortho_cli.training.model_judge import Drawing

    given = {name: value for name, value in options.items() if value is not None}
    return Drawing(**given) if given else None


def _report(
    evaluation: Evaluation, inputs: list[Path], folder: Path, *, force: bool, as_json: bool, quiet: bool
) -> None:
    from ortho_cli.analysis.evaluation import evaluation_report, metric_table
    from ortho_cli.analysis.report_folder import write_folder
    from ortho_cli.cli.show import console_out, print_json, show_notes, table

    report = evaluation_report(evaluation)
    written = write_folder(report, folder, ("html", "png", "csv", "json"), force=force)
    if as_json:
        named = [str(path) for path in inputs]
        print_json({"command": "evaluate", "inputs": named, "outputs": written, **(report.data or {})})
    elif not quiet:
        console = console_out()
        table(console, None, [(evaluation.where, ""), *metric_table(evaluation).rows])
        show_notes(console, [*evaluation.notes, *map(str, evaluation.skipped)])
        console.print(f"wrote {folder}", markup=False)
