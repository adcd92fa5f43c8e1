"""Read series from files: CSV with a header, as the field shares them, and the one that comes with matplotlib.

A file is read whole or refused: the error names the line, and the column, that is not what it should be.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ortho_cli.errors import RecipeError

__all__ = ["Table", "read_csv", "read_eeg"]

DATES = {"date", "dates", "datetime", "time", "timestamp"}  # what a first column of dates is called
DATE_FORMS = ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d")  # besides ISO 8601: numbers without leading zeros
EEG_FILE, EEG_CHANNELS = "eeg.dat", ("a", "b", "c", "d")


@dataclass(frozen=True)
class Table:
    """`values` (rows, columns) float64, all finite; `columns` their names."""

    columns: tuple[str, ...]
    values: NDArray[np.float64]


def read_csv(path: Path, columns: Sequence[str] | None = None) -> Table:
    """Read a series: a header, then a row a step, in the order of time.

    A first column that is called `date` (or `time`, `timestamp`, `datetime`) is no channel; its dates must rise.

    Args:
        path: the file, UTF-8.
        columns: names of the channels to read, in this order; None: all.

    Raises:
        RecipeError: the file cannot be read, has no such column, or a row is not what the header says; with the line.

    Cost: the file is read once, and is in memory as float64.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _table(file, str(path), columns)
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise RecipeError(f"cannot be read: {reason}", where=str(path)) from error


def read_eeg(columns: Sequence[str] | None = None) -> Table:
    """The brain waves among matplotlib's sample data: 800 rows, four channels.

    Args:
        columns: as for `read_csv`.

    Raises:
        RecipeError: this matplotlib came without its sample data, or there is no such column.
    """
    from matplotlib.cbook import get_sample_data

    path = Path(get_sample_data(EEG_FILE, asfileobj=False))
    places = _places(list(EEG_CHANNELS), columns, str(path))
    try:
        values = np.fromfile(path).reshape(-1, len(EEG_CHANNELS))
    except OSError as error:
        hint = "some distributions leave it out: pip install --force-reinstall matplotlib"
        raise RecipeError("matplotlib's sample data is not here", hint=hint, where=str(path)) from error
    return Table(tuple(EEG_CHANNELS[place] for place in places), values[:, places])


def _table(lines: Iterable[str], path: str, wanted: Sequence[str] | None) -> Table:
    reader = csv.reader(lines, strict=True)
    names: list[str] = []
    rows: list[list[float]] = []
    before: datetime | None = None
    try:
        for fields in reader:
            where = f"{path}:{reader.line_num}"
            if not names:
                names = _header(fields, where)
                dated = names[0].lower() in DATES
                channels = names[1:] if dated else names
                places = [names.index(channels[place]) for place in _places(channels, wanted, where)]
                continue
            if len(fields) != len(names):
                found = f"{len(fields)} fields" if fields else "an empty line"
                raise RecipeError(f"{found}, where the header has {len(names)} names", where=where)
            if dated:
                before = _later(fields[0], before, where)
            rows.append([_number(fields[place], names[place], where) for place in places])
    except csv.Error as error:
        raise RecipeError(f"is not CSV: {error}", where=f"{path}:{reader.line_num}") from error
    if not rows:
        raise RecipeError("holds no rows", hint="expected a header and a row a step", where=path)
    return Table(tuple(names[place] for place in places), np.asarray(rows, dtype=np.float64))


def _header(fields: list[str], where: str) -> list[str]:
    names = [field.strip() for field in fields]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if not names or "" in names or twice:
        what = f"{twice[0]!r} heads {names.count(twice[0])} columns" if twice else "a column without a name"
        raise RecipeError(what, hint="the first line names each column once", where=where)
    if all(_is_number(name) for name in names):
        raise RecipeError(f"the header holds numbers: {', '.join(names)[:60]}", hint="name the columns", where=where)
    return names


def _places(channels: list[str], wanted: Sequence[str] | None, where: str) -> list[int]:
    """The places of the wanted channels, or of all."""
    missing = [name for name in wanted or () if name not in channels]
    if missing or not channels:
        raise RecipeError(
            f"no column {missing[0]!r}" if missing else "no column but that of the dates",
            hint=f"columns of values: {', '.join(channels) or 'none'}",
            where=where,
        )
    return [channels.index(name) for name in wanted or channels]


def _number(text: str, column: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        found = repr(text) if text.strip() else "nothing"
        raise RecipeError(
            f"column {column!r}: expected a finite number, found {found}",
            hint="fill gaps before training, or name the columns to read: data.columns",
            where=where,
        )
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _later(text: str, before: datetime | None, where: str) -> datetime:
    """The date of a row, which must come after that of the row before."""
    moment = _moment(text, where)
    if before is not None and (moment.tzinfo is None) != (before.tzinfo is None):
        raise RecipeError(f"{text!r}: dates with a time zone and without", where=where)
    if before is not None and moment <= before:
        raise RecipeError(f"{text!r} is not after the date before it", hint="sort the rows by date", where=where)
    return moment


def _moment(text: str, where: str) -> datetime:
    plain = text.strip().replace("/", "-")
    try:
        return datetime.fromisoformat(plain)
    except ValueError:
        for form in DATE_FORMS:
            try:
                return datetime.strptime(plain, form)
            except ValueError:
                continue
    raise RecipeError(f"expected a date as 2016-07-01 00:15:00, found {text!r}", where=where)
