"""The `optimizer` and `schedule` sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from ortho_cli.recipe.section import Count, NotNegative, Positive, Rejection, Section, Share, Whole

__all__ = [
    "NAG", "SGD", "Adam", "AdamW", "Constant", "Cosine", "InverseSqrt", "Linear", "Multistep", "Muon", "Nesterov",
    "OneCycle", "Optimizer", "Schedule",
]  # fmt: skip

Betas = Annotated[
    tuple[Share, Share], Field(description="How much of the gradient's and of its square's average is kept each step.")
]
Epsilon = Annotated[NotNegative, Field(description="Added to the denominator.")]
Decay = Annotated[NotNegative, Field(description="Weight decay, as torch's optimizer of this name applies it.")]
Momentum = Annotated[Share, Field(description="How much of the last update is kept.")]


class _Optimizer(Section):
    """What all optimizers have."""

    name: str
    lr: Positive = Field(description="Learning rate, the peak of the schedule.")
    decay_norms: bool = Field(default=False, description="Decay biases and the parameters of norms too.")


class SGD(_Optimizer):
    """Gradient descent, with momentum if wanted."""

    name: Literal["sgd"] = Field(description="The optimizer.")
    momentum: Momentum = 0.0
    weight_decay: Decay = 0.0


class Nesterov(_Optimizer):
    """Gradient descent with Nesterov's momentum, as torch has it."""

    name: Literal["nesterov"] = Field(description="The optimizer.")
    momentum: Annotated[Momentum, Field(gt=0)] = 0.9
    weight_decay: Decay = 0.0


class NAG(_Optimizer):
    """Nesterov's accelerated gradient as fairseq has it."""

    name: Literal["nag"] = Field(description="The optimizer.")
    momentum: Momentum = 0.99
    weight_decay: Decay = 0.0


class Adam(_Optimizer):
    """Adam; without bias correction it is BERT's."""

    name: Literal["adam"] = Field(description="The optimizer.")
    betas: Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: Decay = 0.0
    bias_correction: bool = Field(default=True, description="Correct the averages' start at zero.")


class AdamW(_Optimizer):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"] = Field(description="The optimizer.")
    betas: Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: Decay = 0.01


class Muon(_Optimizer):
    """Momentum made orthogonal, for hidden matrices; AdamW, at this rate, for head, embeddings, kernels and vectors."""

    name: Literal["muon"] = Field(description="The optimizer.")
    momentum: Momentum = 0.95
    weight_decay: Decay = 0.1


Optimizer = Annotated[SGD | Nesterov | NAG | Adam | AdamW | Muon, Field(discriminator="name")]


class _Schedule(Section):
    """What all schedules have."""

    name: str
    warmup: Whole = Field(default=0, description="Steps over which the learning rate first rises linearly.")
    warmup_ratio: Share | None = Field(default=None, description="The same as a share of all steps.")

    def problems(self) -> Iterator[Rejection]:
        """One way of saying how long warm-up is."""
        if self.warmup and self.warmup_ratio is not None:
            yield ("warmup_ratio",), "warmup and warmup_ratio say the same twice; give one of them"


class Constant(_Schedule):
    """The same learning rate throughout."""

    name: Literal["constant"] = Field(description="The schedule.")


class Linear(_Schedule):
    """Down to zero at the last step, in a straight line."""

    name: Literal["linear"] = Field(description="The schedule.")
    hold: Share = Field(default=0.0, description="Share of the run, warm-up included, before it begins to fall.")


class Cosine(_Schedule):
    """Down to the floor at the last step, along half a cosine."""

    name: Literal["cosine"] = Field(description="The schedule.")
    floor: Annotated[float, Field(ge=0, le=1)] = Field(default=0.0, description="Where it ends, over the peak.")
    k_decay: Positive = Field(default=1.0, description="Power of the share done, as timm's; below 1 falls earlier.")


class Multistep(_Schedule):
    """Multiplied by a factor at the start of some epochs."""

    name: Literal["multistep"] = Field(description="The schedule.")
    at: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        description="Epochs (completed ones) at which it changes."
    )
    factor: Positive = Field(default=0.1, description="What the learning rate is multiplied by.")

    def problems(self) -> Iterator[Rejection]:
        """Epochs in their order."""
        yield from super().problems()
        if list(self.at) != sorted(set(self.at)):
            yield ("at",), f"epochs must rise, found {', '.join(map(str, self.at))}"


class InverseSqrt(_Schedule):
    """Falling with the square root of the step after warm-up, as transformers are often trained."""

    name: Literal["inverse-sqrt"] = Field(description="The schedule.")
    hold: Whole = Field(default=0, description="Steps at the full rate, behind warm-up, before it begins to fall.")


class OneCycle(_Schedule):
    """Up from 1/25 of the peak over 30 % of the steps, then down to almost nothing."""

    name: Literal["one-cycle"] = Field(description="The schedule.")


Schedule = Annotated[
    Constant | Linear | Cosine | Multistep | InverseSqrt | OneCycle,
    Field(discriminator="name"),
]
