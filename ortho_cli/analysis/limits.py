"""Limits that a measure of every layer is held to, for pipelines: `--fail-above X`, `--fail-below X`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan

from ortho_cli.errors import NumericsError, UsageError

__all__ = ["Limits"]

SHOWN = 3  # layers in a message


@dataclass(frozen=True)
class Limits:
    """What one measure of all layers must keep to.

    Attributes:
        metric: its name.
        above: fails where a layer is above; None: no limit.
        below: fails where a layer is below.

    Raises:
        UsageError: a limit that is no number, or two that leave nothing between them.

    >>> Limits("coherence", above=0.5).check({"a": 0.25, "b": None})
    >>> Limits("coherence", above=0.5).check({"a": 0.75})
    Traceback (most recent call last):
    ortho_cli.errors.NumericsError: coherence is above 0.5 in 1 of 1 layers: a (0.75)
    """

    metric: str
    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        for option, value in (("--fail-above", self.above), ("--fail-below", self.below)):
            if value is not None and isnan(value):
                raise UsageError(f"{option} {value} is no limit", hint="give a number")
        if self.above is not None and self.below is not None and self.below > self.above:
            raise UsageError(f"nothing is between --fail-below {self.below:g} and --fail-above {self.above:g}")

    def check(self, values: Mapping[str, float | None]) -> None:
        """Compare every layer that has a value.

        Raises:
            NumericsError: a layer is beyond a limit; the worst are named. No layer has a value to compare.
        """
        if self.above is None and self.below is None:
            return
        known = {name: value for name, value in values.items() if value is not None}
        if not known:
            raise NumericsError(f"no layer has a {self.metric} to hold to a limit")
        for side, limit, sign in (("above", self.above, 1), ("below", self.below, -1)):
            beyond = [] if limit is None else [name for name, value in known.items() if sign * (value - limit) > 0]
            if beyond:
                worst = sorted(beyond, key=lambda name: -sign * known[name])[:SHOWN]
                told = ", ".join(f"{name} ({known[name]:.4g})" for name in worst)
                more = f" and {len(beyond) - SHOWN} more" if len(beyond) > SHOWN else ""
                raise NumericsError(
                    f"{self.metric} is {side} {limit:g} in {len(beyond)} of {len(known)} layers: {told}{more}"
                )
