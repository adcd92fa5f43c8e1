"""What every writing verb does after its arguments are known: plan, run with a bar, report, upload."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from ortho_cli.cli.arguments import keep_recipe
from ortho_cli.cli.progress import byte_bar
from ortho_cli.cli.publish import check_upload, publish
from ortho_cli.cli.show import show_report
from ortho_cli.errors import UsageError
from ortho_cli.surgery.plan import run

if TYPE_CHECKING:
    import typer

    from ortho_cli.surgery.plan import Plan, Report

__all__ = ["carry"]


def carry(
    ctx: typer.Context, make_plan: Callable[[], object], after: Callable[[Report], None] = lambda report: None
) -> None:
    """Make the plan, carry it out as the run options say, and print the report; `after` may add to what was written."""
    options = ctx.params
    if options["private"] and not options["push_to_hub"]:
        raise UsageError("--private is about --push-to-hub, which was not given")
    if options["push_to_hub"] and options["dry_run"]:
        raise UsageError("--dry-run writes nothing that --push-to-hub could upload", hint="leave one of them out")
    if options["push_to_hub"]:
        check_upload(options["push_to_hub"])
    plan = cast("Plan", make_plan())
    with byte_bar(plan.command, hidden=options["quiet"] or options["as_json"]) as bar:
        report = run(plan, force=options["force"], dry_run=options["dry_run"], progress=bar)
    if not options["dry_run"]:
        keep_recipe(ctx)
        after(report)
    if options["push_to_hub"]:  # before the report: a failure is the one thing said, then
        publish(plan.output, options["push_to_hub"], private=options["private"], command=f"ortho {plan.command}")
    show_report(report, as_json=options["as_json"], quiet=options["quiet"], verbose=options["verbose"])
