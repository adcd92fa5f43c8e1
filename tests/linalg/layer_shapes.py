"""The layers of the networks whose published counts the tests repeat: shapes only, no model is built."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ortho_cli.linalg.ranks import LayerSize


@dataclass
class Network:
    """Convolutions that are factored, as `(out, in, kernel)`, and the parameters of all the rest."""

    convolutions: list[tuple[int, int, int]] = field(default_factory=list)
    others: int = 0

    def sizes(self, square: bool = False) -> list[LayerSize]:
        return [LayerSize(out * k, inputs * k, True, square=square) for out, inputs, k in self.convolutions]

    @property
    def parameters(self) -> int:
        return self.others + sum(size.dense for size in self.sizes())


def vgg19(classes: int) -> Network:
    """16 convolutions with batch norm and one linear layer; all convolutions but the first are factored."""
    widths = [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    pairs = list(zip(widths[1:], widths, strict=False))
    return Network(
        [(out, inputs, 3) for out, inputs in pairs],
        64 * 3 * 9 + 2 * sum(widths) + classes * 512 + classes,
    )


def stages(widths: Iterable[int], blocks: int, stem: int) -> list[tuple[int, int]]:
    """`(out, in)` of every residual block."""
    found = []
    for width in widths:
        for _ in range(blocks):
            found.append((width, stem))
            stem = width
    return found


def resnet32x2(classes: int) -> Network:
    """Widths 64, 128, 256, five blocks each; 1x1 projections with a norm of their own are factored as well."""
    net = Network([], 64 * 3 * 9 + 2 * 64 + classes * 256 + classes)
    for out, inputs in stages((64, 128, 256), 5, 64):
        net.convolutions += [(out, inputs, 3), (out, out, 3)]
        net.others += 4 * out
        if out != inputs:
            net.convolutions.append((out, inputs, 1))
            net.others += 2 * out
    return net


def wide_resnet28x10(classes: int = 10) -> Network:
    """Pre-activation blocks of widths 160, 320, 640, four each; 1x1 shortcuts are factored as well."""
    net = Network([], 16 * 3 * 9 + 2 * 640 + classes * 640 + classes)
    for out, inputs in stages((160, 320, 640), 4, 16):
        net.convolutions += [(out, inputs, 3), (out, out, 3)]
        net.others += 2 * inputs + 2 * out
        if out != inputs:
            net.convolutions.append((out, inputs, 1))
    return net


def cifar_resnet(depth: int, classes: int) -> Network:
    """Widths 16, 32, 64 with shortcuts that have no parameters; both convolutions of every block are factored."""
    net = Network([], 16 * 3 * 9 + 2 * 16 + classes * 64 + classes)
    for out, inputs in stages((16, 32, 64), (depth - 2) // 6, 16):
        net.convolutions += [(out, inputs, 3), (out, out, 3)]
        net.others += 4 * out
    return net
