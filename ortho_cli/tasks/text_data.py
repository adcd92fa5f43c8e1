"""Open the sentences of a recipe: GLUE, a table of one's own, or SciPy's docstrings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.data_text import GLUE, Docstrings

from .docstrings import PARTS, read_docstrings
from .glue_specs import HUB, SPECS
from .image_set import stratified
from .image_specs import Split
from .text_files import EVALUATION, hub_table, local_table

if TYPE_CHECKING:
    from ortho_cli.recipe.data_text import Sentences, TextTable

__all__ = ["TextSet", "classes_of", "load_texts"]

UNLABELLED = "rows that nobody labelled, as GLUE's test sets have, can neither train nor judge"
SCORE_SPLIT_BINS = 5  # scores are held out evenly over their range


@dataclass(frozen=True)
class TextSet:
    """One split.

    Attributes:
        texts: of each sample.
        pairs: the second texts, where samples are pairs.
        labels: `(N,)`: int64 numbers of classes, or float32 scores.
        classes: names of all classes; none where labels are scores.
        part: `(N,)` of 0 and 1: which of two evaluation parts a sample is of.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: Tensor
    classes: tuple[str, ...]
    part: Tensor

    def __len__(self) -> int:
        return len(self.texts)


def classes_of(config: Sentences) -> tuple[str, ...] | None:
    """The names of the classes where they are known without opening the data; empty for scores."""
    if isinstance(config, GLUE):
        return SPECS[config.task].classes
    if isinstance(config, Docstrings):
        return PARTS
    return () if config.regression else None


def load_texts(config: Sentences, split: Split) -> TextSet:
    """Open one split.

    Args:
        config: the recipe's `data` section.
        split: `train`, or `eval`: GLUE's validation sets, of a table the first of validation, dev and test that it has,
            else a fifth that is held out.

    Raises:
        RecipeError: it is not there, or rows lack a text or a label.
        UsageError: a library that is needed is not installed.
    """
    if isinstance(config, Docstrings):
        texts, labels, names = read_docstrings("train" if split == "train" else config.judge)
        return TextSet(texts, None, torch.tensor(labels), names, torch.zeros(len(texts), dtype=torch.long))
    if isinstance(config, GLUE):
        spec = SPECS[config.task]
        tables = [_glue_table(config, name) for name in (("train",) if split == "train" else spec.judged)]
        parts = [_columns(table, spec.text, "label", spec.classes, some_empty=True) for table in tables]
        return _joined(parts, spec.classes)
    return _own(config, split)


def _glue_table(config: GLUE, split: str) -> Any:
    if config.path is not None:
        found = local_table(config.path, split)
        if found is None:
            raise RecipeError(
                f"data.path: {config.path!r} has no {split} file of {config.task}",
                hint=f"e.g. {split}.jsonl; see: ortho recipe check --data",
            )
        return found
    tables = hub_table(config.source or HUB, config.task)
    if split not in tables:
        raise RecipeError(f"the hub set {config.source or HUB!r} has the splits {', '.join(tables)}, and no {split}")
    return tables[split]


def _own(config: TextTable, split: Split) -> TextSet:
    """A table of one's own; class numbers are those of the training split's sorted names."""
    if config.path is not None:
        path = config.path
        tables = {name: found for name in ("train", *EVALUATION) if (found := local_table(path, name)) is not None}
    else:
        tables = hub_table(config.source or "", None)
    if "train" not in tables:
        raise RecipeError(f"data {config.name}: no split train; it has {', '.join(tables) or 'none'}")
    classes = () if config.regression else _class_names(tables["train"], config.label)
    judged = next((name for name in EVALUATION if name in tables), None)
    chosen = tables["train"] if split == "train" or judged is None else tables[judged]
    found = _columns(chosen, config.text, config.label, classes)
    if judged is None:
        strata = found.labels if classes else _bins(found.labels)
        found = _select(found, stratified(strata.tolist(), split))
    return found


