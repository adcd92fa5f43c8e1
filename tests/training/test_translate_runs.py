"""Runs that translate: killed and resumed, on two processes, judged anew without their text, and put to use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from training_runs import assert_same_runs, die_at, lines_of, ortho, write
from typer.testing import CliRunner

from ortho_cli.cli.app import app
from ortho_cli.errors import RecipeError
from ortho_cli.recipe.train import load_train
from ortho_cli.training import generate_translation
from ortho_cli.training.dry_run import describe
from ortho_cli.training.evaluate import evaluate_run
from ortho_cli.training.run import train

WORDS = ("red", "green", "blue", "old", "new", "small", "large"), ("house", "tree", "river", "street", "garden")
PAIRS = [(f"the {first} {second}", f"{second} {first} le") for first in WORDS[0] for second in WORDS[1]]
FACTORS = (
    "[{name: factorized, rank_scale: 0.5, attention: true, targets: ['**.fc1', '**.tokens', out_embed]}, "
    "{name: frobenius_decay, penalty: 1e-2, attention: true}]"
)
SECTIONS = {
    "task": "{name: translate, beam: 2, max_length: 12, samples: 3}",
    "model": "{name: transformer-small, dim: 16, hidden: 16, heads: 2, depth: 1, positions: 32}",
    "data": "{name: parallel-text, path: TEXT, languages: [en, xx], vocabulary: 290, max_length: 10, batch: 80}",
    "methods": FACTORS,
    "optimizer": "{name: adamw, lr: 5e-3}",
    "schedule": "{name: inverse-sqrt, warmup: 3, hold: 4}",
    "train": "{epochs: 6, seed: 0, ema: 0.9, accumulate: 2, clip: 1.0, threads: 1}",
    "run": "{dir: FOLDER, save_every_steps: 5, keep: all, log_every: 4, best: {metric: eval/bleu}, samples_every: 6}",
}


def recipe(folder: Path, name: str, **sections: str) -> Path:
    """A recipe whose text lies beside it."""
    for part, pairs in (("train", PAIRS[:28]), ("valid", PAIRS[28:31]), ("test", PAIRS[31:])):
        for side, language in enumerate(("en", "xx")):
            (folder / f"{part}.{language}").write_text("".join(f"{pair[side]}\n" for pair in pairs), "utf-8")
    merged = {**SECTIONS, **sections}
    return write(folder, name, **{key: value.replace("TEXT", str(folder)) for key, value in merged.items()})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose text is gone."""
    folder = tmp_path_factory.mktemp("run")
    train(load_train(recipe(folder, "run")))
    for file in folder.glob("*.en"):
        file.unlink()
    return folder / "run"


def test_killed_and_resumed(tmp_path: Path) -> None:
    outcome = train(load_train(recipe(tmp_path, "whole")))
    assert outcome.parameters == outcome.trainable
    broken = recipe(tmp_path, "broken")
    die_at(broken, 7)
    train(load_train(broken), resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")
    (tmp_path / "train.en").write_text("a\n" * 28)
    with pytest.raises(RecipeError, match="the training text is not that of the run"):
        train(load_train(broken, ["train.epochs=7"]), resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_two_processes_are_one(tmp_path: Path, accumulate: int) -> None:
    plain = SECTIONS["model"].replace("}", ", dropout: 0.0, activation_dropout: 0.0}")
    length = f"{{epochs: 2, threads: 1, accumulate: {accumulate}}}"
    train(load_train(recipe(tmp_path, "alone", model=plain, train="{epochs: 2, threads: 1}")))
    done = ortho("train", str(recipe(tmp_path, "pair", model=plain, train=length)), "--quiet", processes=2)
    assert done.returncode == 0, done.stderr
    for key in ("train/loss", "train/nll", "eval/loss", "eval/bleu"):
        assert lines_of(tmp_path / "pair", key) == pytest.approx(lines_of(tmp_path / "alone", key), rel=1e-4)


def test_a_run_is_judged_without_the_text_it_learnt_from(run: Path) -> None:
    best = max(lines_of(run, "eval/bleu"))
    target = [pair[0] for pair in PAIRS[31:]]
    (run.parent / "test.en").write_text("".join(f"{line}\n" for line in target), "utf-8")
    found = evaluate_run(run)
    assert found.metrics["bleu"] == pytest.approx(best, rel=1e-6)
    assert len(list(run.glob("samples/*/translations.txt"))) == 1
    assert min(lines_of(run, "train/nll")) > 0 and "pieces_per_second" in (run / "timing.jsonl").read_text()


def test_a_dry_run_counts_pieces_and_needs_no_text(tmp_path: Path) -> None:
    totals = describe(load_train(recipe(tmp_path, "plan", data=SECTIONS["data"].replace("TEXT", "nowhere"))))["totals"]
    assert totals["trainable"] < totals["parameters"]
    assert totals["steps"] is None
    assert totals["memory_activations"] > 0


def generate(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["generate", *map(str, words)])
    return result.exit_code, result.output


def test_files_are_translated_and_a_killed_job_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_translation, "PART", 3)
    text, output = tmp_path / "words.txt", tmp_path / "out"
    text.write_text("".join(f"{line}\n" for line in ["the old tree", "", "the new house", "the red river", "a"]))
    code, out = generate(run, "--input", text, "-o", output, "--json")
    assert code == 0, out
    assert json.loads(out)["totals"] == {"made": 2, "skipped": 0}
    whole = (output / "words.xx").read_text("utf-8")
    lines = whole.split("\n")
    assert len(lines) == 6 and lines[1] == lines[5] == ""
    (output / "000001.txt").unlink()
    (output / "words.xx").unlink()
    code, out = generate(run, "--input", text, "-o", output, "--batch", 1, "--json")
    assert json.loads(out)["totals"] == {"made": 1, "skipped": 1}
    assert (output / "words.xx").read_text("utf-8") == whole
    head, first, second = map(json.loads, (output / "manifest.jsonl").read_text().splitlines())
    assert head["run"] == "run" and (first["lines"], second["lines"]) == (3, 2) and second["first_line"] == 4
    text.write_text("the old tree\n\nthe new garden\n")
    code, out = generate(run, "--input", text, "-o", output)
    assert code == 6 and "input_sha256" in out
    shutil.rmtree(output)
    code, out = generate(run, "--input", text, "-o", output, "--dry-run", "--json")
    assert json.loads(out)["lines"] == 3 and not output.exists()


def test_shards_share_the_work(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_translation, "PART", 1)
    text, output = tmp_path / "words.txt", tmp_path / "out"
    text.write_text("the old tree\nthe new house\nthe red river\n")
    for shard, there in (("1/2", False), ("0/2", True)):
        code, out = generate(run, "--input", text, "-o", output, "--shard", shard)
        assert code == 0, out
        assert (output / "words.xx").is_file() is there
    assert len((output / "words.xx").read_text().splitlines()) == 3


def test_what_cannot_be_translated(run: Path, tmp_path: Path) -> None:
    code, out = generate(run, "-o", tmp_path / "out")
    assert code == 2 and "give --input FILE" in out
    (tmp_path / "empty").touch()
    assert generate(run, "--input", tmp_path / "empty", "-o", tmp_path / "out")[0] == 2
    (tmp_path / "long").write_text("many words " * 40)
    code, out = generate(run, "--input", tmp_path / "long", "-o", tmp_path / "out")
    assert code == 2 and "32 positions" in out
    code, out = generate(run, "--input", tmp_path / "long", "-o", tmp_path / "out", "--traverse")
    assert code == 2 and "there is no --traverse" in out
