"""Metrics of a folder of generated pictures against a folder of references; `registry.TABLES["picture_metrics"]`.

A metric is a function, registered as ``"name": "ortho_cli.analysis.<file>:<function>"`` and then offered by
`ortho evaluate --generated DIR --reference DIR --metrics name`::

    def name(
        generated: PictureFolder, reference: PictureFolder, options: PictureOptions, *, model: str = "org/network"
    ) -> dict[str, float] | Skipped:

It returns values by name, as they stand in `evaluation.json` (`clip_i`, not `clip-i`; `better` in `metric_names.py`
decides by the name whether less is better), or a :class:`Skipped` with the command that fetches what is missing; a
loader deeper down may raise :class:`Missing` instead. Where it compares picture by picture it asks
`picture_folder.paired` which belong together; prompts are `generated.prompts()`. Keyword arguments with a default (a
string, a number or a bool) are its settings, changed by ``--set name.model=...``. Libraries are imported inside.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ortho_cli import registry
from ortho_cli.errors import UsageError

from .evaluation import Missing, Skipped
from .picture_folder import PictureFolder

__all__ = ["Network", "PictureMetric", "PictureOptions", "chosen_metrics", "measure_pictures", "read_settings"]

Say = Callable[[str], None]
Settings = Mapping[str, Mapping[str, Any]]
YES_NO = {"true": True, "false": False}


class Network(Protocol):
    """Pictures to features; `title` names it in results."""

    title: str

    def __call__(self, pictures: Tensor) -> Tensor:
        """Of `(B, 3, H, W)` uint8, or float in [0, 1], any size: `(B, d)` float32."""


@dataclass
class PictureOptions:
    """What all metrics share.

    Attributes:
        load: the network of `--features`, loaded when it is first needed; raises `Missing`.
        device: where networks work.
        batch: pictures at a time.
        seed: of what is drawn.
        say: takes a line of progress.
    """

    load: Callable[[], Network]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch: int = 64
    seed: int = 0
    say: Say = lambda line: None
    _network: Network | None = None
    _features: dict[Path, Tensor] = field(default_factory=dict)

    @property
    def network(self) -> Network:
        """The network of `--features`, loaded once.

        Raises:
            Missing: its library or weights are not there.
        """
        if self._network is None:
            self._network = self.load()
        return self._network

    @property
    def used(self) -> str:
        """The title of `network`; empty where no metric needed it."""
        return self._network.title if self._network is not None else ""

    @torch.no_grad()
    def features(self, folder: PictureFolder) -> Tensor:
        """What `network` makes of all pictures of a folder, once: `(N, d)` float32 on the CPU."""
        if folder.root not in self._features:
            found: list[Tensor] = []
            for pictures in folder.batches(self.batch):
                found.append(self.network(pictures.to(self.device)).float().cpu())
                self.say(f"features: {sum(map(len, found)):,} of {len(folder):,} pictures of {folder.root.name}")
            self._features[folder.root] = torch.cat(found)
        return self._features[folder.root]


PictureMetric = Callable[..., "dict[str, float] | Skipped"]


def measure_pictures(
    generated: PictureFolder,
    reference: PictureFolder,
    wanted: Sequence[str],
    options: PictureOptions,
    settings: Settings | None = None,
) -> tuple[dict[str, float], list[Skipped]]:
    """Compute some metrics; one whose library or weights are missing is skipped by name.

    Args:
        generated: pictures to judge.
        reference: what they are compared with.
        wanted: names in the registry.
        options: what metrics share.
        settings: of a metric, by its name, as `read_settings` gives them.
    """
    values: dict[str, float] = {}
    skipped: list[Skipped] = []
    for name in wanted:
        metric: PictureMetric = registry.resolve("picture_metrics", name)
        try:
            found = metric(generated, reference, options, **(settings or {}).get(name, {}))
        except Missing as missing:
            found = Skipped(name, missing.reason, missing.command)
        if isinstance(found, Skipped):
            skipped.append(found)
        else:
            values |= found
    return values, skipped


def chosen_metrics(names: Sequence[str] | None, table: str = "picture_metrics") -> list[str]:
    """The names a user gave, each once; None: all of the registry's table.

    Raises:
        UsageError: an unknown one; the hint gives the nearest.
    """
    known = registry.names(table)
    for name in names or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UsageError(f"--metrics {name}: there is no such metric", hint=f"{hint}known: {', '.join(known)}")
    return known if names is None else list(dict.fromkeys(names))


def read_settings(texts: Sequence[str], wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read `METRIC.KEY=VALUE`, each of the type that the metric's default has.

    Raises:
        UsageError: no such metric among those wanted, no such key, or a value of another type.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        place, equals, value = text.partition("=")
        name, dot, key = place.strip().partition(".")
        if not (equals and dot) or name not in wanted:
            raise UsageError(
                f"--set {text}: expected METRIC.KEY=VALUE of a metric that is computed",
                hint=f"metrics: {', '.join(wanted)}",
            )
        defaults = _settings(registry.resolve("picture_metrics", name))
        if key not in defaults:
            hint = f"it has: {', '.join(defaults)}" if defaults else "it has none"
            raise UsageError(f"--set {text}: metric {name} has no setting {key!r}", hint=hint)
        found.setdefault(name, {})[key] = _as(type(defaults[key]), value.strip(), text)
    return found


def _settings(metric: PictureMetric) -> dict[str, Any]:
    parameters = inspect.signature(metric).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def _as(kind: type, value: str, text: str) -> Any:
    try:
        return YES_NO[value] if kind is bool else kind(value)
    except (ValueError, KeyError) as error:
        expected = "true or false" if kind is bool else f"a {kind.__name__}"
        raise UsageError(f"--set {text}: {value!r} is not {expected}") from error