def _class_names(table: Any, label: str) -> tuple[str, ...]:
    _check_column(table, label)
    names = getattr(table.features[label], "names", None)
    if names:
        return tuple(names)
    values = table.unique(label)
    for value in filter(_is_unlabelled, values):
        raise RecipeError(f"column {label!r} has the label {value!r}", hint=UNLABELLED)
    if any(isinstance(value, float) for value in values):
        raise RecipeError(f"column {label!r} holds scores, not classes", hint="data.regression: true")
    return tuple(map(str, sorted(values)))


def _columns(
    table: Any, text: tuple[str, ...], label: str, classes: tuple[str, ...], *, some_empty: bool = False
) -> TextSet:
    """The texts and labels of a table; every row must have both. QQP has two questions without a letter."""
    for name in (*text, label):
        _check_column(table, name)
    columns = [list(table[name]) for name in text]
    for name, column in zip(text, columns, strict=True):
        for row, value in enumerate(column):
            if not isinstance(value, str) or not (value or some_empty):
                raise RecipeError(f"row {row} has no text in column {name!r}: found {value!r}")
    labels = _labels(list(table[label]), label, classes, hasattr(table.features[label], "names"))
    pairs = columns[1] if len(columns) > 1 else None
    return TextSet(columns[0], pairs, labels, classes, torch.zeros(len(labels), dtype=torch.long))


def _labels(values: list[Any], column: str, classes: tuple[str, ...], numbered: bool) -> Tensor:
    """Scores, or the numbers of classes that are given by number or by name."""
    if not classes:
        try:
            scores = np.asarray(values, dtype=np.float32)
        except (TypeError, ValueError):
            scores = np.asarray([np.nan], dtype=np.float32)
        if not np.isfinite(scores).all():
            raise RecipeError(f"column {column!r} holds something that is no finite score")
        return torch.from_numpy(scores)
    lookup: dict[Any, int] = {name: number for number, name in enumerate(classes)}
    keys = [value if numbered else str(value) for value in values]
    if numbered or lookup.keys().isdisjoint(keys):
        lookup, keys = {number: number for number in range(len(classes))}, values
    found = [lookup.get(key) for key in keys]
    for row, (number, value) in enumerate(zip(found, values, strict=True)):
        if number is None:
            hint = UNLABELLED if _is_unlabelled(value) else f"classes: {', '.join(classes)}"[:200]
            raise RecipeError(f"row {row} has the label {value!r}, none of the {len(classes)} classes", hint=hint)
    return torch.tensor(found, dtype=torch.long)


def _is_unlabelled(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, int) and value < 0)


def _check_column(table: Any, name: str) -> None:
    if name not in table.column_names:
        columns = ", ".join(table.column_names)
        hint = f"its columns: {columns}; name them: data.text=[COLUMN], data.label=COLUMN"
        raise RecipeError(f"the data has no column {name!r}", hint=hint)


def _joined(parts: list[TextSet], classes: tuple[str, ...]) -> TextSet:
    part = torch.cat([torch.full((len(each),), number) for number, each in enumerate(parts)])
    pairs = None if parts[0].pairs is None else [text for each in parts for text in each.pairs or ()]
    texts, labels = [text for each in parts for text in each.texts], torch.cat([each.labels for each in parts])
    return TextSet(texts, pairs, labels, classes, part)


def _select(found: TextSet, places: list[int]) -> TextSet:
    at = torch.tensor(places, dtype=torch.long)
    pairs = None if found.pairs is None else [found.pairs[place] for place in places]
    return TextSet([found.texts[place] for place in places], pairs, found.labels[at], found.classes, found.part[at])


def _bins(scores: Tensor) -> Tensor:
    """Which fifth of the scores, in order, each is in."""
    return scores.argsort().argsort() * SCORE_SPLIT_BINS // max(1, len(scores))
