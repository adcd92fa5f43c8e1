"""GLUE's metrics as scikit-learn and scipy have them, over any sharing out; tokens; and the head that trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from text_bases import WORDS, save_base, save_tokenizer
from torch import Tensor, nn

from ortho_cli.recipe.data import Data
from ortho_cli.recipe.tasks_text import Glue
from ortho_cli.tasks.glue import GlueTask
from ortho_cli.tasks.glue_specs import SPECS
from ortho_cli.tasks.task import Batch
from ortho_cli.tasks.text_data import TextSet
from ortho_cli.tasks.text_tokens import TokenSamples

transformers = pytest.importorskip("transformers", reason="its tokenizers")
SIZE = 53


class Table(nn.Module):
    """Says of every sample what a table says, so that metrics have something random to judge."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.rows[input_ids[:, 0]]


def task_of(name: str, **data: Any) -> GlueTask:
    sections = {"name": "glue", "task": name, "path": "nowhere"} | data
    return GlueTask(Glue.model_validate({"name": "glue"}), TypeAdapter(Data).validate_python(sections), seed=0)


def random_split(task: GlueTask, classes: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, outputs that have something to do with them, and parts; put into the task as its data."""
    generator = torch.Generator().manual_seed(3)
    if classes:
        labels = torch.randint(len(classes), (SIZE,), generator=generator)
        outputs = torch.randn(SIZE, len(classes), generator=generator) + nn.functional.one_hot(labels, len(classes))
    else:
        labels = 5 * torch.rand(SIZE, generator=generator)
        outputs = labels[:, None] + 2 * torch.randn(SIZE, 1, generator=generator)
    part = (torch.arange(SIZE) % 3 == 0).long() if task.config and classes and len(classes) == 3 else torch.zeros(SIZE)
    task._opened = dict.fromkeys(("train", "eval"), TextSet(["a"] * SIZE, None, labels, classes, part.long()))
    return labels, outputs, part


def batches(labels: Tensor, part: Tensor, places: Tensor) -> Iterator[Batch]:
    for index in places.split(7):
        tokens = index[:, None]
        yield {
            "input_ids": tokens, "attention_mask": torch.ones_like(tokens), "label": labels[index],
            "part": part[index].long(), "index": index,
        }  # fmt: skip


def expected(name: str, labels: Any, outputs: Tensor, part: Any) -> dict[str, float]:
    """By the libraries, from all samples at once."""
    said = outputs.argmax(-1).numpy() if outputs.shape[1] > 1 else outputs[:, 0].numpy()
    labels = labels.numpy()
    match name:
        case "cola":
            return {"matthews": matthews_corrcoef(labels, said)}
        case "stsb":
            return {"pearson": pearsonr(said, labels)[0], "spearman": spearmanr(said, labels)[0]}
        case "mnli":
            first, second = part.numpy() == 0, part.numpy() == 1
            return {
                "accuracy": accuracy_score(labels[first], said[first]),
                "accuracy_mismatched": accuracy_score(labels[second], said[second]),
            }
        case "mrpc" | "qqp":
            return {"accuracy": accuracy_score(labels, said), "f1": f1_score(labels, said)}
        case _:
            return {"accuracy": accuracy_score(labels, said)}


@pytest.mark.parametrize("name", SPECS)
def test_metrics_are_the_libraries(name: str) -> None:
    task = task_of(name)
    labels, outputs, part = random_split(task, SPECS[name].classes)
    found = task.evaluate(Table(outputs), batches(labels, part, torch.randperm(SIZE)))
    wanted = expected(name, labels, outputs, part)
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, abs=1e-6)
    assert found["score"] == pytest.approx(np.mean(list(wanted.values())), abs=1e-6)
    assert tuple(found) == task.metrics
    loss = (
        nn.functional.mse_loss(outputs[:, 0], labels)
        if name == "stsb"
        else nn.functional.cross_entropy(outputs, labels)
    )
    assert found["loss"] == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("name", ["cola", "mnli", "stsb"])
def test_it_matters_not_how_samples_are_shared_out(name: str) -> None:
    task = task_of(name)
    labels, outputs, part = random_split(task, SPECS[name].classes)
    alone = task.evaluate(Table(outputs), batches(labels, part, torch.arange(SIZE)))
    tables: list[Tensor] = []

    def keep(table: Tensor) -> Tensor:
        tables.append(table)
        return sum(tables[1:], tables[0])

    for rank in range(2):
        both = task.evaluate(Table(outputs), batches(labels, part, torch.arange(rank, SIZE, 2)), keep)
    assert both == alone


def test_outputs_that_say_nothing_have_a_correlation_of_zero() -> None:
    task = task_of("stsb")
    labels, outputs, part = random_split(task, ())
    found = task.evaluate(Table(torch.zeros_like(outputs)), batches(labels, part, torch.arange(SIZE)))
    assert (found["pearson"], found["spearman"], found["score"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pairs", [False, True])
def test_batches_are_what_the_tokenizer_pads(side: str, pairs: bool, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, padding_side=side)
    texts = [" ".join(WORDS[:size]) for size in (2, 7, 1, 20)]
    second = list(reversed(texts)) if pairs else None
    split = TextSet(texts, second, torch.arange(4), ("a", "b", "c", "d"), torch.zeros(4, dtype=torch.long))
    samples = TokenSamples(split, tokenizer, 12, tokenizer.pad_token_id, "batch")
    for index in ([0, 1], [3], [2, 0, 1, 3]):
        batch = samples.fetch(0, torch.tensor(index))
        others = None if second is None else [second[place] for place in index]
        peer = tokenizer(
            [texts[place] for place in index], others, truncation=True, max_length=12, padding=True, return_tensors="pt"
        )
        assert set(peer) <= set(batch)
        assert all(torch.equal(batch[key], peer[key]) for key in peer)
        assert batch["label"].tolist() == batch["index"].tolist() == index
    whole = TokenSamples(split, tokenizer, 12, tokenizer.pad_token_id, "max_length")
    assert whole.fetch(0, torch.tensor([0]))["input_ids"].shape == (1, 12)
    assert whole[0, 2]["input_ids"].shape == (12,)
    assert whole.fetch(0, torch.tensor([], dtype=torch.long))["input_ids"].shape == (0, 12)


def test_docstrings_are_held_out_by_whole_files() -> None:
    from ortho_cli.tasks.docstrings import PARTS, _sentences, read_docstrings

    splits = {split: read_docstrings(split) for split in ("train", "val", "test")}  # type: ignore[arg-type]
    texts = [set(found[0]) for found in splits.values()]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert all(set(found[1]) == set(range(len(PARTS))) for found in splits.values())
    for files in _sentences().values():
        for sentences in files.values():
            assert sum(bool(set(sentences) & own) for own in texts) <= 1


def test_a_pretrained_model_learns_from_a_file(tmp_path: Path) -> None:
    """The loss of a batch falls; the whole chain from a CSV file to a gradient."""
    pytest.importorskip("datasets")
    table = tmp_path / "films.csv"
    rows = [
        f"the film is {word},{label}"
        for word, label in (("good", "yes"), ("bad", "no"), ("fine", "yes"), ("dull", "no"))
    ]
    table.write_text("text,label\n" + "\n".join(rows * 5) + "\n", "utf-8")
    data = TypeAdapter(Data).validate_python({"name": "text-table", "path": str(table), "batch": 4})
    task = GlueTask(Glue.model_validate({"name": "glue", "max_length": 12}), data, seed=0)
    from ortho_cli.recipe.models_text import HFText

    base = save_base(tmp_path / "base", hidden_size=32, intermediate_size=32)
    model = task.build_model(HFText(name="hf-text", base=str(base)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(6):
        for batch in task.batches("train", epoch, batch=4):
            loss, _, _ = task.loss(model, batch, "train")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = task.evaluate(model, task.batches("eval", 0, batch=4))
    assert (task.classes, task.size("eval")) == (("no", "yes"), 4)
    assert found["accuracy"] == 1.0
