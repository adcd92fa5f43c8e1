"""Responses to queries: what is given and what is learnt, means over a whole step, answers and their log."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from ortho_cli.errors import RecipeError, UsageError
from ortho_cli.models.causal_lm import byte_tokenizer
from ortho_cli.recipe.instruct import TEMPLATES, Instruct, Instructions, TinyLM
from ortho_cli.tasks.answer_items import ItemLog
from ortho_cli.tasks.arithmetic import arithmetic, is_held_out, prose
from ortho_cli.tasks.generation import greedy_answers
from ortho_cli.tasks.instruct import InstructTask
from ortho_cli.tasks.instruct_data import Pairs, load_pairs
from ortho_cli.tasks.templates import prompt_text, response_text
from ortho_cli.tasks.token_rows import encode

pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def section(**keys: Any) -> Instructions:
    return Instructions.model_validate({"name": "arithmetic", "samples": 40, "batch": 8, **keys})


def make(data: Instructions | None = None, **keys: Any) -> InstructTask:
    config = Instruct.model_validate({"name": "instruct", "template": "plain", "max_length": 200, **keys})
    return InstructTask(config, data or section(), seed=0)


def tiny(task: InstructTask, **keys: Any) -> Any:
    torch.manual_seed(0)
    return task.build_model(TinyLM.model_validate({"name": "tiny-lm", "dim": 16, "heads": 2, "depth": 1, **keys}))


def test_alpaca_is_as_it_was_published() -> None:
    assert prompt_text("alpaca", "1 + 1?") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n1 + 1?\n\n### Response:"
    )


@pytest.mark.parametrize("template", [*TEMPLATES, "Q {query} A", "chat"])
def test_the_response_is_learnt_and_nothing_else(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    pairs = Pairs(["1 + 1?"], ["It is 2"], "here")
    (sample,) = encode(pairs, tokenizer, template, 512)
    ids = sample.ids.tolist()
    assert tokenizer.decode(ids[: sample.start], skip_special_tokens=True) == prompt_text(template, "1 + 1?", tokenizer)
    assert ids[-1] == tokenizer.eos_token_id
    learnt = tokenizer.decode(ids[sample.start : -1])
    assert learnt == response_text(template, "1 + 1?", "It is 2", tokenizer)
    assert learnt == ("It is 2<|end|>" if template == "chat" else "It is 2")
    assert encode(pairs, tokenizer, template, 512, learn_all=True)[0].start == 0
    assert len(encode(pairs, tokenizer, template, 5)[0].ids) == 5


def test_a_tokenizer_without_a_chat_template_is_told_so() -> None:
    with pytest.raises(RecipeError, match="no chat template"):
        prompt_text("chat", "1 + 1?", byte_tokenizer())


def test_what_has_no_query_is_text_to_go_on_with() -> None:
    (sample,) = encode(Pairs([""], ["Once"], "here"), byte_tokenizer(), "alpaca", 64)
    assert (len(sample.ids), sample.start) == (6, 1)  # <s>, four letters, </s>


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_loss_is_a_mean_over_the_tokens_of_the_step(pack: bool, accumulate: int, world: int) -> None:
    """Whatever the parts: the loop weighs them alike, and averages processes."""
    task = make(section(text=0.4, samples=60), pack=pack)
    model = tiny(task)
    whole = next(iter(task.batches("train", 3, batch=8)))
    wanted, _, _ = task.loss(model, whole, "train")
    labels = whole["labels"][:, 1:]
    per_token = torch.nn.functional.cross_entropy(
        model(whole["input_ids"], whole.get("position_ids"))[:, :-1].flatten(0, 1), labels.flatten()
    )
    assert wanted.item() == pytest.approx(per_token.item(), rel=1e-5)
    found = []
    for rank in range(world):
        batches = iter(task.batches("train", 3, batch=8 // accumulate, rank=rank, world=world))
        parts = [task.loss(model, next(batches), "train")[0].item() for _ in range(accumulate)]
        found.append(sum(parts) / accumulate)
    assert sum(found) / world == pytest.approx(wanted.item(), rel=1e-5)
    skipped = next(iter(task.batches("train", 3, batch=4, skip=2)))
    assert torch.equal(skipped["scale"], [*task.batches("train", 3, batch=4)][2]["scale"])


def test_the_sizes_are_known_without_tokens() -> None:
    task = make()
    assert task.size("train") == 40  # no model, so no tokenizer
    assert task.steps_per_epoch == 5
    packed = make(pack=True)
    tiny(packed)
    assert packed.size("train") < 40


class Oracle:
    """Answers as the data does, but wrongly where told; counts what it was asked."""

    def __init__(self, task: InstructTask, wrong: int) -> None:
        self.asked = 0
        self.task, self.wrong = task, wrong

    def __call__(self, model: Any, queries: Any) -> list[str]:
        self.asked += len(queries)
        known = self.task.pairs("eval")
        answers = dict(zip(known.queries, known.responses, strict=True))
        return ["The answer is: 1000" if self.asked <= self.wrong else answers[query] for query in queries]


def test_answers_are_graded_logged_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(section(judge_limit=10, eval_batch=1), compat="llama")
    model = tiny(task)
    oracle = Oracle(task, 3)
    monkeypatch.setattr(task, "answer", oracle)

    def evaluate() -> dict[str, float]:
        return task.evaluate(model, task.batches("eval", 0, batch=1))

    found = evaluate()
    assert (found["accuracy"], found["answered_share"], oracle.asked) == (0.7, 1.0, 10)
    assert found["perplexity"] == pytest.approx(torch.tensor(found["loss"]).exp().item())
    evaluate()
    assert oracle.asked == 20  # during training the model is another each time
    log = tmp_path / "items" / "a.jsonl"
    task.log_items(log)
    found = evaluate()
    lines = log.read_text("utf-8").splitlines()
    assert len(lines) == 10
    log.write_text("\n".join([*lines[:4], lines[4][:20]]), "utf-8")  # killed while it wrote the fifth
    task.log_items(log)
    assert evaluate() == found
    assert oracle.asked == 30 + 6
    changed = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    changed[0]["query"] = "of a file that has changed since"
    log.write_text("\n".join(map(json.dumps, changed)) + "\n", "utf-8")
    task.log_items(log)
    assert evaluate() == found
    assert oracle.asked == 30 + 6 + 1
    assert {json.loads(line)["index"] for line in log.read_text("utf-8").splitlines()} == set(range(10))
    assert ItemLog(log).items == task.log.items
    assert [json.loads(line)["index"] for line in task.log.text().splitlines()] == list(range(10))


def test_a_batch_answers_as_each_prompt_alone_does() -> None:
    model = tiny(make(), depth=2).eval()
    prompts = ["What is 1 plus 2?\n", "7?\n", "Compute 83 plus 19.\n"]
    together = greedy_answers(model, prompts, new_tokens=8)
    assert together == [greedy_answers(model, [prompt], new_tokens=8)[0] for prompt in prompts]
    assert len(set(together)) > 1
    letter = together[0][2]
    stopped = greedy_answers(model, prompts[:1], new_tokens=8, stop=[letter])
    assert stopped == [together[0][: together[0].index(letter)]]
    assert greedy_answers(model, [], new_tokens=8) == []


def test_a_model_that_has_learnt_it_answers_right() -> None:
    """From data to grade with nothing replaced: a dozen sums, learnt by heart."""
    task = make(section(samples=12, batch=12), new_tokens=32)
    model = tiny(task, dim=32, depth=2)
    task._pairs["eval"] = task.pairs("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for epoch in range(80):
        loss, _, _ = task.loss(model, next(iter(task.batches("train", epoch, batch=12))), "train")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = task.evaluate(model, task.batches("eval", 0, batch=12))
    assert found["accuracy"] >= 0.75
    assert model.training


def test_held_out_numbers_are_never_seen() -> None:
    def numbers(query: str) -> tuple[int, ...]:
        return tuple(int(word) for word in query.replace("?", "").replace(".", "").split() if word.isdigit())

    train = {numbers(query) for query, _ in arithmetic("train", 2000, ("plus", "times"), 2)}
    judged = {numbers(query) for query, _ in arithmetic("eval", 500, ("minus",), 2)}
    assert not train & judged
    assert all(is_held_out(*pair) for pair in judged)
    assert len(train) > 1500
    assert len(prose()) > 50
    assert all(len(piece) < 330 for piece in prose())


def test_files_in_any_form_and_under_any_names(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "reply": f"r{n}"} for n in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (tmp_path / "b.json").write_text(json.dumps(rows), "utf-8")
    (tmp_path / "c.csv").write_text("question,reply\n" + "".join(f"q{n},r{n}\n" for n in range(20)), "utf-8")
    for name in ("a.jsonl", "b.json", "c.csv"):
        config = section(
            name="instruct-file",
            path=str(tmp_path / name),
            query="question",
            response="reply",
            held_out=5,
            samples=4000,
        )
        train, judged = load_pairs(config, "train"), load_pairs(config, "eval")
        assert (len(train), len(judged)) == (15, 5)
        assert {*train.queries, *judged.queries} == {row["question"] for row in rows}
    with pytest.raises(RecipeError, match="has no column 'query'") as caught:
        load_pairs(section(name="instruct-file", path=str(tmp_path / "a.jsonl"), samples=4000), "train")
    assert "data.query" in str(caught.value.hint)


def test_metamathqa_is_filtered_and_judged_on_another_set(tmp_path: Path) -> None:
    rows = [{"query": "q" * n, "response": "r", "type": "t", "original_question": "o"} for n in range(1, 11)]
    (tmp_path / "MetaMathQA-40K.json").write_text(json.dumps(rows), "utf-8")
    (tmp_path / "gsm8k").mkdir()
    lines = [json.dumps({"question": f"q{n}", "answer": f"so\n#### {n}"}) for n in range(6)]
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(lines), "utf-8")
    config = section(
        name="metamathqa-40k", path=str(tmp_path), judge="gsm8k", judge_path=str(tmp_path / "gsm8k"), limit=9,
        max_chars=7, judge_limit=4, samples=4000,
    )  # fmt: skip
    assert [len(query) for query in load_pairs(config, "train").queries] == [1, 2, 3, 4, 5]
    judged = load_pairs(config, "eval")
    assert len(judged) == 4
    item = make(config).graded(0, judged.queries[0], judged.responses[0], "The answer is: 1.0")
    assert item.gold == judged.responses[0].rpartition(" ")[2]


def test_the_folders_of_math(tmp_path: Path) -> None:
    for part, subject, number in (("train", "algebra", 1), ("train", "geometry", 2), ("test", "algebra", 3)):
        (tmp_path / part / subject).mkdir(parents=True)
        text = json.dumps({"problem": f"p{number}", "solution": rf"\boxed{{{number}}}", "level": "Level 1"})
        (tmp_path / part / subject / f"{number}.json").write_text(text, "utf-8")
    config = section(name="math", path=str(tmp_path), samples=4000)
    assert load_pairs(config, "train").queries == ["p1", "p2"]
    assert load_pairs(config, "eval").queries == ["p3"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"name": "metamathqa", "path": "nowhere"}, "does not exist"),
        ({"name": "metamathqa"}, "does not open"),  # no network here
        ({"name": "instruct-file", "path": "{}"}, "is none of"),
    ],
)
def test_data_that_is_not_there(keys: dict[str, str], words: str, tmp_path: Path) -> None:
    odd = tmp_path / "odd.txt"
    odd.write_text("x", "utf-8")
    config = section(**{key: value.format(odd) for key, value in keys.items()}, samples=4000)
    with pytest.raises(RecipeError, match=words):
        load_pairs(config, "train")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "has no rows"),
        ('{"query": "q", "response": "r"}\n{"query": "q", "resp\n', "does not open: JSON parse error"),
        ('{"query": [{"role": "user", "content": "q"}], "response": "r"}\n', "has a list for a query, expected text"),
        ('{"query": "q", "response": null}\n{"query": "q", "response": "r"}\n', "has a row without a response"),
    ],
)
def test_rows_that_are_no_queries(lines: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines, "utf-8")
    with pytest.raises(RecipeError, match=words):
        load_pairs(section(name="instruct-file", path=str(tmp_path / "a.jsonl"), samples=4000), "train")


def test_more_held_out_than_there_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"query": "q", "response": "r"}', "utf-8")
    config = section(name="instruct-file", path=str(tmp_path / "a.jsonl"), samples=4000)
    with pytest.raises(RecipeError, match="leaves none of the 1 samples"):
        load_pairs(config, "train")


def test_the_library_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs the datasets library") as caught:
        load_pairs(section(name="gsm8k", samples=4000), "train")
    assert "ortho-cli[text]" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("schema", "keys", "words"),
    [
        (Instruct, {"name": "instruct", "template": "alpacca"}, "did you mean alpaca"),
        (Instruct, {"name": "instruct", "template": "{question}"}, "has no {query}"),
        (Instructions, {"name": "instruct-file"}, "needs path"),
        (Instructions, {"name": "arithmetic", "path": "x"}, "has none"),
        (Instructions, {"name": "gsm8k", "digits": 3}, "is for arithmetic"),
        (TinyLM, {"name": "tiny-lm", "dim": 20, "heads": 4}, "no even width"),
    ],
)
def test_sections_that_contradict_themselves(schema: Any, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(schema).validate_python(keys)
