"""Other programs that are told of a run's metrics, through accelerate: tensorboard, wandb and the like."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ortho_cli.recipe.train import recipe_data

from .session import Session

__all__ = ["flat", "tracked"]


@contextmanager
def tracked(session: Session) -> Iterator[None]:
    """The trackers of `run.trackers` know the run and its recipe while the block runs."""
    accelerator = session.accelerator
    if not session.recipe.run.trackers:
        yield
        return
    accelerator.init_trackers(session.folder.name, config=flat(recipe_data(session.recipe)))
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # end_training would part the processes too
            tracker.finish()
        accelerator.trackers = []


def flat(data: object, name: str = "") -> dict[str, Any]:
    """Nested data with dotted keys, and values that every tracker takes.

    >>> flat({"train": {"seed": 0}, "methods": [{"name": "gor"}], "matrix": None})
    {'train.seed': 0, 'methods.0.name': 'gor', 'matrix': 'null'}
    """
    if isinstance(data, dict) and data:
        items = [(str(key), value) for key, value in data.items()]
    elif isinstance(data, list) and any(isinstance(item, dict) for item in data):
        items = [(str(index), item) for index, item in enumerate(data)]
    else:
        return {name: data if isinstance(data, (bool, int, float, str)) else json.dumps(data)}
    return {key: value for inner, item in items for key, value in flat(item, f"{name}.{inner}".strip(".")).items()}
