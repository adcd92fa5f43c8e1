"""SOC in training: chosen convolutions become orthogonal ones (`skew_conv_layer.py`), with new weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ortho_cli.checkpoints.targets import select
from ortho_cli.errors import CheckpointError, TargetError

from .inject import check_seen_once, layer_seed, named_layers, replace_modules
from .method import Context, Method
from .skew_conv_layer import SkewConv2d

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import SOC

__all__ = ["SOCMethod", "skew_conv"]


def skew_conv(conv: nn.Module, *, terms: int = 5, eval_terms: int = 10, seed: int = 0) -> SkewConv2d:
    """Make the orthogonal convolution that can stand where a plain one stands, with a start of its own.

    Raises:
        TargetError: no 2-d convolution, or one of a kind that has no orthogonal form here; with the reason.

    >>> skew_conv(nn.Conv2d(3, 8, 3, stride=2, padding=1))
    SkewConv2d(3, 8, kernel_size=3, stride=2, terms=5, eval_terms=10)
    """
    reason = _obstacle(conv)
    if reason is not None:
        raise TargetError(f"{reason}; an orthogonal convolution has {_WANTED}")
    assert isinstance(conv, nn.Conv2d)
    made = SkewConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.bias is not None,
        terms=terms, eval_terms=eval_terms, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return made.to(conv.weight.device, conv.weight.dtype).train(conv.training)


_WANTED = "a square, odd kernel, one stride, zero padding of half the kernel, no groups and no dilation"


def _obstacle(conv: nn.Module) -> str | None:
    """Why a layer cannot be replaced, if so."""
    if type(conv) is not nn.Conv2d:
        return f"a {type(conv).__name__}, not a plain Conv2d"
    side = conv.kernel_size[0]
    if conv.kernel_size != (side, side) or side % 2 == 0:
        return f"a kernel of {conv.kernel_size}"
    if conv.stride[0] != conv.stride[1]:
        return f"a stride of {conv.stride}"
    if conv.dilation != (1, 1) or conv.groups != 1:
        return f"dilation {conv.dilation} and {conv.groups} groups"
    same = conv.padding == (side // 2, side // 2) or (conv.padding == "same" and conv.stride == (1, 1))
    if conv.padding_mode != "zeros" or not same:
        return f"padding {conv.padding} of {conv.padding_mode}"
    return None


class SOCMethod(Method):
    """The recipe's `soc`."""

    name = "soc"

    def __init__(self, config: SOC) -> None:
        super().__init__(config)
        self.layers: dict[str, SkewConv2d] = {}
        self.notes: list[str] = []

    def chosen(self, model: nn.Module) -> dict[str, list[str]]:
        """The layers that each pattern of the recipe means."""
        layers = named_layers(model)
        return {p: list(select([p], layers, layers.layout, self.config.exclude).layers) for p in self.config.targets}

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Put orthogonal convolutions where the chosen ones are.

        Raises:
            TargetError: a pattern that matches nothing, or a layer that cannot be replaced; with the reason.
            UsageError: a layer inside a block that is computed twice, whose norms would be followed in between.
        """
        names = {name for layers in self.chosen(model).values() for name in layers}
        before = sum(parameter.numel() for parameter in model.parameters())
        new: dict[int, nn.Module] = {}
        for name, module in model.named_modules():
            if name not in names:
                continue
            check_seen_once(model, name)
            try:
                if not name:
                    raise TargetError("the whole model: put it into an nn.Sequential")
                settings = {"terms": self.config.terms, "eval_terms": self.config.eval_terms}
                made = skew_conv(module, seed=layer_seed(context.seed, name), **settings)
            except TargetError as error:
                raise TargetError(f"layer {name!r}: {error.message}", hint=f"leave it out: exclude {name}") from error
            self.layers[name] = new[id(module)] = made
        replace_modules(model, new)
        after = sum(parameter.numel() for parameter in model.parameters())
        based = "; the base's weights of them are not used" if context.base is not None else ""
        self.notes.append(f"{len(new)} orthogonal convolutions: {before:,} -> {after:,} parameters{based}")

    def scalars(self) -> dict[str, float]:
        """How many layers there are."""
        return {"layers": float(len(self.layers))}

    def state(self) -> dict[str, Any]:
        """How often each layer has run in training, which says when its norms are refreshed."""
        return {"passes": {name: layer.passes for name, layer in self.layers.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put it back.

        Raises:
            CheckpointError: other layers.
        """
        if state["passes"].keys() != self.layers.keys():
            differ = sorted(state["passes"].keys() ^ self.layers.keys())
            raise CheckpointError(
                f"the checkpoint has other orthogonal convolutions: {', '.join(differ[:3])}",
                hint="resume with the recipe it was trained with",
            )
        for name, passes in state["passes"].items():
            self.layers[name].passes = passes
