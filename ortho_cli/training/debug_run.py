"""Short runs that look for trouble: one step of everything, three batches learnt by heart, a profile.

Each is the recipe with a few keys changed, in a folder of its own beside the run's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ortho_cli.recipe.load import validate
from ortho_cli.recipe.overrides import replaced
from ortho_cli.recipe.parse import Positions
from ortho_cli.recipe.train import TrainRecipe, recipe_data

from .log import read_lines
from .session import Session

__all__ = ["KINDS", "debug_recipe", "overfit_verdict", "profiled"]

OVERFIT_STEPS, OVERFIT_BATCHES = 100, 3
LEARNT = 0.1  # of the first loss; what is less has been learnt by heart
WAIT, WARM, ACTIVE = 2, 1, 3  # steps before the profile, before it is kept, and kept
ROWS = 40

_ONE_RUN = {"train.epochs": None, "matrix": None, "run.best": None, "run.save_every": None, "run.log_every": 1}
CHANGES: dict[str, dict[str, object]] = {
    "step": {
        **_ONE_RUN, "train.steps": 1, "train.limit_batches": 1, "train.eval_every_steps": 1, "run.save_every_steps": 1,
        "run.samples_every_steps": 1,
    },
    "overfit": {
        **_ONE_RUN, "train.steps": OVERFIT_STEPS, "train.limit_batches": OVERFIT_BATCHES, "data.augment": [],
        "train.eval_every_steps": OVERFIT_STEPS, "schedule": {"name": "constant"}, "run.samples_every": None,
    },
    "profile": {
        **_ONE_RUN, "train.steps": WAIT + WARM + ACTIVE, "train.limit_batches": WAIT + WARM + ACTIVE,
        "train.eval_every_steps": WAIT + WARM + ACTIVE, "run.samples_every": None,
    },
}  # fmt: skip
KINDS = tuple(CHANGES)


def debug_recipe(recipe: TrainRecipe, kind: str) -> TrainRecipe:
    """A recipe as `--debug-run KIND` carries it out."""
    data: Any = recipe_data(recipe, given_only=True)
    for key, value in {**CHANGES[kind], "run.dir": f"{recipe.run.dir.rstrip('/')}-debug-{kind}"}.items():
        section, _, name = key.partition(".")
        if not name or name in type(getattr(recipe, section)).model_fields:  # not every task's data has augmentations
            data = replaced(data, tuple(key.split(".")), value)
    return validate(TrainRecipe, data, Positions(), f"--debug-run {kind}")


def overfit_verdict(folder: Path) -> str:
    """Whether the loss of batches that come again and again went to almost nothing."""
    lines = list(read_lines(folder / "metrics.jsonl"))
    name = next(key for key in lines[0] if key.startswith("train/") and key.endswith("loss"))
    losses = [line[name] for line in lines if name in line]
    learnt = losses[-1] < LEARNT * losses[0]
    verdict = "can be learnt by heart" if learnt else "are not learnt: look at the learning rate and what is frozen"
    return f"{name} {losses[0]:.4g} -> {losses[-1]:.4g} in {len(losses)} steps: {OVERFIT_BATCHES} batches {verdict}"


@contextmanager
def profiled(session: Session, after_step: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Profile steps: `trace.json` for a trace viewer (chrome://tracing, ui.perfetto.dev), `profile.txt` to read.

    Yields:
        What to call after each step in place of `after_step`.
    """
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=WAIT, warmup=WARM, active=ACTIVE), profile_memory=True
    ) as profiler:

        def step() -> bool:
            profiler.step()
            return after_step()

        yield step
    if not session.is_main:
        return
    folder = session.folder
    profiler.export_chrome_trace(str(folder / "trace.json"))
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    (folder / "profile.txt").write_text(profiler.key_averages().table(sort_by=by, row_limit=ROWS), "utf-8")
