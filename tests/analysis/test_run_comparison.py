"""Comparing runs: seeds together, groups named by what differs, the right means, tables for a README."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from run_folders import written_run

from ortho_cli.analysis.comparison_report import comparison_report, curve_table, final_table, markdown
from ortho_cli.analysis.run_comparison import compare_runs
from ortho_cli.analysis.run_folder import Run, open_run
from ortho_cli.analysis.run_groups import group_runs, value_text
from ortho_cli.analysis.table import Spread
from ortho_cli.errors import UsageError

GOR = "methods=[{name: gor, targets: linear, groups: 4, penalty: PENALTY}]"


def run(folder: Path, accuracy: list[float], *sets: str, finished: bool = True) -> Run:
    points = list(enumerate(accuracy, 1))
    return open_run(written_run(folder, {"eval/accuracy": points, "train/loss": points}, *sets, finished=finished))


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Two penalties and none, three, two and one seeds."""
    made = []
    for name, sets, count in (
        ("weak", [GOR.replace("PENALTY", "1e-5")], 3), ("strong", [GOR.replace("PENALTY", "1e-2")], 2), ("plain", [], 1)
    ):  # fmt: skip
        for seed in range(count):
            values = [0.1 * (seed + 1), 0.5 + 0.1 * seed, 0.4 + 0.1 * seed]
            made.append(run(tmp_path / name / f"seed={seed}", values, *sets, f"train.seed={seed}"))
    return made


def test_seeds_are_one_group_and_what_differs_names_it(runs: list[Run]) -> None:
    groups = group_runs(runs)
    assert [group.label for group in groups] == ["gor, penalty=1e-5", "gor, penalty=0.01", "plain"]
    assert [group.seeds for group in groups] == [(0, 1, 2), (0, 1), (0,)]
    assert groups[0].values == {"methods": "gor", "methods.gor.penalty": 1e-5}
    assert [group.label for group in group_runs(runs[:3])] == ["weak"]  # nothing differs: the matrix's folder
    assert [group.label for group in group_runs(runs[5:])] == ["plain"]


def test_labels_are_short_and_never_alike(tmp_path: Path) -> None:
    sets = (GOR.replace("PENALTY", "0.0"), GOR.replace("PENALTY", "1e-5"), "optimizer.lr=1e-3")
    made = [run(tmp_path / f"run{place}-{seed}", [0.5], text, f"train.seed={seed}")
            for place, text in enumerate(sets) for seed in (0, 1)]  # fmt: skip
    labels = [group.label for group in group_runs(made)]
    assert labels == ["gor, lr=0.01, penalty=0", "gor, lr=0.01, penalty=1e-5", "plain, lr=0.001"]
    patterns = "[" + ", ".join(f"layer{place}" for place in range(9)) + "]"
    long = run(tmp_path / "long", [0.5], f"methods=[{{name: gor, targets: {patterns}, penalty: 1e-5}}]")
    assert [group.label for group in group_runs([*made, long])] == ["run0", "run1", "run2", "long"]


def test_what_only_watches_is_in_no_label(tmp_path: Path) -> None:
    watch, slow = "{name: track_conditioning, targets: [layers.0]}", "{name: olr, targets: [layers.0]}"
    nog = "{name: nog, targets: [layers.0]}"
    methods = {"watched": [watch], "nog": [watch, nog], "both": [nog, watch, slow]}
    made = [run(tmp_path / name, [0.5], f"methods=[{', '.join(each)}]") for name, each in methods.items()]
    assert [group.label for group in group_runs(made)] == ["plain", "nog", "nog, olr"]
    bare = run(tmp_path / "bare", [0.5])
    assert len({group.label for group in group_runs([made[0], bare])}) == 2  # where it is all that differs, it is told


def test_grouping_by_a_key_puts_all_else_together(runs: list[Run]) -> None:
    groups = group_runs(runs, ["methods"])
    assert [(group.label, len(group.runs)) for group in groups] == [("gor", 5), ("plain", 1)]
    by_seed = group_runs(runs, ["train.seed"])
    assert [group.label for group in by_seed] == ["seed=0", "seed=1", "seed=2"]
    with pytest.raises(UsageError) as caught:
        group_runs(runs, ["gor.penalty"])
    assert "did you mean methods.gor.penalty?" in str(caught.value.hint)


def test_what_does_not_change_a_run_makes_no_group(tmp_path: Path) -> None:
    first = run(tmp_path / "a", [0.5])
    same = run(tmp_path / "b", [0.6], "run.log_every=7", "data.workers=1", "train.seed=9")
    other = run(tmp_path / "c", [0.7], "train.clip=1.0")
    groups = group_runs([first, same, other])
    assert [len(group.runs) for group in groups] == [2, 1]
    assert [group.label for group in groups] == ["clip=null", "clip=1"]


