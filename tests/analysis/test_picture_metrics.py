"""Two folders of pictures: what is listed and paired, FID and KID against their peers, settings, what is missing."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor
from typer.testing import CliRunner

from ortho_cli import registry
from ortho_cli.analysis import feature_distance
from ortho_cli.analysis.evaluation import Missing, Skipped
from ortho_cli.analysis.feature_distance import fid, kid
from ortho_cli.analysis.picture_folder import open_folder, paired
from ortho_cli.analysis.picture_metrics import PictureOptions, chosen_metrics, measure_pictures, read_settings
from ortho_cli.cli.app import app
from ortho_cli.errors import UsageError


class Means:
    """A network of features: the mean of each channel."""

    title = "means of channels"
    calls = 0

    def __call__(self, pictures: Tensor) -> Tensor:
        self.calls += 1
        return pictures.float().mean((2, 3)) / 255


def pictures(folder: Path, count: int, *, seed: int = 0, low: int = 0, size: int = 8) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(low, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{number:06d}.png")
    return folder


def features(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mixed + seed


def test_fid_is_that_of_scipy_and_of_torchmetrics() -> None:
    fidelity = pytest.importorskip("torchmetrics.image.fid")
    made, real = features(300, 6, 1), features(200, 6, 2)
    (m1, c1), (m2, c2) = ((each.mean(0).numpy(), np.cov(each.numpy().T)) for each in (made.double(), real.double()))
    by_scipy = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    metric = fidelity.FrechetInceptionDistance(feature=feature_distance._AsGiven(6)).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(made.double(), real=False)
    found = fid(made, real)
    assert found == pytest.approx(by_scipy, rel=1e-6)
    assert found == pytest.approx(float(metric.compute()), rel=1e-6)
    assert fid(real, real) == pytest.approx(0, abs=1e-9)


def test_fid_of_fewer_pictures_than_features_stays_real() -> None:
    assert fid(features(5, 12, 1), features(4, 12, 1)) >= 0
    with pytest.raises(Missing, match="two generated pictures at least, found 1"):
        fid(features(1, 3, 1), features(4, 3, 1))


def test_kid_is_that_of_its_definition() -> None:
    """With subsets of all pictures every subset gives the same, the unbiased estimate."""
    made, real = features(30, 4, 1).double(), features(30, 4, 1).double() + 0.3

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 4 + 1) ** 3

    def off_diagonal(values: Tensor) -> Tensor:
        return (values.sum() - values.trace()) / (30 * 29)

    expected = off_diagonal(kernel(made, made)) + off_diagonal(kernel(real, real)) - 2 * kernel(made, real).mean()
    state = torch.get_rng_state()
    assert kid(made, real) == pytest.approx(float(expected), rel=1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    assert kid(features(40, 4, 1), features(30, 4, 2), seed=3) == kid(features(40, 4, 1), features(30, 4, 2), seed=3)


def test_folders_list_pictures_and_what_the_manifest_says(tmp_path: Path) -> None:
    root = pictures(tmp_path / "made", 2)
    pictures(root / "dog", 1)
    (root / ".hidden.png").write_bytes(b"")
    (root / "labels.npy").write_bytes(b"")
    lines = [{"kind": "prompts"}, {"file": "000001.png", "prompt": "a dog"}]
    (root / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder = open_folder(root)
    assert folder.names == ("000000.png", "000001.png", "dog/000000.png")
    assert folder.prompts() == {"000001.png": "a dog"}
    (root / "manifest.jsonl").write_text("{")
    with pytest.raises(UsageError, match=r"manifest\.jsonl:1: no JSON"):
        open_folder(root)
    with pytest.raises(UsageError, match="is no folder"):
        open_folder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no pictures"):
        open_folder(tmp_path / "empty")


def test_pictures_of_several_sizes_come_in_batches_of_one(tmp_path: Path) -> None:
    root = pictures(tmp_path / "a", 3)
    pictures(root / "large", 2, size=10)
    folder = open_folder(root)
    assert [tuple(each.shape) for each in folder.batches(2)] == [(2, 3, 8, 8), (1, 3, 8, 8), (2, 3, 10, 10)]
    (root / "large" / "000000.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match="no picture that Pillow can read"):
        list(folder.batches(2))


def test_pairs_are_told_by_names(tmp_path: Path) -> None:
    made, real = pictures(tmp_path / "made", 2), pictures(tmp_path / "real", 2)
    (made / "000001.png").rename(made / "000001_1.png")
    (real / "000000.png").rename(real / "000000.jpg")
    assert paired(open_folder(made), open_folder(real)) == [
        ("000000.png", "000000.jpg"),
        ("000001_1.png", "000001.png"),
    ]
    (real / "000001.png").unlink()
    with pytest.raises(UsageError, match=r"000001_1\.png has no reference"):
        paired(open_folder(made), open_folder(real))


def test_features_are_computed_once_and_what_is_missing_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = (open_folder(pictures(tmp_path / name, 6, seed=len(name))) for name in ("a", "bb"))
    network = Means()
    values, skipped = measure_pictures(made, real, ["fid", "kid"], PictureOptions(lambda: network))
    assert set(values) == {"fid", "kid"}
    assert skipped == []
    assert network.calls == 2

    def absent() -> Means:
        raise Missing("no weights", "hf download org/net")

    values, skipped = measure_pictures(made, real, ["fid"], PictureOptions(absent))
    assert (values, skipped) == ({}, [Skipped("fid", "no weights", "hf download org/net")])


def test_settings_have_the_type_of_their_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def metric(made: Any, real: Any, options: Any, *, model: str = "a/b", low: float = 0.5, turn: bool = False) -> Any:
        return {"x": 0.0}

    monkeypatch.setattr(registry, "resolve", lambda table, name: metric)
    found = read_settings(["m.model=c/d", "m.low=2", "m.turn=true"], ["m"])
    assert found == {"m": {"model": "c/d", "low": 2.0, "turn": True}}
    for text, told in (
        ("m.modle=x", "no setting 'modle'"),
        ("m.low=x", "is not a float"),
        ("m.turn=1", "is not true or false"),
        ("n.low=1", "expected METRIC.KEY=VALUE"),
        ("low=1", "expected METRIC.KEY=VALUE"),
    ):
        with pytest.raises(UsageError, match=told):
            read_settings([text], ["m"])
    with pytest.raises(UsageError, match="there is no such metric") as caught:
        chosen_metrics(["fud"])
    assert "did you mean 'fid'" in str(caught.value.hint)


def test_the_command_writes_a_report_and_skips_by_name(tmp_path: Path) -> None:
    made, real = pictures(tmp_path / "made", 3), pictures(tmp_path / "real", 3, seed=1)
    words = ["evaluate", "--generated", made, "--reference", real, "-o", tmp_path / "out"]
    result = CliRunner().invoke(app, [*map(str, words), "--metrics", "fid", "--features", "no/such", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["pictures"] == found["references"] == 3
    assert found["metrics"] == {}
    assert found["skipped"][0]["metric"] == "fid"
    assert found["skipped"][0]["command"] == "hf download no/such"
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["skipped"] == found["skipped"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--generated", "a"], "two folders of pictures"),
        (["a", "--generated", "a", "--reference", "a"], "two folders of pictures"),
        (["--generated", "a", "--reference", "a", "--split", "val"], "are of a run"),
        (["--generated", "a", "--reference", "a", "--metrics", "fdi"], "did you mean"),
        (["--generated", "a", "--reference", "a", "--set", "x=1"], "METRIC.KEY=VALUE"),
    ],
)
def test_refusals(tmp_path: Path, words: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(Path("a"), 2)
    result = CliRunner().invoke(app, ["evaluate", *words, "-o", "out"])
    assert result.exit_code == 2
    assert told in result.output
    assert not Path("out").exists()


def test_examples_run() -> None:
    found = doctest.testmod(feature_distance)
    assert found.attempted > 0
    assert found.failed == 0
