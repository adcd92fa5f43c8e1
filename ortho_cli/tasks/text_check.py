"""Tell what sentences a recipe needs, and what is there: the part of `ortho recipe check --data` that is about them."""

from __future__ import annotations

from typing import Any

from ortho_cli.recipe.data_text import GLUE, Docstrings, Sentences

from .glue_specs import HUB, SPECS
from .text_data import load_texts

__all__ = ["check_texts", "describe_texts", "found_texts"]


def describe_texts(config: Sentences) -> str:
    """What the recipe's sentences are, where they are read from, and how to get them; nothing is opened."""
    if isinstance(config, Docstrings):
        return "docstrings: which part of SciPy does a sentence come from?\nnothing to fetch: SciPy's own files"
    if isinstance(config, GLUE):
        spec = SPECS[config.task]
        lines, text, label = [f"glue {config.task}: {spec.title}"], spec.text, "label"
        files = ("train", *spec.judged)
        fetch = f"hf download {HUB} --repo-type dataset --include '{config.task}/*' --local-dir FOLDER   (then path: "
        fetch += f"FOLDER/{config.task})"
    else:
        lines, text, label = ["text-table: your own texts"], config.text, config.label
        files, fetch = ("train", "validation"), "name a file, a folder, or a set of the hub: source: ORG/NAME"
    where = config.path if config.path is not None else f"the hub, {config.source or HUB}"
    lines += [
        f"read from: {where}", "a local copy (data.path: FOLDER) looks like",
        *(f"  FOLDER/{name}.jsonl   (or .csv, .tsv, .parquet)" for name in files),
        f"  with the columns {', '.join((*text, label))}",
    ]  # fmt: skip
    return "\n".join([*lines, "to get it:", f"  {fetch}"])


def check_texts(config: Sentences) -> dict[str, Any]:
    """Open all parts of a recipe's sentences and count them.

    Returns:
        `name`, `train` and `eval` (samples), `classes` (their names, none for scores).

    Raises:
        RecipeError: they are missing, or rows lack a text or a label.
    """
    train, judged = load_texts(config, "train"), load_texts(config, "eval")
    return {"name": config.name, "train": len(train), "eval": len(judged), "labels": list(train.classes)}


def found_texts(found: dict[str, Any]) -> str:
    """What `check_texts` found, in a sentence."""
    labels = f"classes: {', '.join(found['labels'])}" if found["labels"] else "labels are scores"
    return f"found: {found['train']} samples to train on, {found['eval']} to judge by; {labels}"
