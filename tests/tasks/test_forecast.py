"""The forecasting task: windows, parts and standardisation as the field has them, errors exact however shared out."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.data import Series as SeriesConfig
from ortho_cli.recipe.models import Forecaster
from ortho_cli.recipe.tasks import Forecast
from ortho_cli.tasks.data_check import check_data, describe_data, found_text
from ortho_cli.tasks.forecast import ForecastTask
from ortho_cli.tasks.series_data import load_series, part_ranges
from ortho_cli.tasks.series_files import read_eeg
from ortho_cli.tasks.series_specs import SPECS


def section(name: str = "eeg", **settings: Any) -> SeriesConfig:
    return SeriesConfig.model_validate({"name": name, **settings})


def task(input: int = 16, horizon: int = 8, seed: int = 0, **data: Any) -> ForecastTask:
    config = Forecast.model_validate({"name": "forecast", "input": input, "horizon": horizon})
    return ForecastTask(config, section(**data), seed=seed)


def model(made: ForecastTask) -> nn.Module:
    torch.manual_seed(0)
    return made.build_model(
        Forecaster.model_validate({"name": "forecaster", "patch": 4, "depth": 1, "heads": 2, "dim": 8})
    )


def counting(folder: Path, rows: int, columns: tuple[str, ...] = ("a", "b")) -> str:
    """A series whose values are their own row numbers, with a sign a column."""
    path = folder / "counting.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([[row * (-1) ** place for place in range(len(columns))] for row in range(rows)])
    return str(path)


def test_values_are_standardised_by_the_training_part() -> None:
    series = load_series(section())
    raw = read_eeg().values
    expected = StandardScaler().fit(raw[:480]).transform(raw)
    np.testing.assert_allclose(series.values.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert series.parts == {"train": (0, 480), "val": (480, 640), "test": (640, 800)}
    torch.testing.assert_close(
        series.values.double() * series.std + series.mean, torch.from_numpy(raw), atol=1e-6, rtol=0
    )


def test_a_channel_that_stands_still_is_shifted(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("a,b\n" + "".join(f"{row},7\n" for row in range(10)))
    assert load_series(section("series-csv", path=str(tmp_path / "s.csv"))).values[:, 1].tolist() == [0.0] * 10


def test_months_of_ett_and_shares_of_others() -> None:
    minutes = {"train": (0, 34_560), "val": (34_560, 46_080), "test": (46_080, 57_600)}
    assert part_ranges(69_680, SPECS["ettm2"]) == minutes
    assert part_ranges(100, SPECS["ettm2"], (0.7, 0.1)) == {"train": (0, 70), "val": (70, 80), "test": (80, 100)}
    with pytest.raises(RecipeError, match="ettm2: 57,599 rows, expected 57,600 or more") as caught:
        part_ranges(57_599, SPECS["ettm2"])
    assert caught.value.hint == "for a part of it, give data.shares"


@pytest.mark.parametrize(("judge", "first", "last"), [("val", 60, 80), ("test", 80, 100)])
def test_windows_cover_their_part_and_no_other(tmp_path: Path, judge: str, first: int, last: int) -> None:
    made = task(input=10, horizon=4, name="series-csv", path=counting(tmp_path, 100), judge=judge)
    series = made.series

    def rows(values: Tensor) -> Tensor:  # of (B, steps, C) values, the row numbers they stand for
        return (values[..., 0].double() * series.std[0] + series.mean[0]).round().long()

    for split, begin, end in (("train", 0, 60), ("eval", first - 10, last)):
        whole = made.dataset(split).fetch(0, torch.arange(made.size(split)))  # type: ignore[arg-type]
        seen, coming = rows(whole["input"]), rows(whole["target"])
        expected = torch.arange(begin, end - 14 + 1)[:, None] + torch.arange(14)
        assert torch.equal(torch.cat([seen, coming], dim=1), expected)
        assert torch.equal(whole["input"][..., 1], -whole["input"][..., 0])
    assert set(
        rows(made.dataset("eval").fetch(0, torch.arange(made.size("eval")))["target"]).flatten().tolist()
    ) == set(range(first, last))


def test_field_standard_counts_of_windows(tmp_path: Path) -> None:
    """34,273, 11,329 and 11,329 windows of 96 + 192 steps on ETTm2: those of Autoformer's loader."""
    columns = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
    Path(counting(tmp_path, 57_600, columns)).rename(tmp_path / "ETTm2.csv")
    for judge in ("val", "test"):
        made = task(96, 192, name="ettm2", path=str(tmp_path), judge=judge)
        assert (made.size("train"), made.size("eval")) == (34_273, 11_329)
    assert made.steps_per_epoch == 34_273 // 32
    assert task(name="ettm2", path=str(tmp_path / "ETTm2.csv"), columns=("OT",)).series.columns == ("OT",)
    (tmp_path / "forecasting/autoformer").mkdir(parents=True)
    (tmp_path / "ETTm2.csv").rename(tmp_path / "forecasting/autoformer/ETTm2.csv")  # where hf download puts it
    assert load_series(section("ettm2", path=str(tmp_path))).columns == columns


def test_a_part_shorter_than_a_window() -> None:
    with pytest.raises(
        RecipeError, match="the part test has 160 rows, which hold no window of 16 seen and 161"
    ) as caught:
        task(16, 161).size("eval")
    assert "task.horizon" in str(caught.value.hint)
    assert task(16, 160).size("eval") == 1


