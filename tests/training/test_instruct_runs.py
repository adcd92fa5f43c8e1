"""Language models learn to respond by recipe: resumed, shared out, judged answer by answer, asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_runs import assert_same_runs, lines_of, ortho, write
from typer.testing import CliRunner

from ortho_cli.analysis.run_folder import open_run
from ortho_cli.cli.app import app
from ortho_cli.errors import OutputError, RecipeError, UsageError
from ortho_cli.recipe.train import load_train
from ortho_cli.training.cells import run_recipe
from ortho_cli.training.evaluate import evaluate_run
from ortho_cli.training.generate import open_making
from ortho_cli.training.generate_answers import read_queries

pytest.importorskip("transformers")

SECTIONS = {
    "task": "{name: instruct, template: plain, max_length: 96, pack: true, new_tokens: 6}",
    "model": "{name: tiny-lm, depth: 1, heads: 2, dim: 16}",
    "data": "{name: arithmetic, samples: 160, text: 0.2, batch: 8, eval_batch: 8, judge_limit: 10}",
    "methods": "[{name: hra, rank: 2, targets: ['model.layers.**']}]",
    "optimizer": "{name: adamw, lr: 1e-2}",
    "schedule": "{name: constant}",
    "train": "{steps: 6, accumulate: 2, clip: 1.0, eval_every_steps: 3, threads: 1}",
    "run": "{dir: FOLDER, save_every_steps: 3, keep: all, log_every: 3}",
}


def recipe(folder: Path, name: str, **sections: str) -> Path:
    return write(folder, name, **{**SECTIONS, **sections})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instruct")
    run_recipe(str(recipe(folder, "run")))
    return folder / "run"


def test_a_resumed_run_is_the_same_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, "parts")
    run_recipe(str(path), sets=["train.steps=3"])
    run_recipe(str(path), resume=True)
    assert_same_runs(trained, tmp_path / "parts")
    assert {"eval/loss", "eval/accuracy", "eval/perplexity", "eval/answered_share"} <= open_run(trained).metrics.keys()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Of packed rows, accumulated, with unequal numbers of tokens: losses, norms, evaluations and answers."""
    found = []
    for name, processes in (("one", 1), ("two", 2)):
        done = ortho("train", str(recipe(tmp_path, name)), "-q", processes=processes)
        assert done.returncode == 0, done.stderr
        keys = ("train/loss", "train/gradient_norm", "eval/loss", "eval/accuracy", "eval/answered_share")
        found.append({key: lines_of(tmp_path / name, key) for key in keys})
    for key, values in found[0].items():
        assert values
        assert found[1][key] == pytest.approx(values, rel=1e-4, abs=1e-5), key


def test_recomputing_changes_nothing(trained: Path, tmp_path: Path) -> None:
    run_recipe(str(recipe(tmp_path, "again")), sets=["train.checkpoint_gradients=true"])
    assert lines_of(tmp_path / "again", "train/loss") == pytest.approx(lines_of(trained, "train/loss"), rel=1e-5)


def test_an_evaluation_keeps_its_items_and_goes_on(trained: Path, tmp_path: Path) -> None:
    import ortho_cli.tasks.instruct as instruct

    asked: list[str] = []
    plain = instruct.greedy_answers

    def watched(model: Any, prompts: Any, **options: Any) -> list[str]:
        asked.extend(prompts)
        return plain(model, prompts, **options)

    sets = ["data.judge_limit=6", "task.new_tokens=8", "task.compat=llama"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instruct, "greedy_answers", watched)
        first = evaluate_run(trained, sets=sets)
        assert len(asked) == 6
        (log,) = (trained / "items").iterdir()
        lines = log.read_text("utf-8").splitlines(keepends=True)
        log.write_text("".join(lines[:4]), "utf-8")
        again = evaluate_run(trained, sets=sets)
        assert len(asked) == 8
        evaluate_run(trained, sets=["data.judge_limit=5"])  # others have a log of their own
        assert len(asked) == 13
    assert again.metrics == first.metrics
    assert first.data == {"items": 6, "items_file": "items.jsonl"}
    items = [json.loads(line) for line in first.texts["items.jsonl"].splitlines()]
    assert [item["index"] for item in items] == list(range(6))
    assert items[0].keys() == {"index", "query", "gold", "response", "answer", "correct", "lenient"}
    assert first.metrics["accuracy"] == sum(item["correct"] for item in items) / 6
    assert first.metrics.keys() == {"accuracy", "accuracy_lenient", "answered_share", "loss", "perplexity"}
    judged = evaluate_run(trained, split="train", sets=["train.limit_batches=1"])
    assert judged.metrics.keys() == {"loss", "perplexity"}  # nobody asks for answers to training samples


def test_the_command_writes_the_items(trained: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(trained), "-o", str(tmp_path / "out"), "-q", "--set", "data.judge_limit=4"]
    for further in ([], ["--force"]):
        done = CliRunner().invoke(app, [*words, *further])
        assert done.exit_code == 0, done.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"evaluation.json", "evaluation.html", "items.jsonl"} <= names
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text("utf-8"))["items"] == 4
    assert len((tmp_path / "out" / "items.jsonl").read_text("utf-8").splitlines()) == 4


def test_the_harness_is_skipped_by_name_where_it_is_missing(trained: Path) -> None:
    found = evaluate_run(trained, metrics=["loss", "lm-eval:hellaswag"], sets=["task.grader=none"])
    assert found.metrics.keys() == {"loss"}
    assert [str(each) for each in found.skipped] == [
        "lm-eval:hellaswag is skipped: lm-eval is not installed; pip install lm-eval"
    ]
    with pytest.raises(UsageError, match="lm-evil:x: there is no such metric") as caught:
        evaluate_run(trained, metrics=["lm-evil:x"])
    assert "lm-eval:NAME" in str(caught.value.hint)


