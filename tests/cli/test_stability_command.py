"""`ortho analyze stability` and its benchmarks as a user meets them: folders, tables, limits, refusals."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ortho_cli.analysis.stability_change import COLUMNS
from ortho_cli.cli.app import app
from ortho_cli.cli.series_stopwatch import OURS, PLAIN, measure_series_commands
from ortho_cli.methods.polar_benchmark import measure_polar

runner = CliRunner()
Save = Callable[..., Path]


def ortho(*words: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def series(tmp_path: Path, save: Save) -> Path:
    generator = torch.Generator().manual_seed(0)
    weights = {f"blocks.{n}.fc.weight": torch.randn(12, 8, generator=generator) for n in range(12)}
    for step in range(4):
        save(tmp_path / "series" / f"step-{step}.safetensors", weights)
        weights = {n: w + torch.randn(12, 8, generator=generator) / (1 + 10 * step) for n, w in weights.items()}
    return tmp_path / "series"


def test_the_report_folder(series: Path, tmp_path: Path, own_cache: Path) -> None:
    folder = tmp_path / "report"
    code, out, err = ortho("analyze", "stability", series, "-o", folder, "--lag", 1, "--lag", 2)
    assert code == 0 and err == ""
    assert {path.name for path in folder.iterdir()} == {
        "stability.html", "stability.csv", "stability.json", "advice.csv", "figures",
    }  # fmt: skip
    pictures = {path.name for path in (folder / "figures").iterdir()}
    assert {
        "stability.png",
        "stability.svg",
        "mixing.png",
        "layers.svg",
        "means.png",
        "stability-lag-2.png",
    } <= pictures
    with (folder / "stability.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 12 * (3 + 2)
    assert json.loads((folder / "stability.json").read_text("utf-8"))["layers"] == 12
    lines = out.splitlines()
    assert lines[0] == "the 10 of 12 layers with the lowest stability (all with -v)" and lines[-1].startswith("wrote ")
    assert (own_cache / "ortho" / "stability.sqlite").is_file()
    page = (folder / "stability.html").read_text("utf-8")
    assert str(tmp_path) not in page and 'http-equiv="Content-Security-Policy"' in page
    assert ortho("analyze", "stability", series, "-o", folder)[0] == 6
    assert ortho("analyze", "stability", series, "-o", folder, "--force", "-q")[:2] == (0, "")


def test_json_is_one_object(series: Path, tmp_path: Path) -> None:
    code, out, _ = ortho(
        "analyze", "stability", series, "-o", tmp_path / "r", "--json", "--format", "csv", "--no-cache"
    )
    found = json.loads(out)
    assert code == 0 and found["ok"] and found["command"].startswith("ortho analyze stability series")
    assert [Path(item["path"]).name for item in found["outputs"]] == ["advice.csv", "stability.csv"]
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_reads_headers_alone(series: Path, tmp_path: Path) -> None:
    code, out, _ = ortho("analyze", "stability", series, "-o", tmp_path / "r", "-n")
    assert code == 0 and not (tmp_path / "r").exists() and not (tmp_path / "cache").exists()
    assert "step-3.safetensors" in out and "18.43 kB" in out
    plan = json.loads(ortho("analyze", "stability", series, "-o", tmp_path / "r", "-n", "--json")[1])
    assert (plan["layers"], plan["comparisons"], plan["bytes_read"]) == (12, 3, 4 * 12 * 12 * 8 * 4)


def test_limits_come_after_the_report(series: Path, tmp_path: Path) -> None:
    words = ("analyze", "stability", series, "--format", "csv", "-q")
    code, _, err = ortho(*words, "-o", tmp_path / "a", "--fail-below", 1.0)
    assert (
        code == 5 and "stability is below 1 in 12 of 12 layers" in err and (tmp_path / "a" / "stability.csv").is_file()
    )
    assert ortho(*words, "-o", tmp_path / "b", "--fail-below", 0.1, "--fail-above", 1.1)[0] == 0
    code, out, _ = ortho(*words, "-o", tmp_path / "c", "--fail-above", 0.1, "--json")
    assert code == 5 and json.loads(out)["error"]["exit_code"] == 5


def test_a_limit_holds_for_layers_that_end_early(tmp_path: Path, save: Save) -> None:
    """The last row of each layer counts, not the layers of the last checkpoint."""
    kept, moved = torch.eye(4), torch.eye(4).flip(0).contiguous()
    for step in range(3):
        early = {"early.weight": (kept.clone(), moved)[step]} if step < 2 else {}
        save(tmp_path / f"s/step{step}.safetensors", {"fc.weight": kept, **early})
    words = ("analyze", "stability", tmp_path / "s", "--format", "csv", "--no-cache", "-o", tmp_path / "r")
    code, _, err = ortho(*words, "--fail-below", 0.5)
    assert code == 5 and "stability is below 0.5 in 1 of 2 layers: early (0)" in err
    assert "early is measured where found: not in all 3 checkpoints" in ortho(*words, "--force")[1]


def test_a_table_makes_the_same_report(series: Path, tmp_path: Path) -> None:
    assert ortho("analyze", "stability", series, "-o", tmp_path / "a", "-q")[0] == 0
    code, out, _ = ortho("analyze", "stability", tmp_path / "a" / "stability.csv", "-o", tmp_path / "b", "-v")
    assert code == 0 and "blocks.11.fc" in out
    assert (tmp_path / "a" / "stability.csv").read_text() == (tmp_path / "b" / "stability.csv").read_text()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--lag", "9"], 2, "has lags from 1 to 3"),
        (["--targets", "nothing"], 4, "matched 0 of 12 layers"),
        (["--format", "gif"], 2, "gif"),
        (["--split-heads", "4"], 4, "none of 12 layers is known as attention"),
        (["--threshold", "2"], 2, "--threshold 2"),
        (["--cache", "/dev/null/x"], 6, "results cannot be kept"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_refusals(series: Path, tmp_path: Path, words: list[str], code: int, message: str) -> None:
    found, _, err = ortho("analyze", "stability", series, "-o", tmp_path / "r", *words)
    assert found == code and message in err and not (tmp_path / "r").exists()


def test_routes_to_the_polar_factor_are_timed() -> None:
    found = list(measure_polar([(24, 16)], condition=10.0, rounds=2))
    assert [len(each.seconds) for each in found] == [2] * 4
    assert all(each.error < 1e-5 for each in found)
    assert found[0].speedup == 1.0 and found[2].speedup == pytest.approx(found[0].median / found[2].median)
    code, out, _ = ortho("bench", "polar", "--shapes", "16x8", "--rounds", 1, "--json")
    assert code == 0 and [each["name"] for each in json.loads(out)["details"]][1:] == ["svd", "gram", "polar-express"]
    for wrong in ("16", "16x", "0x3", "1x2x3"):
        assert ortho("bench", "polar", "--shapes", wrong)[0] == 2


def test_both_ways_to_a_series_agree(tmp_path: Path) -> None:
    found = measure_series_commands(checkpoints=3, blocks=1, width=16, folder=tmp_path)
    names = [timing.name for timing in found.timings]
    assert names[0] == PLAIN and names[-1] == OURS and found.largest_difference < 1e-5
    assert list(tmp_path.iterdir()) == []