def test_means_and_deviations(runs: list[Run]) -> None:
    comparison = compare_runs(runs)
    assert comparison.metrics == ["eval/accuracy", "train/loss"]
    weak = comparison.groups[0]
    finals, bests = [0.4, 0.5, 0.6], [0.5, 0.6, 0.7]
    final, best, loss = weak.final("eval/accuracy"), weak.best("eval/accuracy"), weak.best("train/loss")
    assert final is not None and best is not None and loss is not None
    assert (final.mean, final.sd) == (pytest.approx(np.mean(finals)), pytest.approx(np.std(finals, ddof=1)))
    assert best.mean == pytest.approx(np.mean(bests))
    assert loss.mean == pytest.approx(0.2)  # of a loss, the least is the best
    assert comparison.groups[2].final("eval/accuracy").sd is None  # type: ignore[union-attr]
    rows = [row for row in curve_table(comparison).rows if row[:2] == ("gor, penalty=1e-5", "eval/accuracy")]
    assert [row[2] for row in rows] == [1, 2, 3] and rows[0][3] == pytest.approx(0.2)
    assert rows[0][4] == pytest.approx(0.1) and rows[0][5] == 3


def test_a_value_that_is_not_finite_is_not_averaged_away(tmp_path: Path) -> None:
    made = [
        run(tmp_path / f"seed={seed}", [0.5, value], f"train.seed={seed}") for seed, value in ((0, 0.5), (1, math.nan))
    ]
    comparison = compare_runs(made)
    final = comparison.groups[0].final("eval/accuracy")
    assert final is not None and math.isnan(final.mean)
    assert "nan" in markdown(comparison)
    report = comparison_report(comparison)
    assert report.data is not None
    assert report.data["details"][0]["metrics"]["eval/accuracy"]["final"]["mean"] is None
    assert "nan" not in str(report.files(["json"]))
    report.html()


def test_the_table_for_a_readme(runs: list[Run]) -> None:
    lines = markdown(compare_runs(runs, command="ortho analyze runs weak strong plain -o comparison")).splitlines()
    assert lines[0].startswith("| group | n | accuracy (%) | best accuracy (%) | train loss |")
    assert lines[2] == "| gor, penalty=1e-5 | 3 | 50.00 ± 10.00 | 60.00 ± 10.00 | 0.500 ± 0.100 | 100 |"
    assert lines[4].startswith("| plain | 1 | 40.00 | 50.00 |")
    assert "(seeds 0, 1, 2)" in lines[6]
    assert lines[-3:] == ["```bash", "ortho analyze runs weak strong plain -o comparison", "```"]


def test_the_differences_hold_only_the_keys_that_differ(runs: list[Run]) -> None:
    report = comparison_report(compare_runs(runs))
    tables = {part.name: part for part in report.parts() if hasattr(part, "rows") and hasattr(part, "headers")}
    assert tables["differences"].headers == ("group", "methods", "methods.gor.penalty")
    assert tables["differences"].rows[2] == ("plain", "none", None)
    assert tables["runs"].rows[0][0] == "weak/seed=0"
    merged = comparison_report(compare_runs(runs, by=["methods"]))
    differing = next(part for part in merged.parts() if getattr(part, "name", "") == "differences")
    assert differing.rows[0] == ("gor", "gor", "1e-5, 0.01")  # type: ignore[union-attr]
    figures = {part.name: part for part in report.parts() if hasattr(part, "note") and not hasattr(part, "rows")}
    band = figures["eval-accuracy"].lines[0]  # type: ignore[union-attr]
    assert band.low[0] == pytest.approx(0.1) and band.high[0] == pytest.approx(0.3)
    assert figures["eval-accuracy"].lines[2].low is None  # type: ignore[union-attr]


def test_metrics_are_chosen_by_name_or_pattern(runs: list[Run]) -> None:
    assert compare_runs(runs, metrics=["train/*"]).metrics == ["train/loss"]
    with pytest.raises(UsageError, match="--metric accuracy: no run has it") as caught:
        compare_runs(runs, metrics=["accuracy"])
    assert caught.value.hint == "one of eval/accuracy"


def test_what_a_reader_should_know_is_said(tmp_path: Path) -> None:
    notes = compare_runs([
        run(tmp_path / "a", [0.5, 0.6]), run(tmp_path / "b", [0.5], finished=False),
        open_run(written_run(tmp_path / "c", {"train/loss": [(1, 1.0)]}, "train.seed=1")),
    ]).notes  # fmt: skip
    text = "\n".join(notes)
    for told in (
        "b is not finished",
        "the same seed 0",
        "eval/accuracy is missing from c",
        "end at different steps (1, 2)",
    ):
        assert told in text, told


def test_numbers_have_one_format_a_column(runs: list[Run]) -> None:
    cells = [cell for row in final_table(compare_runs(runs)).rows for cell in row if isinstance(cell, Spread)]
    assert {cell.number_format for cell in cells} == {".2f", ".3f"}


@pytest.mark.parametrize(("value", "text"), [(1e-05, "1e-5"), (1.0, "1"), ("/data/x", "x"), ({"a": 1}, "{'a': 1}")])
def test_values_in_few_characters(value: object, text: str) -> None:
    assert value_text(value) == text
