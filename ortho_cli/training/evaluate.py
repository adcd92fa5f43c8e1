"""Judge a saved state of a run anew: on other classes or another split, and by more than training looked at.

The model is built as a resumed run builds it: the methods operate, then their state and the weights are put back.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ortho_cli import registry
from ortho_cli.analysis.evaluation import Evaluation, Judge, Skipped, measure
from ortho_cli.analysis.recipe_text import public_text
from ortho_cli.analysis.run_folder import open_run
from ortho_cli.errors import CheckpointError, UsageError, check_choice
from ortho_cli.recipe.train import load_train
from ortho_cli.tasks.batching import eval_parts, load_batches
from ortho_cli.tasks.task import Batch

from .model_judge import Drawing, ModelJudge, judge_model
from .run_folder import RECIPE, best_or_last
from .session import Session, open_session
from .snapshot import held_as_parameters, load_methods, load_model
from .state import BEST, checkpoint_steps, last_checkpoint, load_tensors, read_state, step_folder

__all__ = ["SPLITS", "evaluate_run", "find_checkpoint", "restore_for_judging"]

SPLITS = ("val", "train")
ITEMS = "items"  # the folder, in a run's, of what single samples of unfinished evaluations came to
# Besides data.*: what changes how a state is judged, and not which model it is of.
JUDGING_KEYS = (
    "model.base", "train.precision", "train.limit_batches", "train.threads", "task.compat", "task.grader",
    "task.lead_in", "task.new_tokens", "task.stop",
)  # fmt: skip


def evaluate_run(
    folder: Path,
    *,
    checkpoint: str | None = None,
    metrics: Sequence[str] | None = None,
    split: str = "val",
    sets: Sequence[str] = (),
    drawing: Drawing | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Evaluate a checkpoint of a run; of several processes every one must, and gets the same.

    Args:
        folder: of the run.
        checkpoint: `best`, `last` or a step; None: the best where there is one, else the last.
        metrics: names; None: all there are.
        split: `val`, which training evaluates on, or `train`, as it is without augmentation.
        sets: changes of the recipe, `data.KEY=VALUE` or one of `JUDGING_KEYS`.
        drawing: how a model that makes pictures is judged; None: as published.
        say: takes lines of progress.

    Raises:
        CheckpointError: no run, no such checkpoint, or one that does not fit the model.
        RecipeError: a change that the recipe does not take.
        UsageError: an unknown metric or split, or a change that would make another model.
    """
    check_choice("--split", split, SPLITS)
    run = open_run(folder)
    splits = registry.resolve("tasks", run.recipe.task.name).splits
    if split not in splits:
        raise UsageError(
            f"--split {split}: the task {run.recipe.task.name} is judged by {', '.join(splits)} only",
            hint="leave --split out",
        )
    _check_sets(sets)
    whole = ["train.limit_batches=null"]  # the run's limit was for its own time; this one may be set
    plain = ["data.augment=[]"] if split == "train" and hasattr(run.recipe.data, "augment") else []
    recipe = load_train(folder / RECIPE, [*whole, *sets, *plain])
    judge = _judge(recipe.task.name)
    known = [*judge.own, *judge.metrics] if judge else [name[5:] for name in run.metrics if name.startswith("eval/")]
    further = _model_judge(recipe.task.name)
    known += further.metrics
    if drawing is not None and not further.metrics:
        raise UsageError(
            f"run {folder.name} is of the task {recipe.task.name}, which draws nothing that is judged",
            hint="leave out --features, --num, --seed, --extent and --sefa",
        )
    wanted = (
        [name for name in known if name not in further.unasked] if metrics is None else _wanted(metrics, known, further)
    )
    state = find_checkpoint(folder, checkpoint)
    session = open_session(recipe, judging=True, kept=folder)
    restore_for_judging(session, state)
    session.task.log_items(folder / ITEMS / f"{state.name}-{_settings(recipe, state)}.jsonl")
    found, outputs, targets, samples = _outputs(session, split, judge.target if judge else "")
    order = [name for name in known if name in found] + [name for name in found if name not in known]
    judged = {
        "run": run.title, "checkpoint": state.name, "step": int(read_state(state)["step"]), "split": split,
        "samples": samples,
    }  # fmt: skip
    where = f"{state.name} (step {judged['step']:,}), {samples:,} samples of {split}"
    chosen = {name: found[name] for name in order if metrics is None or name in wanted}
    evaluation = Evaluation(run.title, where, judged, tuple(map(_public, sets)), chosen)
    if judge is not None:
        collected = judge.collect(session.task, outputs, targets)
        values, evaluation.skipped = measure(judge.metrics, [n for n in wanted if n in judge.metrics], collected)
        evaluation.metrics |= values
        evaluation.parts, evaluation.data = list(judge.parts(collected)), judge.data(collected)
        evaluation.texts = judge.texts(collected)
    asked = [name for name in wanted if further.has(name)]
    if asked:
        batches = partial(_batches_on_device, session, split)
        with session.for_judging() as model:
            judge_model(further(session, model, batches, drawing or Drawing(), say), asked, evaluation)
    if metrics is not None:
        others = judge.metrics if judge else {}
        lacking = [name for name in wanted if name not in found and name not in others and not further.has(name)]
        evaluation.skipped += [Skipped(name, "it is not defined for these samples") for name in lacking]
    return evaluation


