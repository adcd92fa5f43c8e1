"""Variation predictability: a generator rewarded for changes from which a classifier can tell the coordinate moved.

The classifier is the method's own: it learns beside the generator, with an Adam of its own at the generator's rate, and
is saved with the methods' state; the model that is exported knows nothing of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ortho_cli.errors import TargetError

from .method import Context, Method

if TYPE_CHECKING:
    from ortho_cli.recipe.methods_gan import VP

__all__ = ["VPMethod", "moved_codes", "variation_classifier"]

BETAS = (0.5, 0.999)  # of the released code
ADAM = "adam/"  # before the names of its moments; the classifier's own have no slash
SMALLEST, HIDDEN, SLOPE, NORM_EPS = 4, 16, 0.2, 1e-6  # side before the linear layers, and their width


def moved_codes(code: Tensor, drawn: Tensor, latents: int) -> tuple[Tensor, Tensor]:
    """Move one coordinate of each code by a normal amount.

    Args:
        code: ``(B, n)``.
        drawn: ``(B, 2)`` in [0, 1): which coordinate, and how far.
        latents: leading columns, which are the coordinates.

    Returns:
        The moved codes, and which coordinate ``(B,)`` int64.

    >>> moved_codes(torch.zeros(1, 3), torch.tensor([[0.6, 0.5]]), 2)[1].tolist()
    [1]
    """
    which = (drawn[:, 0] * latents).long().clamp(max=latents - 1)
    far = torch.special.ndtri(drawn[:, 1].double().clamp(min=2.0**-54)).to(code)
    return code + F.one_hot(which, code.shape[1]).to(code) * far[:, None], which


def variation_classifier(channels: int, side: int, latents: int, width: int) -> nn.Sequential:
    """The release's network: convolutions of stride two down to 4 x 4, instance norm from the second on, two layers.

    Its five convolutions are for 128 pixels alone; here there are as many as a side asks for.
    """
    layers: list[nn.Module] = []
    before = channels
    while side > SMALLEST:
        first = not layers
        layers.append(nn.Conv2d(before, width, 4, 2, 1, bias=first))
        layers += [*([] if first else [nn.InstanceNorm2d(width, eps=NORM_EPS, affine=True)]), nn.LeakyReLU(SLOPE)]
        before, side = width, side // 2
    head = [nn.Flatten(), nn.Linear(before * side**2, HIDDEN), nn.LeakyReLU(SLOPE), nn.Linear(HIDDEN, latents)]
    return nn.Sequential(*layers, *head)


class VPMethod(Method):
    """The recipe's `vp`."""

    name = "vp"

    def __init__(self, config: VP) -> None:
        super().__init__(config)
        self.latents = 0
        self.classifier: nn.Module = nn.Identity()
        self.optimizer: torch.optim.Adam | None = None
        self._sums: list[Tensor] = []  # of this step's samples: gradients, those told, and how many there are
        self._told: Tensor | None = None

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Make the classifier for the pictures that the generator makes.

        Raises:
            TargetError: a model without a generator.
        """
        if not hasattr(model, "generator"):
            raise TargetError(f"vp is of a generator, and the task {context.task} has none", hint="remove it")
        generator: Any = model.get_submodule("generator")
        self.latents = len(generator.latents)
        training = generator.training
        with torch.no_grad():
            like = next(generator.parameters())
            shape = generator.eval()(like.new_zeros(2, generator.noise_dim)).shape
        generator.train(training)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(context.seed)
            self.classifier = variation_classifier(shape[1], shape[2], self.latents, self.config.width)
        self.optimizer = torch.optim.Adam(self.classifier.parameters(), betas=BETAS)

    def penalty(self, model: nn.Module, batch: dict[str, Tensor], outputs: Any, phase: str) -> Tensor | None:
        """How badly the classifier tells which coordinate was moved: a gradient for the generator alone.

        What the classifier learns from the same pictures is kept for `after_step`; the penalty's weight is no part of
        it, where the release scales the classifier's gradient down with the generator's.
        """
        if phase != "generator" or not self.config.penalty:
            return None
        generator: Any = model.get_submodule("generator")
        code: Tensor = outputs["noise"]
        self._place(code.device)
        moved, which = moved_codes(code, outputs["uniform"](2), self.latents)
        difference = (generator(code) - generator(moved)).float()
        labels = F.one_hot(which, self.latents).float()
        logits = self.classifier(difference.detach())
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        gradients = torch.autograd.grad(len(code) * loss, list(self.classifier.parameters()))
        right = (logits.detach().argmax(1) == which).sum().float()
        self._add([*gradients, right, torch.full_like(right, len(code))])
        fixed = {name: each.detach() for name, each in self.classifier.named_parameters()}
        told = functional_call(self.classifier, fixed, (difference,))
        return float(self.config.penalty) * F.binary_cross_entropy_with_logits(told, labels)

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, phase: str) -> bool:
        """Let the classifier learn, at the rate that the generator has, from the samples of all processes."""
        if phase == "generator" and self._sums:
            assert self.optimizer is not None, "prepare comes first"
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                for each in self._sums:
                    dist.all_reduce(each)
            *gradients, right, count = self._sums
            for parameter, gradient in zip(self.classifier.parameters(), gradients, strict=True):
                parameter.grad = gradient / count
            self.optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
            self.optimizer.step()
            self._told, self._sums = right / count, []
        return False

    def state(self) -> dict[str, Any]:
        """The classifier and its moments."""
        assert self.optimizer is not None, "prepare comes first"
        tensors = dict(self.classifier.state_dict())
        for name, parameter in self.classifier.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{ADAM}{name}/{key}": value for key, value in moments.items()}
        return {"tensors": tensors}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put them back; to judge a run they are not needed, and a published one has none."""
        tensors: dict[str, Tensor] = state.get("tensors", {})
        if not tensors:
            return
        assert self.optimizer is not None, "prepare comes first"
        self.classifier.load_state_dict({key: value for key, value in tensors.items() if not key.startswith(ADAM)})
        parameters = dict(self.classifier.named_parameters())
        for key, value in tensors.items():
            if key.startswith(ADAM):
                name, _, moment = key.removeprefix(ADAM).rpartition("/")
                self.optimizer.state[parameters[name]][moment] = value.clone()

    def scalars(self) -> dict[str, float]:
        """The share of the last step's pairs whose coordinate the classifier told."""
        return {} if self._told is None else {"accuracy": float(self._told)}

    def _add(self, found: list[Tensor]) -> None:
        """Sum up over the parts of a batch."""
        self._sums = [mine + other for mine, other in zip(self._sums, found, strict=True)] if self._sums else found

    def _place(self, device: torch.device) -> None:
        """Move the classifier, and what is known of it, to where the generator works."""
        assert self.optimizer is not None, "prepare comes first"
        if next(self.classifier.parameters()).device == device:
            return
        self.classifier.to(device)  # in place, so that the optimizer goes on with the same parameters
        for moments in self.optimizer.state.values():
            moments |= {key: value.to(device) for key, value in moments.items() if value.dim()}
