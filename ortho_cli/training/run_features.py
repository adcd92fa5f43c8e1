"""A classifier that was trained here as a network of features: what its last layer sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ortho_cli.analysis.picture_features import as_unit
from ortho_cli.analysis.run_folder import open_run
from ortho_cli.errors import UsageError
from ortho_cli.recipe.train import load_train

from .evaluate import find_checkpoint, restore_for_judging
from .run_folder import RECIPE
from .session import open_session

__all__ = ["RunNetwork"]

LUMA = (0.299, 0.587, 0.114)  # of ITU-R 601, as Pillow makes pictures grey


class RunNetwork:
    """Features of a run of the task classify, by its best state, else its last.

    Pictures are resized and normalised as the run's own are; grey where those are.

    Args:
        folder: of the run.
        accelerator: of the processes that are met already; None: one is made.

    Raises:
        UsageError: a run of another task.
        CheckpointError: no run, or none of its states is there.
    """

    def __init__(self, folder: Path, accelerator: Accelerator | None = None) -> None:
        run = open_run(folder)
        if run.recipe.task.name != "classify":
            raise UsageError(
                f"--features {folder}: a run of the task {run.recipe.task.name} gives no features of pictures",
                hint="name a run of the task classify, or a hub id",
            )
        session = open_session(load_train(folder / RECIPE), accelerator, judging=True)
        restore_for_judging(session, find_checkpoint(folder))
        self.title = f"run {run.title}"
        self.model: nn.Module = session.model.eval().requires_grad_(False)
        if session.average is not None:  # for good: this model trains no more
            held = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
            for name, value in session.average.values.items():
                held[name].copy_(value)
        task: Any = session.task
        self.spec, self.side = task.spec, task.image_size
        self._seen: list[Tensor] = []
        example = torch.zeros(2, self.spec.channels, self.side, self.side, device=session.accelerator.device)
        head = _last_layer(self.model, example)
        if head is not None:
            head.register_forward_pre_hook(lambda module, given: self._seen.append(given[0]))

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        values = as_unit(pictures)
        if self.spec.channels == 1:
            values = (values * values.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
        if values.shape[-2:] != (self.side, self.side):
            values = F.interpolate(values, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        mean, std = (values.new_tensor(each)[:, None, None] for each in (self.spec.mean, self.spec.std))
        self._seen.clear()
        logits: Tensor = self.model((values - mean) / std)
        return (self._seen.pop() if self._seen else logits).float()


def _last_layer(model: nn.Module, example: Tensor) -> nn.Module | None:
    """The layer with weights that makes the logits of rows of features, found by running the model once."""
    found: list[nn.Module] = []

    def watch(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        rows = [isinstance(each, Tensor) and each.dim() == 2 for each in (*given[:1], output)]
        if rows == [True, True] and next(module.parameters(), None) is not None:
            found.append(module)

    hooks = [module.register_forward_hook(watch) for module in model.modules() if module is not model]
    try:
        with torch.no_grad():
            logits: Tensor = model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found[-1] if found and logits.dim() == 2 else None
