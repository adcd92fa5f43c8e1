"""The `ortho` command: verbs gathered from one module each, and the one place where errors become exit codes.

Nothing heavy is imported here; a verb loads torch when it runs, not when its help is read.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ortho_cli import __version__
from ortho_cli.cli import (
    add_hra,
    analyze,
    bench,
    combine,
    convert,
    demo,
    doctor,
    evaluate,
    extract,
    factorize,
    generate,
    inspect,
    merge,
    recipe,
    sweep,
    train,
    unmerge,
)
from ortho_cli.errors import OrthoError, UsageError

__all__ = ["OrthoGroup", "app", "main"]


# typer's own class for words it does not understand; it has no public name.
TyperUsageError: Any = typer.BadParameter.__bases__[0]


class OrthoGroup(TyperGroup):
    """Catches `OrthoError` once: one line and a hint on stderr, or the JSON object on stdout, and its exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give flags a real default: typer loads pydantic to make one of None, and help should load nothing."""
        for parameter in self.get_params(ctx):
            descriptor = getattr(parameter, "type_descriptor", None)
            if parameter.default is None and getattr(descriptor, "annotation", None) is bool:
                parameter.default = False
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        words = [*getattr(ctx, "_protected_args", []), *ctx.args]
        try:
            return super().invoke(ctx)
        except OrthoError as error:
            if "--debug" in words:
                traceback.print_exc()
            report_error(error, as_json="--json" in words)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except TyperUsageError as error:
            if "--json" not in words:
                raise
            report_error(UsageError(error.format_message()), as_json=True)
            raise typer.Exit(UsageError.exit_code) from error


def report_error(error: OrthoError, *, as_json: bool) -> None:
    """Print what went wrong: for people on stderr, for programs on stdout, which is the first process's alone."""
    rank = os.environ.get("RANK", "0")
    if as_json and rank == "0":
        from ortho_cli.cli.show import print_json

        print_json({"error": error.as_dict()}, ok=False)
        return
    from ortho_cli.checkpoints.header import printable

    where = f" ({printable(error.where)})" if error.where and error.where not in error.message else ""
    color = False if os.environ.get("NO_COLOR") else None  # None: where the stream is a terminal
    title = "error: " if rank == "0" else f"error in process {rank}: "
    text = typer.style(title, fg="red", bold=True) + _harmless(error.message) + where
    if error.hint:
        text += "\n" + typer.style("hint: ", fg="cyan") + _harmless(error.hint)
    typer.echo(text, err=True, color=color)  # in one piece, for several processes may speak at once


def _harmless(text: str) -> str:
    """`text` with its lines, and without what a file's or tensor's name could do to a terminal."""
    from ortho_cli.checkpoints.header import printable

    return "\n".join(map(printable, text.split("\n")))


def _version(value: bool) -> None:
    if value:
        typer.echo(f"ortho {__version__}")
        raise typer.Exit()


app = typer.Typer(
    name="ortho",
    cls=OrthoGroup,
    help="Orthogonality in deep networks: put it into a checkpoint, train with it, measure it, take it out again.",
    epilog="Start with: ortho demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


CHECKPOINTS, TRAINING, ANALYSIS, HELP = "Checkpoints", "Training", "Analysis", "Help"
app.command("inspect", rich_help_panel=CHECKPOINTS)(inspect.inspect)
app.command("add-hra", rich_help_panel=CHECKPOINTS)(add_hra.add_hra)
app.command("factorize", rich_help_panel=CHECKPOINTS)(factorize.factorize)
app.command("merge", rich_help_panel=CHECKPOINTS)(merge.merge)
app.command("unmerge", rich_help_panel=CHECKPOINTS)(unmerge.unmerge)
app.command("combine", rich_help_panel=CHECKPOINTS)(combine.combine)
app.command("extract", rich_help_panel=CHECKPOINTS)(extract.extract)
app.command("convert", rich_help_panel=CHECKPOINTS)(convert.convert)
app.command("train", rich_help_panel=TRAINING)(train.train)
app.command("sweep", rich_help_panel=TRAINING)(sweep.sweep)
app.command("evaluate", rich_help_panel=TRAINING)(evaluate.evaluate)
app.command("generate", rich_help_panel=TRAINING)(generate.generate)
app.add_typer(analyze.app, name="analyze", cls=OrthoGroup, rich_help_panel=ANALYSIS)
app.add_typer(recipe.app, name="recipe", cls=OrthoGroup, rich_help_panel=HELP)
app.add_typer(bench.app, name="bench", cls=OrthoGroup, rich_help_panel=HELP)
app.command("doctor", rich_help_panel=HELP)(doctor.doctor)
app.command("demo", rich_help_panel=HELP)(demo.demo)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):  # names of tensors may hold what an old terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="ortho")
