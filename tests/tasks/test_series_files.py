"""Series from files: what is read, and every way in which a file can be wrong, with the line that is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ortho_cli.errors import RecipeError
from ortho_cli.tasks.series_files import read_csv, read_eeg

GOOD = "date,HUFL,OT\n2016-07-01 00:00:00,5.827,30.5\n2016-07-01 00:15:00,-1e-2,27.7\n"


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "s.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_columns_behind_the_dates_are_channels(tmp_path: Path) -> None:
    table = read_csv(written(tmp_path, GOOD))
    assert table.columns == ("HUFL", "OT")
    assert table.values.tolist() == [[5.827, 30.5], [-0.01, 27.7]]
    only = read_csv(tmp_path / "s.csv", ["OT"])
    assert (only.columns, only.values.tolist()) == (("OT",), [[30.5], [27.7]])
    assert read_csv(tmp_path / "s.csv", ["OT", "HUFL"]).values.tolist() == [[30.5, 5.827], [27.7, -0.01]]


def test_without_dates_every_column_is_one(tmp_path: Path) -> None:
    assert read_csv(written(tmp_path, "a, b \n1,2\n3,4")).columns == ("a", "b")


@pytest.mark.parametrize(
    "dates",
    [
        ("1990/1/1 0:00", "1990/1/2 0:00"), ("2016-07-01", "2016-07-02"), ("2016-07-01T00", "2016-07-01T01"),
        ("2016-07-01 00:00:00+02:00", "2016-07-01 00:00:00+01:00"), ("2011-01-01 00:00", "2011-01-01 01:00"),
    ],
)  # fmt: skip
def test_dates_as_people_write_them(tmp_path: Path, dates: tuple[str, str]) -> None:
    path = written(tmp_path, f"Date,x\n{dates[0]},1\n{dates[1]},2\n")
    assert read_csv(path).values.tolist() == [[1.0], [2.0]]
    with pytest.raises(RecipeError, match="is not after the date before it"):
        read_csv(written(tmp_path, f"Date,x\n{dates[1]},1\n{dates[0]},2\n"))


def test_a_mark_quotes_and_carriage_returns_are_read_over(tmp_path: Path) -> None:
    text = "\ufeff" + GOOD.replace("OT", '"OT, the oil\'s"').replace("\n", "\r\n")
    assert read_csv(written(tmp_path, text)).columns == ("HUFL", "OT, the oil's")


def test_a_column_that_is_not_wanted_may_hold_anything(tmp_path: Path) -> None:
    path = written(tmp_path, "date,x,weather\n2016-07-01,1,rain\n")
    assert read_csv(path, ["x"]).values.tolist() == [[1.0]]
    with pytest.raises(RecipeError, match="column 'weather': expected a finite number, found 'rain'"):
        read_csv(path)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", None, "holds no rows"),
        ("date,x\n", None, "holds no rows"),
        ("\n", 1, "a column without a name"),
        ("date,x,\n", 1, "a column without a name"),
        ("date,x,x\n", 1, "'x' heads 2 columns"),
        ("1.0,2.0\n3.0,4.0\n", 1, "the header holds numbers: 1.0, 2.0"),
        ("date\n2016-07-01\n", 1, "no column but that of the dates"),
        (GOOD + "2016-07-01 00:30:00,1\n", 4, "2 fields, where the header has 3 names"),
        (GOOD + "2016-07-01 00:30:00,1,2,3\n", 4, "4 fields, where the header has 3 names"),
        (GOOD + "\n2016-07-01 00:30:00,1,2\n", 4, "an empty line, where the header has 3 names"),
        (GOOD + "2016-07-01 00:30:00,,2\n", 4, "column 'HUFL': expected a finite number, found nothing"),
        (GOOD + "2016-07-01 00:30:00,1,NaN\n", 4, "column 'OT': expected a finite number, found 'NaN'"),
        (GOOD + "2016-07-01 00:30:00,inf,1\n", 4, "column 'HUFL': expected a finite number, found 'inf'"),
        (GOOD + "yesterday,1,2\n", 4, "expected a date as 2016-07-01 00:15:00, found 'yesterday'"),
        (GOOD + "2016-07-01 00:15:00,1,2\n", 4, "'2016-07-01 00:15:00' is not after the date before it"),
        (GOOD + "2016-07-02 00:15:00+00:00,1,2\n", 4, "dates with a time zone and without"),
        ('a\n"1\n', 2, "is not CSV: unexpected end of data"),
        ('a,b\n1,"2\n3"\n', 3, "column 'b': expected a finite number, found '2"),
        (b"a\n\xff\n", None, "cannot be read: it is not UTF-8 text"),
        ("a\n" + "1" * 200_000 + "\n", 2, "is not CSV: field larger than field limit"),
    ],
)
def test_what_is_malformed_is_told_with_its_line(
    tmp_path: Path, text: str | bytes, line: int | None, reason: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        read_csv(path)
    assert caught.value.message.startswith(reason) or reason in caught.value.message
    assert caught.value.where == str(path) + (f":{line}" if line else "")
    assert caught.value.exit_code == 3


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no column 'date'") as caught:
        read_csv(written(tmp_path, GOOD), ["date"])
    assert caught.value.hint == "columns of values: HUFL, OT"
    with pytest.raises(RecipeError, match="no column 'e'"):
        read_eeg(["a", "e"])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read: "):
            read_csv(path)


def test_brain_waves_are_matplotlibs() -> None:
    table = read_eeg()
    assert (table.columns, table.values.shape) == (("a", "b", "c", "d"), (800, 4))
    assert np.allclose(table.values.std(0), 1, atol=5e-3)  # as they come; they are no noise:
    assert all(np.corrcoef(table.values[1:, place], table.values[:-1, place])[0, 1] > 0.5 for place in range(4))
    assert np.array_equal(read_eeg(["d", "a"]).values, table.values[:, [3, 0]])


def test_without_the_sample_data_of_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.cbook.get_sample_data", lambda name, asfileobj: tmp_path / name)
    with pytest.raises(RecipeError, match="matplotlib's sample data is not here"):
        read_eeg()
