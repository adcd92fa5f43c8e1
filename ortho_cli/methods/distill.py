"""Learn from a teacher too: from its softened outputs (distillation), and from where it looks (attention transfer)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli.errors import RecipeError, TargetError

from .method import Context, Method

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import Distill

__all__ = ["DistillMethod", "attention_distance", "distillation_loss"]


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Compare softened class probabilities: :math:`T^2\,KL(p_{teacher}^{1/T} \| p^{1/T})`, a mean over samples.

    Args:
        logits: `(B, classes)`.
        teacher: the teacher's, of the same shape.
        temperature: T; the square keeps the gradient's size whatever it is.

    Returns:
        0-dimensional, differentiable with respect to `logits`, zero where the two agree.

    Reference: Hinton, Vinyals and Dean 2015, arXiv:1503.02531.

    >>> distillation_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 1.0]])).item()
    0.0
    """
    student = F.log_softmax(logits.float() / temperature, -1)
    target = F.log_softmax(teacher.float() / temperature, -1)
    return F.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2


def attention_distance(features: Tensor, teacher: Tensor) -> Tensor:
    """Compare where two networks are active: mean squared difference of attention maps.

    A map is the mean over channels of squared features, flattened and scaled to length 1.

    Args:
        features: `(B, C, H, W)`.
        teacher: `(B, C', H, W)`, of as many places.

    Reference: Zagoruyko and Komodakis 2017, arXiv:1612.03928.

    >>> features = torch.randn(2, 3, 4, 4)
    >>> attention_distance(features, 2 * features).item() < 1e-12
    True
    """
    return (_attention(features) - _attention(teacher)).square().mean()


def _attention(features: Tensor) -> Tensor:
    return F.normalize(features.float().square().mean(1).flatten(1))


class DistillMethod(Method):
    """The recipe's `distill`."""

    name = "distill"

    def __init__(self, config: Distill) -> None:
        super().__init__(config)
        self.notes: list[str] = []
        self.teacher: nn.Module | None = None  # of no module, so that it is neither trained nor saved
        self._precision: dict[str, Any] = {"enabled": False}  # autocast's, in the student's last forward pass
        self._seen: dict[str, Tensor] = {}  # features of the last forward pass, by student layer
        self._taught: dict[str, Tensor] = {}

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Load the teacher, and look into the layers whose attention is compared.

        Raises:
            CheckpointError: the teacher's weights do not fit its architecture.
            RecipeError: the teacher is no run, and `model` does not say what it is.
            TargetError: a layer that the student or the teacher lacks.
        """
        config: Distill = self.config
        modules = dict(model.named_modules())
        for name in config.attention:
            if name not in modules:
                raise TargetError(
                    f"the student has no module {name!r}", hint=f"name some of: {', '.join(list(modules)[1:8])}"
                )
        if context.build is None:  # a dry run: no weights are read
            return
        self.teacher = context.build(self._section()).eval().requires_grad_(False)
        model.register_forward_pre_hook(_keep_precision(self._precision))
        found = dict(self.teacher.named_modules())
        for name in config.attention:
            if name not in found:
                raise TargetError(f"the teacher has no module {name!r}", hint="attention takes names that both have")
            modules[name].register_forward_hook(_keep(self._seen, name, only_learning=True))
            found[name].register_forward_hook(_keep(self._taught, name))
        count = sum(parameter.numel() for parameter in self.teacher.parameters())
        self.notes.append(f"the teacher is a {type(self.teacher).__name__} of {count:,} parameters")

    def _section(self) -> Any:
        """The `model` section that makes the teacher, its weights included."""
        from ortho_cli.recipe.models import HFImage
        from ortho_cli.recipe.train import load_train

        config: Distill = self.config
        run = Path(config.teacher).expanduser() / "recipe.yaml"
        section = config.model
        if section is None:
            if not run.is_file():
                raise RecipeError(
                    f"methods.distill: {config.teacher} is no run of ortho, so its architecture is not known",
                    hint="say what it is: model: {name: resnet110}, or {name: hf-image, base: ID}",
                )
            section = load_train(run).model
        if isinstance(section, HFImage) and not run.is_file():
            return section
        return section.model_copy(update={"base": config.teacher})

    def penalty(self, model: nn.Module, batch: dict[str, Tensor], outputs: Any, phase: str) -> Tensor | None:
        """What is added to the task's loss.

        `alpha (2 distillation / classes - cross-entropy)`, so that together with the task's cross-entropy the paper's
        `(1 - alpha) cross-entropy + 2 alpha distillation` (its mean is over classes too) comes out; and attention.
        """
        config: Distill = self.config
        assert self.teacher is not None, "prepare comes first"
        if "mix" in batch:
            raise RecipeError(
                "methods.distill: with mixup the teacher would not see what the student sees", hint="--set task.mixup=0"
            )
        images = batch["image"]
        if next(self.teacher.parameters()).device != images.device:
            self.teacher.to(images.device)
        with torch.no_grad(), torch.autocast(images.device.type, **self._precision):
            taught = self.teacher(images)
        if taught.shape != outputs.shape:
            raise TargetError(f"the teacher has outputs of shape {tuple(taught.shape)}, not {tuple(outputs.shape)}")
        whole = torch.zeros((), device=images.device)
        if config.alpha:
            soft = 2 / outputs.shape[-1] * distillation_loss(outputs, taught, config.temperature)
            whole = whole + config.alpha * (soft - F.cross_entropy(outputs.float(), batch["label"]))
        for name in config.attention:
            weight = config.beta * 3 / len(config.attention)
            whole = whole + weight * attention_distance(self._seen.pop(name), self._taught.pop(name))
        return whole


def _keep_precision(place: dict[str, Any]) -> Any:
    """A hook that lays down in which arithmetic a module runs: penalties are computed outside the loop's autocast."""

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        device = inputs[0].device.type
        place.update(enabled=torch.is_autocast_enabled(device), dtype=torch.get_autocast_dtype(device))

    return keep


def _keep(place: dict[str, Tensor], name: str, *, only_learning: bool = False) -> Any:
    """A hook that lays a module's output down; for the student not while it is judged."""

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not only_learning or torch.is_grad_enabled():
            place[name] = output

    return keep
