"""Queries and their responses from a local file or folder, the hub, or made; which of them train and which judge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ortho_cli.errors import RecipeError

from .arithmetic import arithmetic
from .image_specs import Split
from .instruct_specs import SPECS, PairSpec
from .text_files import open_dataset

if TYPE_CHECKING:
    from ortho_cli.recipe.instruct import Instructions

__all__ = ["Pairs", "load_pairs"]

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
JUDGE_SEED = 0  # of the samples that are judged on, where only some are: the same for all runs
MADE_TO_JUDGE = 500
WANTED = "what is expected, and how to get it: ortho recipe check --data RECIPE"


@dataclass(frozen=True)
class Pairs:
    """Queries and responses, as many of each; `source` is what they are called in messages."""

    queries: list[str]
    responses: list[str]
    source: str

    def __len__(self) -> int:
        return len(self.queries)

    def select(self, places: list[int]) -> Pairs:
        """Some of them, in the order given."""
        return Pairs([self.queries[at] for at in places], [self.responses[at] for at in places], self.source)


def load_pairs(config: Instructions, split: Split) -> Pairs:
    """The pairs of a recipe's `data` section that train (`train`) or judge (`eval`).

    Raises:
        RecipeError: not there, unreadable, without the columns, or nothing left of it.
        UsageError: `datasets` is not installed.
    """
    if split == "train":
        return _chosen(config, _training(config))
    found = _judging(config)
    if config.judge_limit is not None and config.judge_limit < len(found):
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(JUDGE_SEED)).tolist()
        found = found.select(sorted(order[: config.judge_limit]))
    return found


def _training(config: Instructions) -> Pairs:
    if config.name == "arithmetic":
        return _made(config, "train", config.samples, config.text)
    found = _read(config, SPECS[config.name], "train", config.path, config.source)
    return found.select(_held(found, config)[0]) if _holds_out(config) else found


def _judging(config: Instructions) -> Pairs:
    if config.judge != "own":
        spec = SPECS[config.judge]
        return _read(config, spec, "test", config.judge_path, None)
    if config.name == "arithmetic":
        return _made(config, "eval", config.judge_limit or MADE_TO_JUDGE, 0.0)
    if config.judge_path is not None:
        return _read(config, SPECS[config.name], "test", config.judge_path, None)
    if _holds_out(config):
        found = _read(config, SPECS[config.name], "train", config.path, config.source)
        return found.select(_held(found, config)[1])
    return _read(config, SPECS[config.name], "test", config.path, config.source)


def _made(config: Instructions, split: str, count: int, text: float) -> Pairs:
    queries, responses = zip(*arithmetic(split, count, config.operations, config.digits, text), strict=True)
    return Pairs(list(queries), list(responses), "arithmetic")


def _holds_out(config: Instructions) -> bool:
    """Whether some training samples are kept back to judge on, since there is no test part."""
    if config.judge != "own" or config.judge_path is not None:
        return False
    if config.path is not None and Path(config.path).is_file():
        return True
    return SPECS[config.name].test is None


def _held(found: Pairs, config: Instructions) -> tuple[list[int], list[int]]:
    """The places that train, and those that are held out."""
    if config.held_out >= len(found):
        raise RecipeError(
            f"data.held_out {config.held_out} leaves none of the {len(found)} samples of {found.source} to train on",
            hint="lower data.held_out, or name what to judge on: data.judge_path",
        )
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(JUDGE_SEED)).tolist()
    return sorted(order[config.held_out :]), sorted(order[: config.held_out])


def _chosen(config: Instructions, found: Pairs) -> Pairs:
    """Of the first so many training pairs, those that are short enough."""
    if config.limit is not None:
        found = found.select(list(range(min(config.limit, len(found)))))
    if config.max_chars is not None:
        lengths = map(len, found.queries), map(len, found.responses)
        short = [
            at
            for at, (query, response) in enumerate(zip(*lengths, strict=True))
            if query + 1 + response <= config.max_chars
        ]
        found = found.select(short)
    if not len(found):
        raise RecipeError(f"no training sample of {found.source} is left", hint="raise data.max_chars")
    return found


def _read(config: Instructions, spec: PairSpec, part: str, path: str | None, source: str | None) -> Pairs:
    rows, name = _local(spec, part, Path(path).expanduser()) if path is not None else _hub(spec, part, source)
    own = spec is SPECS[config.name]
    columns = [
        (own and given) or usual for given, usual in zip((config.query, config.response), spec.columns, strict=True)
    ]
    for column, key in zip(columns, ("query", "response"), strict=True):
        if column not in rows.column_names:
            raise RecipeError(
                f"{name} has no column {column!r}; its columns: {', '.join(rows.column_names)}",
                hint=f"name the right one: data.{key}",
            )
    values = [[_text(value, name, column) for value in rows[column][:]] for column in columns]
    if not values[0]:
        raise RecipeError(f"{name} is empty")
    return Pairs(values[0], values[1], name)


def _text(value: Any, name: str, column: str) -> str:
    if value is None:
        raise RecipeError(f"{name} has a row without a {column}")
    if not isinstance(value, (str, int, float)):
        raise RecipeError(
            f"{name} has a {type(value).__name__} for a {column}, expected text",
            hint="write each query and its response as a column of their own",
        )
    return str(value)


def _local(spec: PairSpec, part: str, path: Path) -> tuple[Any, str]:
    """The rows of a file; or of a folder the part's file, or the files below the part's folder."""
    if path.is_file():
        files = [path]
    else:
        named = [path / name for name in spec.files.get(part, ())]
        below = [file for file in sorted((path / part).rglob("*")) if file.suffix in BUILDERS]
        files = [file for file in named if file.is_file()][:1] or below
    if not files:
        wanted = ", ".join(spec.files.get(part, ())) or f"{part}/"
        reason = "does not exist" if not path.exists() else f"holds neither {wanted} nor {part}/ with files"
        raise RecipeError(f"data of {spec.title}: {path} {reason}", hint="; ".join(spec.fetch) or None)
    builder = BUILDERS.get(files[0].suffix)
    if builder is None:
        raise RecipeError(f"{path} is none of {', '.join(BUILDERS)}")
    paths = [str(file) for file in files]
    return open_dataset(str(path), builder, data_files=paths, split="train", hint=WANTED), path.name


def _hub(spec: PairSpec, part: str, source: str | None) -> tuple[Any, str]:
    name, _, revision = (source or spec.hub or "").partition("@")
    split = "train" if part == "train" else spec.test or "test"
    options: dict[str, Any] = {"split": split, "revision": revision or None}
    configs: tuple[str | None, ...] = (spec.configs if source is None else ()) or (None,)
    found = [open_dataset(f"the hub set {name!r}", name, config, hint=WANTED, **options) for config in configs]
    if len(found) == 1:
        return found[0], name
    import datasets

    return datasets.concatenate_datasets(found), name
