"""Runs on sentences: killed and resumed with dropout, on two processes, and what they leave behind in other tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from text_bases import WORDS, save_base
from training_runs import LAUNCH, assert_same_runs, die_at, lines_of, write

from ortho_cli.analysis.run_report import write_run_report
from ortho_cli.errors import RecipeError
from ortho_cli.recipe.train import load_train
from ortho_cli.surgery.merge import merge
from ortho_cli.training.evaluate import evaluate_run
from ortho_cli.training.run import train
from ortho_cli.training.session import open_session

transformers = pytest.importorskip("transformers", reason="the models are transformers' own")
pytest.importorskip("datasets", reason="tables are read by it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's own imports warn about packages it looks for
    peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by PEFT
HRA = "[{name: hra, rank: 2, targets: [bert-all]}]"


def sections(folder: Path, *, dropout: float = 0.1, loader: str = "AutoModel") -> dict[str, str]:
    """A tiny BERT on 60 rows of a file: is the film good?"""
    base = save_base(folder / "base", hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, loader=loader)
    rows = [
        f"{first} film is {word},{'bad' if word in ('bad', 'dull') else 'good'}"
        for first in WORDS[:15] for word in ("good", "bad", "fine", "dull")
    ]  # fmt: skip
    (folder / "films.csv").write_text("\n".join(["text,label", *rows]) + "\n", "utf-8")
    return {
        "task": "{name: glue, max_length: 12}",
        "model": f"{{name: hf-text, base: {base}}}",
        "data": f"{{name: text-table, path: {folder / 'films.csv'}, batch: 8}}",
        "methods": HRA,
        "optimizer": "{name: adamw, lr: 2e-2}",
        "train": "{epochs: 3, seed: 0, clip: 1.0, threads: 1}",
        "run": "{dir: FOLDER, save_every_steps: 4, log_every: 3, best: {metric: eval/score, mode: max}}",
    }


def tokens(folder: Path) -> dict[str, torch.Tensor]:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(["the film is good", "it was very dull"], return_tensors="pt", padding=True))


def trained(run: Path) -> Any:
    """The run's model, at its end."""
    from ortho_cli.training.evaluate import find_checkpoint, restore_for_judging

    session = open_session(load_train(run / "recipe.yaml"), judging=True)
    restore_for_judging(session, find_checkpoint(run, "last"))
    return session.model.eval()


@pytest.mark.parametrize("methods", [pytest.param("[]", marks=pytest.mark.slow, id="all weights"), HRA])
def test_killed_and_resumed_with_dropout(methods: str, tmp_path: Path) -> None:
    own = {**sections(tmp_path), "methods": methods}
    train(load_train(write(tmp_path, "whole", **own)))
    broken = write(tmp_path, "broken", **own)
    die_at(broken, 11)
    train(load_train(broken), resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")


def test_dropout_acts_in_training_only(tmp_path: Path) -> None:
    losses = []
    for share in (0.0, 0.3):
        own = {**sections(tmp_path / str(share), dropout=share), "train": "{steps: 1, threads: 1}"}
        own |= {"methods": "[]", "optimizer": "{name: sgd, lr: 1e-12}"}
        train(load_train(write(tmp_path, f"run-{share}", **own)))
        losses.append([lines_of(tmp_path / f"run-{share}", key) for key in ("train/loss", "eval/loss")])
    assert losses[0][0] != losses[1][0]
    assert losses[0][1] == pytest.approx(losses[1][1])


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    own = {**sections(tmp_path, dropout=0.0), "train": "{epochs: 1, threads: 1}"}
    train(load_train(write(tmp_path, "alone", **own)))
    done = subprocess.run(
        [sys.executable, *LAUNCH, "2", "-m", "ortho_cli", "train", str(write(tmp_path, "pair", **own)), "--quiet"],
        capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for key in ("train/loss", "eval/loss", "eval/accuracy", "eval/macro_f1"):
        assert lines_of(tmp_path / "pair", key) == pytest.approx(lines_of(tmp_path / "alone", key), rel=1e-4)


@pytest.mark.parametrize("loader", ["AutoModel", "AutoModelForSequenceClassification"])
@pytest.mark.parametrize("method", ["hra", "lora"])
def test_others_load_what_a_run_leaves(method: str, loader: str, tmp_path: Path) -> None:
    """PEFT the adapter with the new head, transformers the merged model: the logits are the run's."""
    own = sections(tmp_path, loader=loader)
    train(load_train(write(tmp_path, "run", **{**own, "methods": HRA.replace("hra", method)})))
    run, base = tmp_path / "run", tmp_path / "base"
    model = trained(run)
    wanted = model(**tokens(base)).detach()
    family = transformers.AutoModelForSequenceClassification
    assert "modules_to_save" in (run / "export" / method / "adapter_config.json").read_text("utf-8")
    theirs = peft.PeftModel.from_pretrained(family.from_pretrained(base), str(run / "export" / method)).eval()
    torch.testing.assert_close(theirs(**tokens(base)).logits, wanted, rtol=1e-4, atol=1e-4)
    merge(base, run / "export" / method, tmp_path / "merged")
    merged = family.from_pretrained(tmp_path / "merged", num_labels=2).eval()  # a headless base counts none
    torch.testing.assert_close(merged(**tokens(base)).logits, wanted, rtol=1e-4, atol=1e-4)


def test_pefts_oft_trains_the_head_too(tmp_path: Path) -> None:
    config = "{peft_type: OFT, r: 0, oft_block_size: 8, target_modules: [query]}"
    own = {**sections(tmp_path), "methods": f"[{{name: peft, config: {config}}}]", "train": "{steps: 4, threads: 1}"}
    outcome = train(load_train(write(tmp_path, "run", **own)))
    assert outcome.trainable == 2 * 2 * 8 * 7 // 2 + 16 * 2 + 2  # two blocks of two layers; the head
    tensors = list((tmp_path / "run").glob("export/peft/adapter_model.safetensors"))
    assert len(tensors) == 1
    saved = json.loads((tensors[0].parent / "adapter_config.json").read_text("utf-8"))
    assert saved["modules_to_save"] == ["classifier"]


def test_the_frozen_head_of_the_paper(tmp_path: Path) -> None:
    own = {**sections(tmp_path), "task": "{name: glue, max_length: 12, compat: frozen-head}"}
    outcome = train(load_train(write(tmp_path, "run", **{**own, "train": "{steps: 2, threads: 1}"})))
    assert outcome.trainable == 2 * 2 * (5 * 16 + 24)
    assert any("classifier stays as it is" in note for note in outcome.notes)


def test_what_a_run_knows_of_itself(tmp_path: Path) -> None:
    outcome = train(load_train(write(tmp_path, "run", **sections(tmp_path))))
    run = tmp_path / "run"
    assert outcome.best == max(lines_of(run, "eval/score"))
    again = evaluate_run(run)
    assert again.metrics["score"] == pytest.approx(outcome.best, abs=1e-6)
    assert set(again.metrics) == {"loss", "accuracy", "macro_f1", "score"}
    assert "12 samples of val" in again.where and "48 samples of train" in evaluate_run(run, split="train").where
    write_run_report(run)
    assert "text-classification" in (run / "README.md").read_text("utf-8")


def test_a_metric_that_the_task_lacks_is_refused(tmp_path: Path) -> None:
    own = {**sections(tmp_path), "run": "{dir: FOLDER, best: {metric: eval/matthews, mode: max}}"}
    with pytest.raises(RecipeError, match=r"run\.best\.metric eval/matthews is not evaluated"):
        train(load_train(write(tmp_path, "run", **own)))
