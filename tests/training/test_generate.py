"""`ortho generate`: pictures by number, traversals, pairs; what is there is kept, other settings are refused."""

from __future__ import annotations

import doctest
import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import write
from typer.testing import CliRunner

from ortho_cli import registry
from ortho_cli.cli.app import app
from ortho_cli.errors import UsageError
from ortho_cli.models.eigengan import EigenGenerator
from ortho_cli.models.gan_simple import SimpleGenerator
from ortho_cli.recipe.train import load_train
from ortho_cli.tasks import gan_latents
from ortho_cli.tasks.gan_latents import codes, pairs, sefa_rotation
from ortho_cli.tasks.picture_video import check_video
from ortho_cli.training.generate_gan import FRAMES
from ortho_cli.training.run import train

SECTIONS = {
    "task": "{name: gan}",
    "model": "{name: eigengan, basis: 2, noise: 4, base_channels: 4, max_channels: 8}",
    "data": "{name: digits, batch: 16, size: 16}",
    "methods": "[]",
    "optimizer": "{name: adam, lr: 1e-3}",
    "run": "{dir: FOLDER, save_every: 1}",
    "train": "{steps: 1, limit_batches: 1, ema: 0.9, threads: 1}",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gan")
    train(load_train(write(folder, "run", **SECTIONS)))
    return folder / "run"


def ortho(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


def shape_of(path: Path) -> tuple[int, ...]:
    with Image.open(path) as picture:
        return np.asarray(picture).shape


def test_traversals_are_grids_of_rows_and_steps(run: Path, tmp_path: Path) -> None:
    code, out = ortho("generate", run, "--traverse", "--num", 3, "--steps", 5, "-o", tmp_path / "t", "--json")
    assert code == 0, out
    report = json.loads(out)
    assert report["totals"] == {"made": 4, "skipped": 0}
    grids = sorted(path.name for path in (tmp_path / "t").glob("*.png"))
    assert grids == [f"traverse_L{block}_D{index}.png" for block in range(2) for index in range(2)]
    assert shape_of(tmp_path / "t" / grids[0]) == (3 * 33 - 1, 5 * 33 - 1)  # enlarged to 32, with gaps
    head, *lines = [json.loads(line) for line in (tmp_path / "t" / "manifest.jsonl").read_text().splitlines()]
    assert (head["kind"], head["number"], head["seed"], head["run"]) == ("traverse", 3, 0, "run")
    assert [line["file"] for line in lines] == grids
    assert lines[0]["values"] == [-4.0, -2.0, 0.0, 2.0, 4.0]


# imageio-ffmpeg leaves pipes of an ffmpeg that has ended to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_films_run_forth_and_back(run: Path, tmp_path: Path, kind: str) -> None:
    imageio = pytest.importorskip("imageio.v3", reason="films are written by imageio")
    words = ("generate", run, "--traverse", "--num", 3, "-o", tmp_path / "t", "--json")
    assert ortho(*words)[0] == 0
    code, out = ortho(*words, "--video", kind)
    assert code == 0, out
    assert json.loads(out)["totals"] == {"made": 4, "skipped": 4}  # the grids were there
    frames = list(imageio.imiter(tmp_path / "t" / f"traverse_L1_D0.{kind}"))
    assert len(frames) == 2 * FRAMES - 2
    assert frames[0].shape[:2] == (66, 66)  # three pictures of 32 in a square, with gaps, and even
    middle = frames[FRAMES - 1]
    apart = [float(np.abs(np.float32(frame) - np.float32(middle)).mean()) for frame in (frames[0], frames[FRAMES])]
    assert apart[1] < apart[0], "neighbours in the film are neighbours in the code"
    assert json.loads(ortho(*words, "--video", kind, "-n")[1])["files"] == 8
    gc.collect()  # here, and not in a test that may not warn


def test_films_need_a_traversal_and_their_library(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out = ortho("generate", run, "--video", "mp4", "-o", tmp_path / "t")
    assert (code, "--video is of a traversal" in out) == (2, True)
    code, out = ortho("generate", run, "--traverse", "--video", "avi", "-o", tmp_path / "t")
    assert (code, "avi" in out) == (2, True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--video gif needs imageio") as caught:
        check_video("gif")
    assert caught.value.hint == "pip install 'imageio[ffmpeg]'"


def test_a_killed_job_goes_on_and_makes_the_same(run: Path, tmp_path: Path) -> None:
    assert ortho("generate", run, "--num", 4, "-o", tmp_path / "whole", "-q")[0] == 0
    assert ortho("generate", run, "--num", 2, "-o", tmp_path / "parts", "-q")[0] == 0
    (tmp_path / "parts" / "000001_0.png").unlink()  # as if killed before it was there
    code, out = ortho("generate", run, "--num", 4, "-o", tmp_path / "parts", "--json")
    assert code == 0, out
    assert json.loads(out)["totals"] == {"made": 3, "skipped": 1}
    for file in (tmp_path / "whole").glob("*.png"):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()
    assert shape_of(tmp_path / "whole" / "000000_0.png") == (16, 16)


def test_what_was_made_otherwise_is_refused(run: Path, tmp_path: Path) -> None:
    assert ortho("generate", run, "--num", 1, "-o", tmp_path / "x", "-q")[0] == 0
    code, out = ortho("generate", run, "--num", 1, "--seed", 1, "-o", tmp_path / "x")
    assert (code, "seed was 0, now 1" in out) == (6, True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    code, out = ortho("generate", run, "-o", tmp_path / "mine")
    assert code == 6
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_a_dry_run_counts_and_writes_nothing(run: Path, tmp_path: Path) -> None:
    code, out = ortho("generate", run, "--traverse", "-o", tmp_path / "t", "-n", "--json")
    assert code == 0, out
    assert json.loads(out)["files"] == 4
    assert list(tmp_path.iterdir()) == []


def test_pairs_differ_in_one_coordinate(run: Path, tmp_path: Path) -> None:
    assert ortho("generate", run, "--pairs", 5, "-o", tmp_path / "p", "-q")[0] == 0
    labels = np.load(tmp_path / "p" / "labels.npy")
    assert labels.shape == (5, 4)
    assert ((labels != 0).sum(1) == 1).all()
    assert shape_of(tmp_path / "p" / "pair_000004.jpg") == (16, 32)
    first, second, moved = pairs(0, torch.arange(2000), 4, 8, 4.0)
    assert torch.equal((first - second)[:, :4], moved)
    assert not (first - second)[:, 4:].any()
    assert float(first[:, :4].abs().max()) <= 4
    assert torch.bincount((moved != 0).float().argmax(1)).min() > 400  # each coordinate about as often
    assert torch.equal(codes(0, torch.tensor([7]), 8), codes(0, torch.arange(9), 8)[7:8])


@pytest.mark.parametrize(
    "words", [["--traverse", "--pairs", "2"], ["--pairs", "2", "--num", "2"], ["--extent", "0"],
              ["--pairs", "2", "--truncation", "0.5"], ["--steps", "5"], ["--pairs", "2", "--steps", "5"],
              ["--num", "2", "--extent", "3"]],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(run: Path, tmp_path: Path, words: list[str]) -> None:
    assert ortho("generate", run, *words, "-o", tmp_path / "x")[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_run_is_told_apart_from_a_missing_prompt(tmp_path: Path) -> None:
    code, out = ortho("generate", "nosuch", "-o", tmp_path / "x")
    assert (code, "nosuch is neither a run nor a file here" in out.replace("\n", " ")) == (2, True)


def test_a_classifier_makes_no_pictures(tmp_path: Path) -> None:
    train(load_train(write(tmp_path, "run", train="{steps: 1, limit_batches: 1}", methods="[]")))
    code, out = ortho("generate", tmp_path / "run", "-o", tmp_path / "x")
    assert (code, "task classify, which has no generator" in out) == (2, True)


def test_an_option_of_another_task_is_refused_by_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = registry.resolve("makers", "gan")
    monkeypatch.setattr("ortho_cli.training.generate_gan.MAKER", replace(maker, options=frozenset({"num", "seed"})))
    code, out = ortho("generate", run, "--sefa", "-o", tmp_path / "x")
    assert (code, "run run is of the task gan, for which there is no --sefa" in out) == (2, True)
    code, out = ortho("generate", tmp_path / "nothing", "-o", tmp_path / "x")
    assert (code, list(tmp_path.iterdir())) == (4, [])


def test_sefa_turns_the_code_to_principal_directions() -> None:
    """Turned, the first layer's rows are orthogonal, longest first; for several blocks, each in its own."""
    torch.manual_seed(0)
    simple = SimpleGenerator(5, 1, [8, 4]).requires_grad_(False)
    (weight,) = simple.latent_matrices()
    turned = sefa_rotation([weight]).T @ weight  # what z @ R.T meets
    gram = turned @ turned.T
    assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-5)
    assert bool((gram.diagonal().diff() <= 0).all())
    eigen = EigenGenerator(16, 1, 3, 4, 4, 8).requires_grad_(False)
    rotation = sefa_rotation(eigen.latent_matrices())
    assert torch.allclose(rotation @ rotation.T, torch.eye(6), atol=1e-5)
    assert not rotation[:3, 3:].any()
    more = sefa_rotation([torch.randn(4, 2)])  # coordinates than features
    assert torch.allclose(more @ more.T, torch.eye(4), atol=1e-5)


def test_examples_run() -> None:
    found = doctest.testmod(gan_latents)
    assert found.attempted > 0
    assert found.failed == 0
