"""Stability over a series against the paper's form; lags, references, pieces, the cache, advice, and its pictures."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ortho_cli.analysis import stability as module
from ortho_cli.analysis.attention_pieces import AttentionPieces
from ortho_cli.analysis.matplotlib_figure import draw
from ortho_cli.analysis.plotly_figure import to_plotly
from ortho_cli.analysis.stability import plan_pairs
from ortho_cli.analysis.stability_advice import advice_text, advise
from ortho_cli.analysis.stability_change import COLUMNS, Change
from ortho_cli.analysis.stability_figures import change_map, role
from ortho_cli.analysis.stability_plan import plan_stability
from ortho_cli.analysis.stability_report import by_lag, read_changes, stability_report
from ortho_cli.checkpoints.series_layers import SeriesLayer
from ortho_cli.errors import CheckpointError, NumericsError, TargetError, UsageError
from ortho_cli.methods.track_stability import COLUMNS as TRACKED

Save = Callable[..., Path]
DATA = Path(__file__).parents[1] / "data"
# Mean stability of the paper's ViT-B/16 run, read from the path of its line; epochs 5, 10, ..., 100.
PAPER = (
    0.8668, 0.7553, 0.7776, 0.8233, 0.8546, 0.8782, 0.8969, 0.9119, 0.9246, 0.9362, 0.9462, 0.9551, 0.9632, 0.9706,
    0.9769, 0.9825, 0.9873, 0.9911, 0.9942, 0.9964,
)  # fmt: skip
CLIPPED = 0.8


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moving(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Weights that move less and less: tall, wide, square, a convolution."""
    weights = {
        "conv1.weight": gaussian(6, 3, 3, 3), "blocks.0.attn.qkv.weight": gaussian(24, 8),
        "blocks.0.attn.proj.weight": gaussian(8, 8), "blocks.0.mlp.fc2.weight": gaussian(8, 20),
    }  # fmt: skip
    found = []
    for step in range(count):
        found.append({name: weight.to(dtype) for name, weight in weights.items()})
        moved = enumerate(weights.items(), 100 * step + 1)
        weights = {name: weight + gaussian(*weight.shape, seed=seed) / (2 + step) for seed, (name, weight) in moved}
    return found


@pytest.fixture
def series(tmp_path: Path, save: Save) -> Path:
    for step, tensors in enumerate(moving(5)):
        save(tmp_path / "series" / f"step-{10 * step}.safetensors", tensors)
    return tmp_path / "series"


def plain(previous: Tensor, current: Tensor) -> float:
    """The notebook's form, in float64."""
    factors = []
    for weight in (previous, current):
        flat = weight.double().reshape(weight.shape[0], -1)
        left, _, right = torch.linalg.svd(flat if flat.shape[0] >= flat.shape[1] else flat.mT, full_matrices=False)
        factors.append(left @ right)
    return float((factors[0].mT @ factors[1]).diagonal().mean())


