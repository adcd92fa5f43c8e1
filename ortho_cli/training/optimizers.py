"""Optimizers by their recipe, and which parameters they decay.

torch's own where it has one; two that papers of this field used and torch lacks are written out: fairseq's Nesterov
(`nag`, which looks ahead with the *current* learning rate) and Adam without bias correction (BERT's).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import RecipeError
from ortho_cli.methods.adapter_layer import whole

__all__ = [
    "NAG", "UncorrectedAdam", "build_optimizer", "clip_gradients", "keep_moments", "parameter_groups",
    "set_learning_rate",
]  # fmt: skip

NORMS = (
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm, nn.LocalResponseNorm,
)  # fmt: skip
MATRIX = 2  # axes; what has fewer is not decayed
ENDS = "ends"  # key of a group: ids of parameters that muon leaves to AdamW though they are matrices


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_norms: bool, claimed: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Trainable parameters as optimizer groups: decayed, undecayed, and those that methods claimed for themselves.

    Args:
        model: parameters with ``requires_grad`` count, each once.
        weight_decay: of the decayed group.
        decay_norms: also decay norms, biases and other vectors; norms are told by their module, not by their name.
        claimed: groups from `Method.param_groups`, of which the model's parameters count; their keys win over the
            optimizer's.

    Returns:
        Groups in a fixed order, empty ones left out; each with `ENDS`, which is for `build_optimizer`.

    Raises:
        RecipeError: a parameter that two methods claim.
    """
    own = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    claimed = [{**group, "params": [each for each in group["params"] if id(each) in own]} for group in claimed]
    taken = set[int]()
    for parameter in [each for group in claimed for each in group["params"]]:
        if id(parameter) in taken:
            raise RecipeError(
                f"two methods want settings of their own for {own[id(parameter)]} (a rate, or another decay)",
                hint="exclude its layer from one of them",
            )
        taken.add(id(parameter))
    plain: list[nn.Parameter] = []
    bare: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in taken:
                continue
            taken.add(id(parameter))
            undecayed = not decay_norms and (isinstance(module, NORMS) or name == "bias" or parameter.dim() < MATRIX)
            (bare if undecayed else plain).append(parameter)
    groups = [
        {"params": plain, "weight_decay": weight_decay},
        {"params": bare, "weight_decay": 0.0},
        *({"weight_decay": weight_decay, **group} for group in claimed),
    ]
    ends = _ends(model)
    return [{**group, ENDS: ends} for group in groups if group["params"]]


def _ends(model: nn.Module) -> frozenset[int]:
    """Ids of the parameters of embeddings, and of the head: the last module that keeps a matrix of its own."""
    keepers = [
        module
        for module in model.modules()
        if not isinstance(module, NORMS) and any(each.dim() >= MATRIX for each in module.parameters(recurse=False))
    ]
    ends = [*(module for module in keepers if isinstance(module, nn.Embedding)), *keepers[-1:]]
    return frozenset(id(parameter) for module in ends for parameter in module.parameters(recurse=False))


def build_optimizer(config: Any, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that a recipe's `optimizer` section names, over `parameter_groups`.

    Raises:
        RecipeError: muon, and no matrix to orthogonalise.
    """
    ends = frozenset[int]().union(*(group.get(ENDS, ()) for group in groups))
    groups = [{key: value for key, value in group.items() if key != ENDS} for group in groups]
    optimizer = _muon(config, groups, ends) if config.name == "muon" else _optimizer(config, groups)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to `factor` times the one it was made with."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


@torch.no_grad()
def clip_gradients(optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
    """Scale all gradients of an optimizer down together where their norm is above `limit`; gives the norm before."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return whole(torch.nn.utils.clip_grad_norm_(parameters, limit))


def keep_moments(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Hand what an optimizer knows of its parameters to the one that follows it."""
    for group in new.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]


def _optimizer(config: Any, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    lr = config.lr
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum)
    if config.name == "nesterov":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=True)
    if config.name == "nag":
        return NAG(groups, lr=lr, momentum=config.momentum)
    if config.name == "adam" and not config.bias_correction:
        return UncorrectedAdam(groups, lr=lr, betas=tuple(config.betas), eps=config.eps)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=lr, betas=tuple(config.betas), eps=config.eps)


class NAG(torch.optim.Optimizer):
    """Nesterov's accelerated gradient in fairseq's form, which rescales momentum when the learning rate changes."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"], state["lr"] = torch.zeros_like(parameter), lr
                buffer: Tensor = state["momentum_buffer"]
                correction = lr / state["lr"] if state["lr"] > 0 else lr
                if decay:
                    parameter.mul_(1 - lr * decay)
                parameter.add_(buffer, alpha=momentum * momentum * correction)
                parameter.add_(parameter.grad, alpha=-(1 + momentum) * lr)
                buffer.mul_(momentum * correction).add_(parameter.grad, alpha=-lr)
                state["lr"] = lr
        return loss


class UncorrectedAdam(torch.optim.Optimizer):
    """Adam whose moments are used as they are, with decoupled decay (BERT's optimizer, and DeBERTa's XAdam)."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-group["lr"])
        return loss


class _Pair(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer to the loop."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__([{**group, "params": list(group["params"])} for group in groups], {})
        self._link()
        muon, *rest = [sum(each.numel() for g in part.param_groups for each in g["params"]) for part in self.parts]
        self.notes = (f"optimizer: muon trains {muon:,} parameters, adamw {sum(rest):,}",)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; accelerate calls it to move moments to the device."""
        super().load_state_dict(state_dict)
        self._link()

    def _link(self) -> None:
        """Give the parts this optimizer's own groups and state: a changed rate or a restored moment reaches them."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each part."""
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss


def _muon(config: Any, groups: list[dict[str, Any]], ends: Container[int]) -> torch.optim.Optimizer:
    """Muon for matrices but the model's ends, and AdamW for the rest; torch's Muon takes no kernels."""
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for group in groups:
        for wanted, kept in ((True, matrices), (False, others)):
            chosen = [each for each in group["params"] if (each.dim() == MATRIX and id(each) not in ends) is wanted]
            if chosen:
                kept.append({**group, "params": chosen})
    if not matrices:
        raise RecipeError(
            "optimizer: muon is for matrices of hidden layers, and none trains here (embeddings, the head and the "
            "kernels of convolutions are AdamW's)",
            hint="use adamw",
        )
    parts: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, lr=config.lr, momentum=config.momentum)]
    if others:
        parts.append(torch.optim.AdamW(others, lr=config.lr))
    return _Pair(parts)
