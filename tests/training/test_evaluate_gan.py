"""`ortho evaluate` of a GAN: every metric on a tiny run, the same FID from folders, what is skipped and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import write
from typer.testing import CliRunner

from ortho_cli.cli.app import app
from ortho_cli.errors import UsageError
from ortho_cli.recipe.train import load_train
from ortho_cli.tasks.gan import GANTask
from ortho_cli.tasks.picture_grid import save_grid
from ortho_cli.training import evaluate_gan
from ortho_cli.training.evaluate_gan import GANJudge
from ortho_cli.training.model_judge import Drawing
from ortho_cli.training.run import train

GAN = {
    "task": "{name: gan}",
    "model": "{name: eigengan, basis: 2, noise: 4, base_channels: 4, max_channels: 8}",
    "data": "{name: digits, batch: 16, size: 16}",
    "methods": "[]",
    "optimizer": "{name: adam, lr: 1e-3}",
    "run": "{dir: FOLDER, save_every: 1}",
    "train": "{steps: 2, limit_batches: 2, ema: 0.9, threads: 1}",
}
CLASSIFIER = {
    "model": "{name: mlp, hidden: [12]}", "methods": "[]", "run": "{dir: FOLDER, save_every: 1}",
    "train": "{steps: 3, limit_batches: 3, ema: 0.9, threads: 1}",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(load_train(write(folder, "gan", **GAN)))
    train(load_train(write(folder, "classifier", **CLASSIFIER)))
    return folder


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GANJudge, "vp_epochs", 3)
    monkeypatch.setattr(evaluate_gan, "CODES", 5)


def ortho(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def evaluated(run: Path, output: Path, *words: object) -> dict[str, Any]:
    code, out = ortho("evaluate", run, "-o", output, "--json", *words)
    assert code == 0, out
    found: dict[str, Any] = json.loads(out)
    return found


def test_every_metric_of_a_gan(runs: Path, tmp_path: Path) -> None:
    found = evaluated(runs / "gan", tmp_path / "out", "--features", runs / "classifier", "--num", 30)
    assert list(found["metrics"]) == ["frechet_pixels", "fid", "kid", "ppl", "vp_score", "activeness"]
    assert found["skipped"] == []
    assert set(found["activeness"]) == set(found["vp"]["by_coordinate"]) == {"L0_D0", "L0_D1", "L1_D0", "L1_D1"}
    assert (found["vp"]["trained_on"], found["vp"]["tested_on"], found["vp"]["chance"]) == (3, 27, 0.25)
    assert any("30 generated pictures, 359 real ones, by the features of run classifier" in n for n in found["notes"])
    assert any("ppl: lpips is not installed, so by the features" in note for note in found["notes"])
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert figures == {"variation-predictability.png", "activeness.png"}
    again = evaluated(runs / "gan", tmp_path / "again", "--features", runs / "classifier", "--num", 30)
    assert again["metrics"] == found["metrics"]
    words = ("--features", runs / "classifier", "--num", 30, "--metrics", "ppl_compat,kid", "--seed", 1, "--sefa")
    other = evaluated(runs / "gan", tmp_path / "other", *words)
    assert set(other["metrics"]) == {"ppl_compat", "kid"}
    assert other["metrics"]["kid"] != found["metrics"]["kid"]


def test_two_pairs_are_judged_and_written(runs: Path, tmp_path: Path) -> None:
    found = evaluated(runs / "gan", tmp_path / "out", "--metrics", "vp_score", "--num", 2)
    assert sorted(map(str, found["vp"]["by_coordinate"].values()))[1:] == ["None"] * 3  # the one unseen pair is of one


def test_real_pictures_are_counted_whatever_the_batches(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_gan, "PICTURES", 130)
    judge = GANJudge.__new__(GANJudge)
    judge.batches = lambda: iter([{"image": torch.zeros(50, 1, 2, 2)}] * 4)
    assert [len(part) for part in judge._real()] == [50, 50, 30]


def test_folders_of_the_same_pictures_give_the_same(runs: Path, tmp_path: Path) -> None:
    words = ("--features", runs / "classifier", "--metrics", "fid,kid")
    of_run = evaluated(runs / "gan", tmp_path / "run", *words, "--num", 40)
    assert ortho("generate", runs / "gan", "--num", 40, "-o", tmp_path / "made", "-q")[0] == 0
    recipe = load_train(runs / "gan" / "recipe.yaml")
    task = GANTask(recipe.task, recipe.data, seed=0)  # type: ignore[arg-type]
    task.build_model(recipe.model)
    (tmp_path / "real").mkdir()
    for batch in task.batches("eval", 0, batch=64):
        for number, picture in zip(batch["index"].tolist(), batch["image"], strict=True):
            save_grid(picture[None], tmp_path / "real" / f"{number:06d}.png", 1, enlarge=False)
    code, out = ortho("evaluate", "--generated", tmp_path / "made", "--reference", tmp_path / "real", *words, "--json")
    assert code == 0, out
    of_folders = json.loads(out)
    assert (of_folders["pictures"], of_folders["references"]) == (40, 359)
    assert of_folders["features"] == "run classifier"
    assert of_folders["metrics"]["fid"] == pytest.approx(of_run["metrics"]["fid"], rel=1e-2)
    assert of_folders["metrics"]["kid"] == pytest.approx(of_run["metrics"]["kid"], rel=5e-2)
    assert (tmp_path / "made-evaluation" / "evaluation.json").is_file()


def test_what_is_not_installed_is_skipped_by_name(runs: Path, tmp_path: Path) -> None:
    found = evaluated(runs / "gan", tmp_path / "out", "--metrics", "fid,ppl,activeness", "--num", 4)
    assert set(found["metrics"]) == {"activeness"}
    commands = {item["metric"]: item["command"] for item in found["skipped"]}
    assert "pip install torch-fidelity" in commands["fid"]
    assert "--features" in commands["ppl"]


def test_features_of_a_hub_folder(runs: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    found = evaluated(runs / "gan", tmp_path / "out", "--metrics", "fid", "--features", tmp_path / "vit", "--num", 20)
    assert found["metrics"]["fid"] > 0
    assert "by the features of vit" in found["notes"][0]


def test_a_run_that_classifies_gives_what_its_last_layer_sees(runs: Path) -> None:
    from ortho_cli.training.run_features import RunNetwork

    network = RunNetwork(runs / "classifier")
    pictures = torch.randint(0, 256, (5, 3, 11, 9), dtype=torch.uint8)
    assert network(pictures).shape == (5, 12)
    assert torch.equal(network(pictures), network(pictures.float() / 255))
    with pytest.raises(UsageError, match="task gan gives no features"):
        RunNetwork(runs / "gan")


@pytest.mark.parametrize(
    ("run", "words", "told"),
    [
        ("gan", ["--metrics", "fdi"], "did you mean 'fid'"),
        ("gan", ["--extent", "0"], "is not above 0"),
        ("gan", ["--metrics", ","], "names none"),
        ("gan", ["--metrics", "fid", "--num", "4", "--features", "./nothing"], "./nothing does not exist"),
        ("gan", ["--generated", "made"], "found RUN and --generated"),
        ("classifier", ["--num", "10"], "draws nothing that is judged"),
    ],
)
def test_refusals(runs: Path, tmp_path: Path, run: str, words: list[str], told: str) -> None:
    code, out = ortho("evaluate", runs / run, "-o", tmp_path / "out", *words)
    assert code == 2
    assert told in out
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(runs: Path) -> None:
    class Two:
        class accelerator:
            num_processes = 2

    with pytest.raises(UsageError, match="judged by one process"):
        GANJudge(Two(), torch.nn.Module(), list, Drawing(), print)