def find_checkpoint(folder: Path, which: str | None = None) -> Path:
    """The folder of a run's `best` or `last` state, or of a step's; None: the best, else the last.

    Raises:
        CheckpointError: there is none.
        UsageError: neither a word nor a number.
    """
    if which in (None, "last"):
        found = best_or_last(folder) if which is None else last_checkpoint(folder)
    elif which == BEST:
        found = folder / "checkpoints" / BEST
    elif which.isdecimal():
        found = step_folder(folder, int(which))
    else:
        raise UsageError(f"--checkpoint {which!r} is neither best, nor last, nor a step")
    if found is not None and (found / "state.json").is_file():
        return found
    steps = ", ".join(map(str, checkpoint_steps(folder))) or "none"
    kept = " and best" if (folder / "checkpoints" / BEST).is_dir() else ""
    wanted = f"checkpoint {which}" if which else "complete checkpoint"
    raise CheckpointError(f"run {folder.name} has no {wanted}", hint=f"it has the steps {steps}{kept}")


def restore_for_judging(session: Session, folder: Path) -> None:
    """Put a saved state into a session that will not train: methods' shapes, weights, averages; no optimizer.

    A folder without `optimizer.safetensors`, as it is published, will do where no method keeps tensors of its own.
    """
    state, moments = read_state(folder), folder / "optimizer.safetensors"
    flat = load_tensors(moments) if moments.is_file() else {}
    load_methods(session.methods, state["methods"], flat)
    session.model.to(session.accelerator.device)
    load_model(session.model, load_tensors(folder / "model.safetensors"), session.base, read_state(folder).get("base"))
    if session.average is not None:
        session.average.values = held_as_parameters(session.model, load_tensors(folder / "ema.safetensors"))


def _outputs(session: Session, split: str, target: str) -> tuple[dict[str, float], Tensor, Tensor, int]:
    """The task's metrics, and of all processes the model's outputs, what they are compared with, and the samples.

    Outputs are kept where there is a target, which is what a judge compares them with.
    """
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    counts: list[int] = []

    def watched() -> Iterator[Batch]:
        for batch in _batches(session, split):
            counts.append(int(batch["counted"].sum()) if "counted" in batch else len(next(iter(batch.values()))))
            if target:
                targets.append(batch[target].cpu())
            yield session.on_device(batch)

    def watch(module: Any, given: Any, output: Any) -> None:
        if target:
            outputs.append(output.detach().float().cpu())

    with session.for_judging() as model:
        handle = model.register_forward_hook(watch)
        try:
            accelerator = session.accelerator
            found = session.task.evaluate(model, watched(), reduce=lambda tensor: accelerator.reduce(tensor, "sum"))
        finally:
            handle.remove()
    parts = gather_object([(torch.cat(outputs), torch.cat(targets))]) if target else []
    empty = torch.empty(0)
    return (
        {name: float(value) for name, value in found.items()},
        torch.cat([part[0] for part in parts]) if parts else empty,
        torch.cat([part[1] for part in parts]) if parts else empty,
        sum(gather_object([sum(counts)])),
    )


def _batches(session: Session, split: str) -> Iterator[Batch]:
    """This process's share of a split, each sample once, in the split's order where that is not `val`'s."""
    data, limit = session.recipe.data, session.recipe.train.limit_batches
    rank, world = session.accelerator.process_index, session.accelerator.num_processes
    batch = data.eval_batch or data.batch
    if split == "val":
        found = session.task.batches("eval", 0, batch=batch, rank=rank, world=world, workers=data.workers)
    else:
        samples = session.task.dataset("train")
        order, parts = torch.arange(len(samples)), eval_parts(len(samples), batch, rank, world)
        found = load_batches(samples, order, parts, 0, data.workers)
    yield from islice(found, limit)


def _batches_on_device(session: Session, split: str) -> Iterator[Batch]:
    return map(session.on_device, _batches(session, split))


def _judge(task: str) -> Judge[Any] | None:
    return registry.resolve("judges", task) if task in registry.names("judges") else None


def _model_judge(task: str) -> type[ModelJudge]:
    return registry.resolve("model_judges", task) if task in registry.names("model_judges") else ModelJudge


def _wanted(metrics: Sequence[str], known: Sequence[str], further: type[ModelJudge]) -> list[str]:
    for name in metrics:
        if name not in known and not further.has(name):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            listed = ", ".join([*known, *(f"{family}:NAME" for family in further.families)])
            raise UsageError(f"--metrics {name}: there is no such metric", hint=f"{hint}known: {listed}")
    return list(dict.fromkeys(metrics))


def _check_sets(sets: Sequence[str]) -> None:
    for text in sets:
        key = text.partition("=")[0].strip()
        if not key.startswith("data.") and key not in JUDGING_KEYS:
            raise UsageError(
                f"--set {key} would make another model, or changes nothing in an evaluation",
                hint=f"data.KEY, or one of {', '.join(JUDGING_KEYS)}",
            )


def _settings(recipe: Any, state: Path) -> str:
    """A short name for all that decides what single samples come to."""
    parts = recipe.task.model_dump_json(), recipe.data.model_dump_json(), recipe.model.base, read_state(state)["step"]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _public(text: str) -> str:
    key, _, value = text.partition("=")
    return f"{key}={public_text(value)}"
