"""Sentences from files and hub layouts: the columns, the splits, and every row that cannot be used."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from ortho_cli.errors import RecipeError, UsageError
from ortho_cli.recipe.data import Data
from ortho_cli.tasks.data_check import check_data, describe_data, found_text
from ortho_cli.tasks.glue_specs import SPECS
from ortho_cli.tasks.text_data import TextSet, load_texts

datasets = pytest.importorskip("datasets", reason="tables are read by it")
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def write_rows(path: Path, rows: list[Row]) -> None:
    """A file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


def rows_of(name: str, count: int = 6) -> list[Row]:
    spec = SPECS[name]
    labels = [number % len(spec.classes) if spec.classes else 0.5 * number for number in range(count)]
    return [
        {**{column: f"{column} {number}" for column in spec.text}, "label": label, "idx": number}
        for number, label in enumerate(labels)
    ]


def section(**keys: Any) -> Any:
    return TypeAdapter(Data).validate_python(keys)


def table(path: Path, rows: list[Row], **keys: Any) -> TextSet:
    write_rows(path, rows)
    return load_texts(section(name="text-table", path=str(path), **keys), "train")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("name", SPECS)
def test_glue_from_files_in_its_columns(name: str, suffix: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    for split in ("train", *spec.judged):
        stem = f"{split}-00000-of-00001" if suffix == "parquet" else split  # as the hub's files are called
        write_rows(tmp_path / f"{stem}.{suffix}", rows_of(name))
    data = section(name="glue", task=name, path=str(tmp_path))
    train, judged = load_texts(data, "train"), load_texts(data, "eval")
    assert train.texts == [f"{spec.text[0]} {number}" for number in range(6)]
    assert train.pairs == (None if len(spec.text) == 1 else [f"{spec.text[1]} {number}" for number in range(6)])
    assert train.labels.tolist() == [row["label"] for row in rows_of(name)]
    assert train.labels.is_floating_point() == (name == "stsb")
    assert judged.part.tolist() == ([0] * 6 + [1] * 6 if name == "mnli" else [0] * 6)
    found = check_data(data)
    assert (found["train"], found["eval"], tuple(found["labels"])) == (6, len(judged), spec.classes)
    assert "6 samples to train on" in found_text(data, found)


def test_labels_may_be_names(tmp_path: Path) -> None:
    rows = [{"sentence": "it is", "label": "acceptable"}, {"sentence": "is it is", "label": "unacceptable"}]
    for split in ("train", "validation"):
        write_rows(tmp_path / f"{split}.csv", rows)
    found = load_texts(section(name="glue", task="cola", path=str(tmp_path)), "train")
    assert found.labels.tolist() == [1, 0]


def test_questions_without_a_letter_are_the_benchmarks(tmp_path: Path) -> None:
    """QQP has two, in its training set."""
    write_rows(
        tmp_path / "train.jsonl", [*rows_of("qqp"), {"question1": "How?", "question2": "", "label": 0, "idx": 6}]
    )
    found = load_texts(section(name="glue", task="qqp", path=str(tmp_path)), "train")
    assert found.pairs is not None
    assert (len(found), found.pairs[-1]) == (7, "")


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_of_no_class_is_refused(label: int, tmp_path: Path) -> None:
    """GLUE's test sets have -1 throughout, which cross-entropy takes for the last class or fails at."""
    write_rows(tmp_path / "train.jsonl", [*rows_of("cola"), {"sentence": "a", "label": label, "idx": 6}])
    with pytest.raises(RecipeError, match=f"row 6 has the label {label}, none of the 2 classes") as caught:
        load_texts(section(name="glue", task="cola", path=str(tmp_path)), "train")
    assert ("nobody labelled" in str(caught.value.hint)) == (label < 0)


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    rows = [
        {"text": word, "label": ("no", "yes", "maybe")[number % 3]} for number, word in enumerate("abcdefghijklmno")
    ]
    train = table(tmp_path / "mine.csv", rows)
    judged = load_texts(section(name="text-table", path=str(tmp_path / "mine.csv")), "eval")
    assert train.classes == judged.classes == ("maybe", "no", "yes")
    assert sorted([*train.texts, *judged.texts]) == sorted("abcdefghijklmno")
    assert sorted(judged.labels.tolist()) == [0, 1, 2]  # one in five of each class


def test_a_folder_with_its_own_split(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.csv", [{"q": "a", "a": "b", "n": 3}, {"q": "c", "a": "d", "n": 10}])
    write_rows(tmp_path / "test.csv", [{"q": "e", "a": "f", "n": 10}])
    data = section(name="text-table", path=str(tmp_path), text=("q", "a"), label="n")
    train, judged = load_texts(data, "train"), load_texts(data, "eval")
    assert (train.classes, train.labels.tolist(), train.pairs) == (("3", "10"), [0, 1], ["b", "d"])
    assert (judged.texts, judged.labels.tolist()) == (["e"], [1])


def test_scores(tmp_path: Path) -> None:
    rows = [{"text": f"t{number}", "label": number / 4} for number in range(20)]
    train = table(tmp_path / "scores.jsonl", rows, regression=True)
    assert (len(train), train.classes, train.labels.dtype.is_floating_point) == (15, (), True)
    with pytest.raises(RecipeError, match="holds scores, not classes"):
        load_texts(section(name="text-table", path=str(tmp_path / "scores.jsonl")), "train")


def test_words_that_look_like_nothing_are_words(tmp_path: Path) -> None:
    assert table(tmp_path / "t.csv", [{"text": word, "label": word} for word in ("NA", "null", "nan")] * 5).classes == (
        "NA", "nan", "null",
    )  # fmt: skip


REFUSED: dict[str, tuple[list[Row], Row, str]] = {
    "no text": ([{"text": "", "label": "a"}, {"text": "b", "label": "b"}], {}, "row 0 has no text in column 'text'"),
    "no label": ([{"text": "a", "label": ""}, {"text": "b", "label": "b"}], {}, "column 'label' has the label"),
    "a negative one": ([{"text": "a", "label": -1}, {"text": "b", "label": 0}], {}, "has the label -1"),
    "another column": ([{"words": "a", "label": 1}], {}, "no column 'text'"),
    "no such label": ([{"text": "a", "label": 1}], {"label": "mark"}, "no column 'mark'"),
    "no score": ([{"text": "a", "label": "x"}], {"regression": True}, "no finite score"),
    "infinite": ([{"text": "a", "label": "inf"}], {"regression": True}, "no finite score"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_cannot_be_used(case: str, tmp_path: Path) -> None:
    rows, keys, message = REFUSED[case]
    with pytest.raises(RecipeError, match=message):
        table(tmp_path / "t.csv", rows, **keys)


def test_a_class_that_training_does_not_have(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    write_rows(tmp_path / "dev.csv", [{"text": "a", "label": "z"}])
    with pytest.raises(RecipeError, match="row 0 has the label 'z', none of the 2 classes"):
        load_texts(section(name="text-table", path=str(tmp_path)), "eval")


def test_places_without_data(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "there is no"), (tmp_path, "no split train")):
        with pytest.raises(RecipeError, match=message):
            load_texts(section(name="text-table", path=str(path)), "train")
    (tmp_path / "data.doc").write_text("x", "utf-8")
    with pytest.raises(RecipeError, match=r"is none of \.csv"):
        load_texts(section(name="text-table", path=str(tmp_path / "data.doc")), "train")
    with pytest.raises(RecipeError, match="has no train file of rte"):
        load_texts(section(name="glue", task="rte", path=str(tmp_path)), "train")
    (tmp_path / "broken.json").write_text("{", "utf-8")
    with pytest.raises(RecipeError, match="does not open"):
        load_texts(section(name="text-table", path=str(tmp_path / "broken.json")), "train")
    for name, text in (("none.jsonl", ""), ("head.csv", "text,label\n")):
        (tmp_path / name).write_text(text, "utf-8")
        with pytest.raises(RecipeError, match="has no rows"):
            load_texts(section(name="text-table", path=str(tmp_path / name)), "train")
    for kind in ("csv", "tsv"):
        write_rows(tmp_path / f"train.{kind}", [{"text": "a", "label": "x"}])
    with pytest.raises(RecipeError, match=r"train as .csv and as .tsv"):
        load_texts(section(name="text-table", path=str(tmp_path)), "train")


def test_the_hub_is_out_of_reach() -> None:
    with pytest.raises(RecipeError, match="the hub set 'nyu-mll/glue' does not open"):
        load_texts(section(name="glue", task="rte"), "train")


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs the datasets library") as caught:
        load_texts(section(name="glue", task="rte"), "train")
    assert caught.value.hint == "pip install 'ortho-cli[text]'"


def test_what_a_recipe_may_not_say() -> None:
    for keys, message in (
        ({}, "needs path: FILE"),
        ({"path": "x", "text": ("a", "a")}, "a is named 2 times"),
        ({"path": "x", "label": "text"}, "text is named 2 times"),
    ):
        with pytest.raises(ValidationError, match=message):
            section(name="text-table", **keys)


@pytest.mark.parametrize(
    "keys", [{"name": "glue", "task": "mnli"}, {"name": "text-table", "path": "x"}, {"name": "docstrings"}]
)
def test_what_is_needed_is_told(keys: dict[str, Any]) -> None:
    told = describe_data(section(**keys))
    assert told.count("\n") >= 1
    if keys["name"] == "glue":
        assert "FOLDER/validation_mismatched.jsonl" in told and "premise, hypothesis, label" in told
