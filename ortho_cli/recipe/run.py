"""The `train` and `run` sections: how long and in which arithmetic, and what a run keeps and tells."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ortho_cli.recipe.exports import ExportForm
from ortho_cli.recipe.section import Count, Positive, Rejection, Section, Text, Whole

__all__ = ["Best", "Run", "Train"]


def _evaluated(metric: str) -> str:
    if not re.fullmatch(r"eval(/[\w.@-]+)+", metric):
        raise ValueError(f"expected eval/NAME, e.g. eval/accuracy, found {metric!r}")
    return metric


Metric = Annotated[str, AfterValidator(_evaluated)]
Decay = Annotated[float, Field(gt=0, lt=1)]


class Train(Section):
    """The length, the seed and the arithmetic of a run."""

    epochs: Count | None = Field(default=None, description="Passes over the training data; or steps.")
    steps: Count | None = Field(default=None, description="Optimizer steps; or epochs.")
    seed: Whole = Field(default=0, description="Of weights, order, augmentation and everything else that is random.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Arithmetic of the model; weights and orthogonal work stay in fp32."
    )
    accumulate: Count = Field(default=1, description="Parts that a batch is split into to save memory.")
    clip: Positive | None = Field(default=None, description="Clip the gradient's norm to this; null: never.")
    ema: Decay | None = Field(
        default=None, description="Evaluate an average of the weights that keeps this share each step; null: none."
    )
    compile: bool = Field(default=False, description="Compile the model with torch.compile.")
    checkpoint_gradients: bool = Field(default=False, description="Recompute activations in backward to save memory.")
    limit_batches: Count | None = Field(default=None, description="Batches an epoch at most; null: all.")
    eval_every: Count = Field(default=1, description="Epochs between evaluations, unless eval_every_steps is given.")
    eval_every_steps: Count | None = Field(default=None, description="Steps between evaluations; null: by epochs.")
    threads: Count | None = Field(default=None, description="CPU threads; null: torch's choice.")

    def problems(self) -> Iterator[Rejection]:
        """Exactly one way of saying how long."""
        if self.epochs is None and self.steps is None:
            yield (), "says neither epochs nor steps; give one of them"
        elif self.epochs is not None and self.steps is not None:
            yield ("steps",), f"epochs ({self.epochs}) and steps ({self.steps}) exclude each other; give one of them"


class Best(Section):
    """Which evaluation was the best, and when to stop waiting for a better one."""

    metric: Metric = Field(default="eval/accuracy", description="What is compared, eval/NAME as in metrics.jsonl.")
    mode: Literal["max", "min"] = Field(default="max", description="Whether more or less of it is better.")
    patience: Count | None = Field(default=None, description="Stop after this many evaluations without a better one.")

    def problems(self) -> Iterator[Rejection]:
        """Losses and errors are better when they are lower."""
        if self.mode == "max" and self.metric.endswith(("loss", "mse", "mae")):
            yield ("metric",), f"{self.metric} is better when it is lower; write mode: min"


class Run(Section):
    """Where a run lives, what it keeps and whom it tells."""

    dir: Text = Field(description="The run's folder; a matrix puts one folder a cell into it.")
    save_every: Count | None = Field(default=None, description="Epochs between checkpoints; null: not by epochs.")
    save_every_steps: Count | None = Field(default=None, description="Steps between checkpoints; null: not by steps.")
    keep: Literal["all"] | Count | None = Field(
        default=None,
        description="How many of the last checkpoints stay, or all; null: 2, or all where the stability of bases is "
        "tracked (oialr, track_stability).",
    )
    best: Best | None = Field(default=None, description="Keep the best checkpoint as checkpoints/best; null: do not.")
    trackers: tuple[
        Literal["tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"], ...
    ] = Field(default=(), description="Also tell these of the metrics, through accelerate.")
    log_every: Count = Field(default=10, description="Steps between lines in metrics.jsonl.")
    samples_every: Count | None = Field(default=None, description="Epochs between samples, where a task makes any.")
    samples_every_steps: Count | None = Field(default=None, description="Steps between samples; null: by epochs.")
    export: tuple[ExportForm, ...] = Field(
        default=(),
        description="Forms of the adapter for other tools, written below the run's export folder at its end: peft, "
        "and folded into the base, merged; of Stable Diffusion peft, kohya-lora, diffusers-lora, merged-ldm, "
        "merged-diffusers. All are exact.",
    )
