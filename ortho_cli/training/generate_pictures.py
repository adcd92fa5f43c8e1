"""Which pictures are to be drawn: prompts from words, files and a run's own data, numbered, seeded and shared out.

A picture's seed depends on its number alone, so that neither the batch nor the shard changes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ortho_cli.errors import UsageError
from ortho_cli.tasks.hint_data import load_hints

from .generate_hints import DataHint, FileHint, Hint

__all__ = ["Picture", "Prompt", "data_prompts", "prompts_of", "read_prompts", "shard_of", "share"]

AGAIN = 1_000_000  # between the seeds of a prompt's first and second picture: more than anyone has prompts
KEYS = ("prompt", "negative", "control")
PROMPT_NAMES = ("prompt", "text", "caption")  # by which files of prompts call it


@dataclass(frozen=True)
class Prompt:
    """What a picture is drawn of: words, words to keep away from, and the hint it keeps to, a file."""

    text: str
    negative: str | None = None
    hint: Hint | None = None


@dataclass(frozen=True)
class Picture:
    """One picture to draw."""

    name: str
    prompt: Prompt
    seed: int
    sample: int
    """The prompt's place among all."""


def prompts_of(asked: Mapping[str, Any]) -> list[Prompt]:
    """The prompts that a command names, by `--prompt` or `--prompts`, each with its hint of `--control`.

    One hint goes with every prompt, one prompt with every hint; else there are as many of the one as of the other.

    Raises:
        UsageError: both, or numbers of prompts and hints that do not match.
    """
    if asked.get("prompt") and asked.get("prompts"):
        raise UsageError("--prompt and --prompts both say what to draw", hint="leave one of them out")
    prompts = read_prompts(Path(asked["prompts"])) if asked.get("prompts") else [*map(Prompt, asked.get("prompt", []))]
    hints = [FileHint(Path(hint)) for hint in asked.get("control", [])]
    if not hints:
        return prompts
    if any(prompt.hint is not None for prompt in prompts):
        raise UsageError("--prompts names hints, and so does --control", hint="leave --control out")
    if len(prompts) != len(hints) and 1 not in (len(prompts), len(hints)):
        raise UsageError(
            f"{len(prompts)} prompts and {len(hints)} hints", hint="give one of either, or as many of both"
        )
    count = max(len(prompts), len(hints)) if prompts else 0
    pairs = zip(prompts * (count // max(1, len(prompts))), hints * (count // len(hints)), strict=True)
    return [Prompt(prompt.text, prompt.negative, hint) for prompt, hint in pairs]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: a line each, or in `.jsonl` and `.json` objects with `prompt`, `negative`, `control`.

    A hint's file is named relative to the file of prompts.

    Raises:
        UsageError: no such file, no prompts in it, or a line that is none; with its number.
    """
    try:
        text = path.expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path} cannot be read: {error}") from error
    if path.suffix in (".json", ".jsonl"):
        prompts = [_prompt(value, where, path.parent) for value, where in _objects(text, path)]
    else:
        prompts = [Prompt(line.strip()) for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts {path} holds none", hint="write one a line")
    return prompts


def data_prompts(recipe: Any, split: str) -> list[Prompt]:
    """The prompts and hints of a run's own data, `val` or `train`.

    Raises:
        UsageError: its task has none.
        RecipeError: the data is not there, or some of it is broken.
    """
    if recipe is None or recipe.task.name != "control":
        raise UsageError("--split is for runs of the task control, whose data has prompts and hints")
    pictures = load_hints(recipe.data, "train" if split == "train" else "eval").pictures
    return [Prompt(pictures.prompt(place), None, DataHint(pictures, split, place)) for place in range(len(pictures))]


def share(
    prompts: list[Prompt], *, num: int, seed: int, shard: tuple[int, int] | None
) -> tuple[list[Picture], list[Picture]]:
    """All pictures of a job, and those of a shard of it.

    Args:
        prompts: in order.
        num: pictures of each.
        seed: of the first prompt's first picture; the next prompt's is one more.
        shard: (index, number of shards), counted from 0; None: all.

    >>> every, own = share([Prompt("a cat"), Prompt("a dog")], num=2, seed=7, shard=(1, 2))
    >>> [(picture.name, picture.seed) for picture in every]
    [('000000_0.png', 7), ('000001_0.png', 8), ('000000_1.png', 1000007), ('000001_1.png', 1000008)]
    >>> [picture.name for picture in own]
    ['000001_0.png', '000001_1.png']
    """
    every = [
        Picture(f"{place:06d}_{again}.png", prompt, seed + place + AGAIN * again, place)
        for again in range(num)
        for place, prompt in enumerate(prompts)
    ]
    return every, every if shard is None else every[shard[0] :: shard[1]]


def shard_of(text: str | None) -> tuple[int, int] | None:
    """What `--shard I/N` says, counted from 0; where it is not given and processes were started together, this one's.

    Raises:
        UsageError: no such share.

    >>> shard_of("1/4")
    (1, 4)
    """
    if text is None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        return (int(os.environ.get("RANK", "0")), world) if world > 1 else None
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"--shard {text!r} is no share", hint="the first of four is 0/4, the last 3/4")
    return int(index), int(count)


def _objects(text: str, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every object of a file, one a line or all in one array."""
    if text.lstrip().startswith("["):
        values = [(each, f"{path}: entry {number}") for number, each in enumerate(_json(text, str(path)))]
    else:
        lines = enumerate(text.splitlines(), start=1)
        values = [(_json(line, f"{path}:{number}"), f"{path}:{number}") for number, line in lines if line.strip()]
    for value, where in values:
        if not isinstance(value, dict):
            raise UsageError(f"{where}: {json.dumps(value)[:80]} is no object", hint='as in {"prompt": "a cat"}')
        yield value, where


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: no JSON: {str(error)[:120]}") from error


def _prompt(value: dict[str, Any], where: str, folder: Path) -> Prompt:
    text = next((value[key] for key in PROMPT_NAMES if isinstance(value.get(key), str)), None)
    negative, hint = value.get("negative"), value.get("control")
    if text is None or not isinstance(negative, str | None) or not isinstance(hint, str | None):
        raise UsageError(f"{where}: {json.dumps(value)[:80]} has no prompt", hint=f"keys: {', '.join(KEYS)}")
    return Prompt(text, negative, FileHint(folder / hint) if hint is not None else None)