def test_every_pair_is_what_two_decompositions_say(series: Path) -> None:
    found = plan_stability([str(series)]).measure()
    weights = moving(5)
    assert len(found) == 4 * 4
    assert next(iter(dict.fromkeys(change.layer for change in found))) == "conv1"
    for change in found:
        before, now = weights[change.step // 10 - 1], weights[change.step // 10]
        pair = [step[f"{change.layer}.weight"] for step in (before, now)]
        assert (change.reference_step, change.lag) == (change.step - 10, 1)
        assert change.stability == pytest.approx(plain(*pair), abs=1e-6)
        values = torch.linalg.svdvals(pair[1].double().reshape(len(pair[1]), -1))
        assert change.sigma_max == pytest.approx(float(values[0]), rel=1e-5)
        assert change.sigma_min == pytest.approx(float(values[-1]), rel=1e-5)
        assert (change.rows, change.cols) == tuple(sorted(pair[1].reshape(len(pair[1]), -1).shape, reverse=True))


def test_lags_share_one_pass(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each checkpoint of each layer is decomposed once, whatever it is compared with."""
    made = []
    own = module.basis
    monkeypatch.setattr(module, "basis", lambda weight, **how: made.append(weight.shape) or own(weight, **how))
    together = plan_stability([str(series)], lags=[1, 3]).measure()
    assert len(made) == 4 * 5
    apart = [change for lag in (1, 3) for change in plan_stability([str(series)], lags=[lag]).measure()]
    assert sorted(map(str, together)) == sorted(map(str, apart))
    made.clear()
    last = plan_stability([str(series)], reference="last").measure()
    assert len(made) == 4 * 5 and {change.reference_step for change in last} == {40}
    assert {(change.step, change.lag) for change in last} == {(0, -4), (10, -3), (20, -2), (30, -1)}


def test_workers_change_nothing(series: Path) -> None:
    plan = plan_stability([str(series)], top_rank=3)
    assert plan.measure(workers=3) == plan.measure(workers=1)


def test_a_reference_beside_the_series(series: Path, tmp_path: Path, save: Save) -> None:
    beside = save(tmp_path / "pretrained.safetensors", moving(1)[0])
    found = plan_stability([str(series)], reference=str(beside)).measure()
    told = [part for _, parts in stability_report(found, name="x", command="x").sections for part in parts]
    assert any(isinstance(part, str) and part.startswith("All were compared with one checkpoint") for part in told)
    assert list(by_lag(found)) == ["against a reference"]
    assert {(change.step, change.reference_step, change.lag) for change in found} == {
        (step, None, None) for step in (0, 10, 20, 30, 40)
    }  # fmt: skip
    assert all(change.stability == pytest.approx(1.0, abs=1e-6) for change in found if change.step == 0)
    first = plan_stability([str(series)], reference="first").measure()
    assert list(by_lag(first)) == ["against step 0"]
    assert [change.stability for change in first] == [change.stability for change in found if change.step]


def test_half_precision(tmp_path: Path, save: Save) -> None:
    for step, tensors in enumerate(moving(3, torch.float16)):
        save(tmp_path / f"step{step}.safetensors", tensors)
    exact = moving(3)
    for change in plan_stability([str(tmp_path)]).measure():
        pair = [exact[change.step - lag][f"{change.layer}.weight"] for lag in (1, 0)]
        assert change.stability == pytest.approx(plain(*pair), abs=2e-3)


def test_a_dead_channel_is_flagged_and_settled(tmp_path: Path, save: Save) -> None:
    for step in range(3):
        weight = gaussian(12, 6)
        weight[:, 4] = 0
        noise = torch.zeros(12, 6)
        noise[:, 4] = 1e-7 * gaussian(12, seed=step + 5)
        save(tmp_path / f"step{step}.safetensors", {"fc.weight": weight + noise, "ok.weight": gaussian(5, 4)})
    found = plan_stability([str(tmp_path)]).measure()
    dead = [change for change in found if change.layer == "fc"]
    assert all(change.stability == pytest.approx(1.0, abs=1e-5) and not change.is_resolved for change in dead)
    advice = {each.layer: each for each in advise(found)}
    assert (advice["fc"].settled_at, advice["fc"].resolved, advice["ok"].resolved) == (2, False, True)
    assert "1 layer (fc) did not have full rank" in advice_text(list(advice.values()), 0.95, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_rank_in_half_precision_is_flagged_and_settled(dtype: torch.dtype, tmp_path: Path, save: Save) -> None:
    """The rounding of a half type gives every direction a singular value: it is no basis, and moves at random."""
    low = gaussian(96, 6) @ gaussian(6, 40, seed=1)
    for step in range(2):
        weight = (low + 0.01 * step * low @ gaussian(40, 40, seed=2) / 40**0.5).to(dtype)
        save(tmp_path / f"step{step}.safetensors", {"fc.weight": weight, "ok.weight": gaussian(30, 8).to(dtype)})
    found = {change.layer: change for change in plan_stability([str(tmp_path)]).measure()}
    assert found["fc"].stability > 0.999 and found["ok"].is_resolved
    assert (found["fc"].rank, found["fc"].reference_rank, found["fc"].is_resolved) == (6, 6, False)


@pytest.mark.parametrize("reference", [None, "last"])
def test_the_reference_without_full_rank_is_flagged(reference: str | None, tmp_path: Path, save: Save) -> None:
    for step, weight in enumerate((torch.zeros(9, 4), gaussian(9, 4))):
        save(tmp_path / f"step{step}.safetensors", {"fc.weight": weight})
    (found,) = plan_stability([str(tmp_path)], reference=reference).measure()
    assert {found.rank, found.reference_rank} == {0, 4}
    assert (found.stability, found.is_resolved) == (0.0, False)
    assert not advise([found])[0].resolved


def test_layers_that_some_checkpoints_lack_are_named(tmp_path: Path, save: Save) -> None:
    always = {"fc.weight": gaussian(5, 4)}
    for step, more in enumerate(({"old.weight": 1}, {"old.weight": 1}, {"new.weight": 1})):
        save(tmp_path / f"step{step}.safetensors", {**always, **{name: gaussian(4, 4) for name in more}})
    plan = plan_stability([str(tmp_path)])
    assert plan.notes == (
        "new is not measured: in no two checkpoints that are compared",
        "old is measured where found: not in all 3 checkpoints",
    )
    with pytest.raises(TargetError, match="nothing to compare: none of 1 layers is in both"):
        plan_stability([str(tmp_path)], targets=["new"])


def test_a_layer_that_was_factored_on_the_way(tmp_path: Path, save: Save) -> None:
    weight = gaussian(12, 8)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    save(tmp_path / "step1.safetensors", {"fc.weight": weight})
    for step, rank in ((2, 8), (3, 5)):
        parts = {"fc.U": u[:, :rank], "fc.M": torch.diag(s[:rank]), "fc.VT": vt[:rank]}
        save(tmp_path / f"step{step}.safetensors", {name: part.contiguous() for name, part in parts.items()})
    found = plan_stability([str(tmp_path)]).measure()
    assert [change.stability for change in found] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert [change.is_resolved for change in found] == [True, False]


def test_values_that_are_not_finite(tmp_path: Path, save: Save) -> None:
    for step in (1, 2):
        save(tmp_path / f"step{step}.safetensors", {"fc.weight": gaussian(4, 4) / (2 - step)})
    with pytest.raises(NumericsError, match=r"layer fc of step2\.safetensors holds values that are not finite"):
        plan_stability([str(tmp_path)]).measure()


def test_the_cache_goes_on_where_it_was(series: Path, tmp_path: Path, save: Save) -> None:
    def measure(**options: Any) -> tuple[list[Change], int]:
        read: list[int] = []
        found = plan_stability([str(series)], **options).measure(cache=tmp_path / "cache", start=read.append)
        return found, read[0]

    first, whole = measure()
    again, nothing = measure()
    assert again == first and nothing == 0 < whole
    extended, some = measure(lags=[1, 2])
    assert [change for change in extended if change.lag == 1] == first and some == whole
    save(series / "step-50.safetensors", moving(6)[5])
    longer, added = measure()
    assert [change for change in longer if change.step < 50] == first
    assert added == pytest.approx(2 / 5 * whole)  # the new checkpoint, and the one before
    (series / "step-50.safetensors").unlink()
    save(series / "step-0.safetensors", moving(6)[5])
    replaced, changed = measure()
    assert changed == pytest.approx(2 / 5 * whole) and replaced != first
    assert measure(split_qkv=True)[1] == whole  # other options, other results


def test_a_file_replaced_with_its_size_and_time_is_measured_anew(series: Path, tmp_path: Path, save: Save) -> None:
    first = plan_stability([str(series)]).measure(cache=tmp_path / "cache")
    file = series / "step-0.safetensors"
    before = file.stat()
    save(file, moving(6)[5])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    plan = plan_stability([str(series)])
    found = plan.measure(cache=tmp_path / "cache")
    assert found == plan.measure() and found != first
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        plan.measure(cache=tmp_path / "cache")


def test_an_interrupted_run_keeps_its_layers(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    own, done = module.basis, []

    def stopped(weight: Tensor, **how: Any) -> Any:
        done.append(weight.shape)
        if len(done) > 12:
            raise KeyboardInterrupt
        return own(weight, **how)

    monkeypatch.setattr(module, "basis", stopped)
    with pytest.raises(KeyboardInterrupt):
        plan_stability([str(series)]).measure(cache=tmp_path)
    monkeypatch.setattr(module, "basis", own)
    read: list[int] = []
    plan = plan_stability([str(series)])
    assert plan.measure(cache=tmp_path, start=read.append) == plan.measure()
    assert 0 < read[0] < plan.nbytes


def test_shared_keys_alone_are_split_by_the_heads_of_the_query(tmp_path: Path, save: Save) -> None:
    """Four heads of width 2, two of them for keys: with and without the query among the layers, and from the cache."""
    for step in range(2):
        names = {"q_proj": 8, "k_proj": 4}
        weights = {f"a.self_attn.{name}.weight": gaussian(rows, 8, seed=rows + step) for name, rows in names.items()}
        save(tmp_path / "s" / f"step{step}.safetensors", weights)

    def measure(**options: Any) -> list[Change]:
        return plan_stability([str(tmp_path / "s")], split_heads=4, **options).measure(cache=tmp_path / "cache")

    alone = measure(targets=["*.k_proj"])
    assert [(change.layer, change.rows, change.cols) for change in alone] == [
        (f"a.self_attn.k_proj.head{number}", 8, 2) for number in range(2)
    ]
    assert [change for change in measure() if "k_proj" in change.layer] == alone
    pieces = plan_stability([str(tmp_path / "s")], split_heads=4).pieces
    layer = SeriesLayer("a.self_attn.k_proj", "linear", (4, 8), ())
    assert pieces.split(layer) != replace(pieces, shapes={}).split(layer)  # by which the cache tells them apart


def pieces_of(name: str, matrix: Tensor, **options: Any) -> dict[str, Tensor]:
    layer = SeriesLayer(name, "linear", tuple(matrix.shape), ())
    return dict(AttentionPieces(**options)(layer, matrix))


def test_attention_apart() -> None:
    fused = gaussian(24, 8)
    assert list(pieces_of("a.attn.qkv", fused)) == ["a.attn.qkv"]
    thirds = pieces_of("a.attn.qkv", fused, qkv=True)
    assert list(thirds) == ["a.attn.qkv.q", "a.attn.qkv.k", "a.attn.qkv.v"]
    assert torch.equal(torch.cat(list(thirds.values())), fused)
    heads = pieces_of("a.attn.qkv", fused, heads=4)
    assert len(heads) == 12 and torch.equal(heads["a.attn.qkv.k.head1"], fused[10:12])
    out = pieces_of("a.attn.proj", gaussian(8, 8), heads=4)
    assert next(iter(out)) == "a.attn.proj.head0" and torch.equal(out["a.attn.proj.head3"], gaussian(8, 8)[:, 6:])
    assert list(pieces_of("a.mlp.proj", gaussian(8, 8), heads=4)) == ["a.mlp.proj"]
    stored = pieces_of("h.0.attn.c_attn", fused.mT, qkv=True, conv1d=True)
    assert torch.equal(stored["h.0.attn.c_attn.v"], fused[16:])
    shapes = {"a.self_attn.q_proj": (8, 8), "a.self_attn.k_proj": (4, 8)}
    shared = pieces_of("a.self_attn.k_proj", gaussian(4, 8), heads=4, shapes=shapes)
    assert [tuple(piece.shape) for piece in shared.values()] == [(2, 8), (2, 8)]
    apart = pieces_of("a.query_key_value", fused, heads=4)  # head by head: q, k, v, q, k, v, ...
    assert torch.equal(apart["a.query_key_value.k.head1"], fused[8:10])
    with pytest.raises(UsageError, match="head by head"):
        pieces_of("a.query_key_value", fused, qkv=True)
    with pytest.raises(UsageError, match="8 rows do not go into 3 heads"):
        pieces_of("a.attn.qkv", fused, heads=3)
    with pytest.raises(UsageError, match="at least one head"):
        AttentionPieces(heads=0)


def test_split_series_and_its_refusal(series: Path) -> None:
    found = plan_stability([str(series)], split_heads=2).measure()
    names = list(dict.fromkeys(change.layer for change in found))
    assert names.count("blocks.0.attn.qkv.v.head1") == 1 and len(names) == 2 + 6 + 2
    assert role("blocks.0.attn.qkv.v.head1") == "attn.qkv.v"
    with pytest.raises(TargetError, match="--split-qkv: none of 1 layers is known as attention"):
        plan_stability([str(series)], split_qkv=True, targets=["conv1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lags": [5]}, "--lag 5: a series of 5 checkpoints has lags from 1 to 4"),
        ({"lags": [0]}, "--lag 0"),
        ({"lags": [1], "reference": "first"}, "exclude each other"),
    ],
)
def test_refused_comparisons(series: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_stability([str(series)], **options)


def test_a_single_checkpoint_is_no_series(series: Path) -> None:
    with pytest.raises(UsageError, match="at least two checkpoints, found 1"):
        plan_stability([str(series / "step-0.safetensors")])
    with pytest.raises(UsageError, match="--revisions asks for one repository"):
        plan_stability([str(series), str(series)], revisions="*")
    assert plan_pairs(1, reference="beside") == [(0, 1, None)]


def change(layer: str, step: int, stability: float, **values: Any) -> Change:
    made = Change(layer, "linear", step, step - 1, 1, 10, 10, stability, 0.1, 0.5, 1.0, 0.1, 0.9, 0.95, 4, 6)
    return replace(made, **values)


def test_advice() -> None:
    values = {"late": (0.5, 0.9, 0.96, 0.97), "once": (0.96, 0.97, 0.5, 0.97), "never": (0.96, 0.9, 0.96, 0.9)}
    changes = [change(name, step, value) for name, each in values.items() for step, value in enumerate(each, 1)]
    found = {each.layer: each for each in advise(changes, threshold=0.95, patience=2)}
    assert [(x.settled_at, x.stays) for x in found.values()] == [(4, True), (2, False), (None, None)]
    assert (found["late"].rank, found["late"].trained, found["late"].stored) == (6, 36, 6 * 26)
    text = advice_text(list(found.values()), 0.95, 2)
    assert "2 of 3 layers have settled" in text and "57% of the 300 parameters" in text
    assert "1 moved again later, first once" in text
    none = advice_text(advise(changes, threshold=0.99), 0.99, 2)
    assert none.startswith("No layer has settled") and "late, with 0.970" in none
    for wrong in ({"threshold": 0.0}, {"threshold": 1.5}, {"patience": 0}):
        with pytest.raises(UsageError):
            advise(changes, **wrong)


def paper_changes() -> list[Change]:
    with (DATA / "oialr_vit_stability.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        change(row["layer"], int(epoch), float(value), reference_step=int(epoch) - 5)
        for row in rows
        for epoch, value in row.items()
        if epoch != "layer"
    ]


def test_the_papers_figure_from_its_own_cells(tmp_path: Path) -> None:
    """The heatmap of ViT-B/16 on ImageNet, cell by cell, and the line below it, where the cells are not clipped."""
    changes = paper_changes()
    figure = change_map("stability", "Stability", changes, lambda each: each.stability, label="stability")
    assert (len(figure.rows), len(figure.columns)) == (50, 20)
    assert figure.rows[0] == "patch_embed.proj.weight" and figure.rows[-1] == "head.weight"  # the first at the top
    assert (figure.color_limits, figure.line_limits) == ((0.8, 1.0), (0.75, 1.0))
    assert figure.scale_name == "rocket" and figure.ends == ("First layers", "Last layers")
    compared = 0
    for place, (mean, paper) in enumerate(zip(figure.below, PAPER, strict=True)):
        assert mean is not None and mean >= paper - 2e-3
        if all((row[place] or 0) > CLIPPED for row in figure.values):
            compared += 1
            assert mean == pytest.approx(paper, abs=2e-3)
    assert compared >= 12
    for kind in ("png", "svg"):
        draw(figure, tmp_path / f"x.{kind}", kind)
        assert (tmp_path / f"x.{kind}").stat().st_size > 5000
    made = to_plotly(figure)
    heat, line = made["data"]
    assert heat["zmin"] == 0.8 and line["yaxis"] == "y2" and line["y"] == list(figure.below)
    assert "10 x 10" in heat["text"][0][0]


def test_the_report_says_what_was_measured() -> None:
    changes = [replace(each, top_stability=0.9, top_overlap=0.8) for each in paper_changes()]
    other = [replace(each, lag=2, reference_step=each.step - 10) for each in changes if each.step > 5]
    report = stability_report([*changes, *other], name="vit", command="ortho ...", notes=["b is a: measured once"])
    assert [title for title, _ in report.sections] == [
        "Which layers have settled", "Means", "Every layer", "Rank", "With lag 2", "Advice",
    ]  # fmt: skip
    (table,) = report.further
    assert table.headers == (*COLUMNS[:-2], "top_stability", "top_overlap", *COLUMNS[-2:]) and len(table.rows) == 50 * (
        20 + 19
    )
    assert list(by_lag([*changes, *other])) == ["lag 1", "lag 2"]
    page = report.html()
    assert "b is a: measured once" in page and "First layers" in page
    assert report.data is not None and len(report.data["means"]) == 39


def test_columns_are_those_of_the_method_that_tracks() -> None:
    assert COLUMNS == TRACKED


def test_tables_are_read_back(tmp_path: Path) -> None:
    changes = [change("a", 1, 0.5), change("a", 2, 0.75, reference_step=None, lag=None)]
    table = stability_report(changes, name="x", command="x").further[0]
    (tmp_path / "stability.csv").write_text(table.csv(), "utf-8")
    assert read_changes(tmp_path / "stability.csv") == changes
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_changes(tmp_path / "none.csv")
    for content in ("", "layer,step\na,1\n", "layer," + ",".join(COLUMNS[1:]) + "\n" + ",".join("x" * 16) + "\n"):
        (tmp_path / "bad.csv").write_text(content, "utf-8")
        with pytest.raises(CheckpointError, match="table of stability"):
            read_changes(tmp_path / "bad.csv")


def test_only_stability_is_known() -> None:
    """A table without R, H and singular values still makes a report."""
    bare = [replace(each, mixing_similarity=math.nan, r_similarity=math.nan, r_distance=math.nan, rank_99=0, rank_90=0)
            for each in paper_changes()]  # fmt: skip
    report = stability_report(bare, name="x", command="x")
    assert "Rank" not in [title for title, _ in report.sections]
    unknown = replace(bare[0], sigma_min=math.nan, sigma_max=math.nan)
    assert unknown.is_resolved and not replace(bare[0], sigma_min=0.0, sigma_max=0.0).is_resolved
    assert len(report.html()) > 10**6  # written as strict JSON, which has no nan