def test_a_task_knows_its_sizes_without_opening_data() -> None:
    made = task(name="ettm2", path="nowhere")
    with torch.device("meta"):
        built = made.build_model(Forecaster.model_validate({"name": "forecaster"}))
    assert built.get_parameter("trend.weight").shape == (8, 16)
    example = made.example(3)
    assert example is not None
    assert (example["input"].shape, example["target"].shape) == ((3, 16, 7), (3, 8, 7))
    assert task(name="series-csv", path="nowhere").example(3) is None
    only = task(name="series-csv", path="nowhere", columns=("a",)).example(3)
    assert only is not None and only["input"].shape == (3, 16, 1)


def test_the_loss_is_the_mean_squared_error() -> None:
    made = task()
    net, batch = model(made), next(iter(made.batches("train", 0, batch=8)))
    loss, forecast, named = made.loss(net, batch, "train")
    wrong = net(batch["input"]) - batch["target"]
    torch.testing.assert_close(forecast, net(batch["input"]))
    torch.testing.assert_close(loss, wrong.square().mean())
    torch.testing.assert_close(named["mae"], wrong.abs().mean().detach())
    assert loss.requires_grad and not named["mae"].requires_grad


def test_errors_are_means_however_the_part_is_shared_out() -> None:
    made = task()
    net = model(made).train()
    whole = made.dataset("eval").fetch(0, torch.arange(made.size("eval")))
    with torch.no_grad():
        wrong = (net(whole["input"]) - whole["target"]).double()
    expected = {"mse": float(wrong.square().mean()), "mae": float(wrong.abs().mean())}
    assert made.evaluate(net, made.batches("eval", 0, batch=7)) == pytest.approx(expected, rel=1e-6)
    assert net.training
    handed: list[Tensor] = []

    def collect(sums: Tensor) -> Tensor:
        handed.append(sums)
        return sums

    for rank in range(3):
        made.evaluate(net, made.batches("eval", 0, batch=50, rank=rank, world=3), collect)
    total = torch.stack(handed).sum(0)
    shared = made.evaluate(net, made.batches("eval", 0, batch=50), lambda _: total)
    assert shared == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="no batches"):
        made.evaluate(net, [])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_are_one_process(world: int) -> None:
    made = task()
    alone = next(iter(made.batches("train", 1, batch=16)))
    parts = [next(iter(task().batches("train", 1, batch=16, rank=rank, world=world))) for rank in range(world)]
    for name in ("input", "target", "index"):
        assert torch.equal(torch.cat([part[name] for part in parts]), alone[name])


def test_it_learns_what_a_mean_cannot_tell() -> None:
    made = task(input=32, horizon=4)
    net = model(made)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for epoch in range(8):
        for batch in made.batches("train", epoch, batch=32):
            optimizer.zero_grad()
            made.loss(net, batch, "train")[0].backward()
            optimizer.step()
    target = made.dataset("eval").fetch(0, torch.arange(made.size("eval")))["target"]
    found = made.evaluate(net, made.batches("eval", 0, batch=64))
    assert found["mse"] < 0.8 * float(target.square().mean())


@pytest.mark.parametrize("name", list(SPECS))
def test_every_series_says_how_to_get_it(name: str) -> None:
    text = describe_data(section(name, **({"path": "here.csv"} if name == "series-csv" else {})))
    assert text.startswith(f"{name}: {SPECS[name].title}")
    assert all(line in text for line in SPECS[name].fetch)
    assert ("read from: the hub, AutonLab/Timeseries-PILE" in text) == name.startswith("ett")


def test_what_is_there_is_counted() -> None:
    one = section(columns=("b",))
    found = check_data(one)
    assert found == {"name": "eeg", "columns": ["b"], "train": 480, "val": 160, "test": 160}
    assert found_text(one, found) == "found: 1 columns (b); 480 rows to train on, 160 to validate, 160 to test"


def test_the_hubs_copy_is_found_in_its_cache(tmp_path: Path, hub_home: Path) -> None:
    copy, revision = hub_home / "datasets--AutonLab--Timeseries-PILE", "0" * 40
    inside = copy / "snapshots" / revision / "forecasting/autoformer"
    inside.mkdir(parents=True)
    (copy / "refs").mkdir()
    (copy / "refs/main").write_text(revision)
    Path(counting(tmp_path, 14_400)).rename(inside / "ETTh1.csv")
    found = load_series(section("etth1"))
    assert (found.columns, found.parts["test"]) == (("a", "b"), (11_520, 14_400))
    named = load_series(section("series-csv", source=SPECS["etth1"].hub))
    assert named.parts == {"train": (0, 8640), "val": (8640, 11_520), "test": (11_520, 14_400)}  # 60, 20 and 20 %


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # how torch starts workers, from Python 3.12 on
def test_workers_and_this_process_give_the_same_epoch() -> None:
    here, there = (list(task().batches("train", 1, batch=64, workers=workers)) for workers in (0, 2))
    assert all(torch.equal(a["input"], b["input"]) for a, b in zip(here, there, strict=True))


def test_a_series_that_is_not_here_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"data\.path: there is no file '.*ETTm2\.csv'") as caught:
        load_series(section("ettm2", path=str(tmp_path)))
    assert "hf download AutonLab/Timeseries-PILE forecasting/autoformer/ETTm2.csv" in str(caught.value.hint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match=r"data ettm2: .* is not in the hub cache") as caught:
        load_series(section("ettm2"))
    assert "hf download" in str(caught.value.hint)
    with pytest.raises(RecipeError, match=r"data\.source: expected ORG/NAME"):
        load_series(section("ettm2", source="org/name"))
