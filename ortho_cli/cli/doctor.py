"""`ortho doctor`: is everything here that ortho needs?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ortho_cli.cli.options import JsonOption

__all__ = ["doctor"]


def doctor(
    as_json: JsonOption = False,
    offline: Annotated[bool, typer.Option("--offline", help="Do not try to reach the hub.")] = False,
) -> None:
    """Check Python, torch, devices, extras, the hub and the arithmetic; exit 1 when something needed is broken.

    Example: ortho doctor
    """
    from ortho_cli.cli.health import examine

    checks = examine(reach_hub=not offline)
    broken = [check for check in checks if check.status == "broken"]
    if as_json:
        from ortho_cli.cli.show import print_json

        listed = [asdict(check) for check in checks]
        print_json({"command": "doctor", "details": listed}, ok=not broken)
    else:
        from ortho_cli.cli.show import console_out, table

        rows = [(check.status, check.name, check.found, check.hint or "") for check in checks]
        table(console_out(), ["", "check", "found", "to do"], rows)
    if broken:
        raise typer.Exit(1)