def test_the_harness_gets_the_model_and_its_numbers_come_back(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of the two entry points that are used; it calls the model as the library does."""
    import sys
    import types

    import torch

    class HFLM:
        def __init__(self, pretrained: Any, tokenizer: Any, batch_size: int) -> None:
            self.logits = pretrained(input_ids=torch.tensor([tokenizer("1 + 1").input_ids])).logits

    def simple_evaluate(model: HFLM, tasks: list[str]) -> dict[str, Any]:
        if tasks != ["toy"]:
            raise KeyError(tasks[0])
        assert model.logits.shape == (1, 6, 259)
        scores = {"alias": "toy", "acc,none": 0.25, "acc_stderr,none": 0.1, "exact_match,strict-match": 0.5}
        return {"results": {"toy": scores}}

    package = types.ModuleType("lm_eval")
    package.simple_evaluate, package.__version__ = simple_evaluate, "0"  # type: ignore[attr-defined]
    language = types.ModuleType("lm_eval.models.huggingface")
    language.HFLM = HFLM  # type: ignore[attr-defined]
    for name, module in (("lm_eval", package), ("lm_eval.models.huggingface", language)):
        monkeypatch.setitem(sys.modules, name, module)
    found = evaluate_run(trained, metrics=["lm-eval:toy"], sets=["task.grader=none"])
    assert found.metrics == {"lm-eval/toy/acc": 0.25, "lm-eval/toy/exact_match-strict-match": 0.5}
    assert found.notes == ["lm-eval/toy: by lm-evaluation-harness 0"]
    with pytest.raises(UsageError, match="has no such task"):
        evaluate_run(trained, metrics=["lm-eval:nothing"], sets=["task.grader=none"])


def test_queries_of_a_file_are_answered_and_a_killed_job_goes_on(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "queries.jsonl"
    file.write_text("".join(json.dumps({"question": f"What is {n} plus 1?"}) + "\n" for n in range(70)), "utf-8")
    making = open_making(str(trained), {"input": file, "batch": 32})
    assert making.planned() == {"kind": "answers", "files": 2, "queries": 70}
    made = making.make(tmp_path / "out", None)
    assert (made.made, made.skipped) == (["000000.jsonl", "000001.jsonl"], [])
    whole = (tmp_path / "out" / "queries.answers.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["query"] for line in lines] == read_queries(file)
    assert lines[0].keys() == {"query", "response", "answer"}
    (tmp_path / "out" / "000001.jsonl").unlink()
    again = open_making(str(trained), {"input": file, "batch": 32}).make(tmp_path / "out", None)
    assert (again.made, again.skipped) == (["000001.jsonl"], ["000000.jsonl"])
    assert (tmp_path / "out" / "queries.answers.jsonl").read_text("utf-8") == whole
    file.write_text("Another?\n", "utf-8")
    with pytest.raises(RecipeError, match=":1: no JSON"):
        open_making(str(trained), {"input": file})
    text = tmp_path / "queries.txt"
    text.write_text("Another?\n", "utf-8")
    with pytest.raises(OutputError, match="made otherwise"):
        open_making(str(trained), {"input": text}).make(tmp_path / "out", None)
    one = open_making(str(trained), {"prompt": ["1 plus 1 is what?"]}).make(tmp_path / "one", None)
    assert "prompts.answers.jsonl" in one.also


@pytest.mark.parametrize(
    "asked", [{}, {"input": "a", "prompt": ["b"]}, {"steps": 3, "prompt": ["b"]}, {"prompt": ["a", " "]}]
)
def test_what_cannot_be_asked(trained: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        open_making(str(trained), asked)


def test_the_recipe_of_the_run_says_what_it_was(trained: Path) -> None:
    found = load_train(trained / "recipe.yaml")
    assert found.task.name == "instruct"
    assert (trained / "export" / "hra" / "adapter_config.json").is_file()


def test_the_card_of_a_run_is_one_that_the_hub_reads(trained: Path) -> None:
    from huggingface_hub import ModelCard

    card, run = ModelCard.load(trained / "README.md"), open_run(trained)
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-generation", "peft")
    assert card.data.metrics == ["accuracy", "perplexity"]
    results = {result.metric_type: result for result in card.data.eval_results}
    for name in ("accuracy", "loss", "perplexity", "answered_share"):
        assert results[name].metric_value == run.metrics[f"eval/{name}"].final
        assert (results[name].task_type, results[name].dataset_name) == ("text-generation", "arithmetic")


def test_a_card_names_the_set_that_was_judged_on(tmp_path: Path, trained: Path) -> None:
    import shutil

    from huggingface_hub import ModelCard

    from ortho_cli.analysis.model_card import card_text

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    text = (run / "recipe.yaml").read_text("utf-8").replace("name: arithmetic", "name: metamathqa")
    (run / "recipe.yaml").write_text(
        text.replace("judge: own", "judge: gsm8k")
        .replace("samples: 160", "samples: 4000")
        .replace("text: 0.2", "text: 0.0"),
        "utf-8",
    )
    card = ModelCard(card_text(open_run(run)))
    assert card.data.datasets == ["meta-math/MetaMathQA"]
    assert {(each.dataset_name, each.dataset_type) for each in card.data.eval_results} == {("gsm8k", "openai/gsm8k")}
