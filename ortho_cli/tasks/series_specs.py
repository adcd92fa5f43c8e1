"""The series a recipe can name: their files, their place on the hub, and how the field splits them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SPECS", "SeriesSpec"]


@dataclass(frozen=True)
class SeriesSpec:
    """What is known about a series without opening it.

    `channels` None: known once it is opened. `month` is the rows of thirty days, where the field splits by months:
    twelve to train, four to validate, four to test. `fetch` are lines of text, `FOLDER` standing for `data.path`.
    """

    name: str
    title: str
    channels: int | None
    file: str | None = None
    hub: str | None = None
    month: int | None = None
    fetch: tuple[str, ...] = ()


_BUNDLE, _INSIDE = "AutonLab/Timeseries-PILE", "forecasting/autoformer"
HOURS, QUARTERS = 30 * 24, 30 * 24 * 4  # in a month


def _ett(name: str, month: int) -> SeriesSpec:
    """One of the four series of Zhou et al. 2020, arXiv:2012.07436: two transformers, by the hour or the quarter."""
    file = f"{name[:3].upper()}{name[3:]}.csv"
    step = "hour" if month == HOURS else "15 minutes"
    return SeriesSpec(
        name,
        f"oil temperature and six loads of an electricity transformer, every {step}; 12, 4 and 4 months",
        7,
        file,
        f"{_BUNDLE}:{_INSIDE}/{file}",
        month,
        (f"hf download {_BUNDLE} {_INSIDE}/{file} --repo-type dataset --local-dir FOLDER",),
    )


SPECS: dict[str, SeriesSpec] = {
    spec.name: spec
    for spec in (
        _ett("etth1", HOURS),
        _ett("etth2", HOURS),
        _ett("ettm1", QUARTERS),
        _ett("ettm2", QUARTERS),
        SeriesSpec(
            "eeg",
            "ten seconds of brain waves at four places of the scalp, 800 rows, from matplotlib's sample data",
            4,
            fetch=("nothing to fetch: it comes with matplotlib",),
        ),
        SeriesSpec(
            "series-csv",
            "your own series: a header, a row a step, a column a channel, and dates or none",
            None,
            fetch=("or name a file of a data set of the hub: source: ORG/NAME[@revision]:FILE",),
        ),
    )
}
