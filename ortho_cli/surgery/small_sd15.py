"""A small checkpoint with Stable Diffusion 1.5's real names: what `ortho demo` and the tests operate on.

All attention blocks of the UNet, a fifth as wide; the text encoder and autoencoder only as far as their attention.
Random weights: it draws nothing, but every verb treats it as it treats the 4 GB file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.checkpoints import layouts
from ortho_cli.checkpoints.reading import tensor_bytes
from ortho_cli.checkpoints.writer import Piece, computed

from .plan import OutputFile, Plan, Progress, Report, run

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["small_sd15"]

WIDTHS = {320: 64, 640: 128, 1280: 256}  # a fifth
TEXT_WIDTH = 96
# (diffusers block, width in SD1.5, attention blocks in it)
BLOCKS = (
    ("down_blocks.0", 320, 2), ("down_blocks.1", 640, 2), ("down_blocks.2", 1280, 2), ("mid_block", 1280, 1),
    ("up_blocks.1", 1280, 3), ("up_blocks.2", 640, 3), ("up_blocks.3", 320, 3),
)  # fmt: skip


def small_sd15(output: str | Path, *, seed: int = 0, force: bool = False, progress: Progress | None = None) -> Report:
    """Write the small checkpoint (about 55 MB, LDM names, float32, seeded).

    Raises:
        OutputError: see `plan.run`.
    """
    shapes = {canonical: shape for canonical, shape in _shapes()}
    pieces = [
        _random(layouts.canonical_to_ldm(name) or name, layouts.ldm_shape(name, shape), index + 100_003 * seed)
        for index, (name, shape) in enumerate(shapes.items())
    ]
    plan = Plan("demo", [], Path(output), [OutputFile("", pieces, {"format": "pt"})])
    return run(plan, force=force, progress=progress)


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    for block, full, count in BLOCKS:
        width = WIDTHS[full]
        for index in range(count):
            yield from _transformer(f"unet.{block}.attentions.{index}", width)
    yield from _linear("unet.time_embedding.linear_1", 256, 64)
    for layer in range(2):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            name = f"text_encoder.text_model.encoder.layers.{layer}.self_attn.{part}"
            yield from _linear(name, TEXT_WIDTH, TEXT_WIDTH)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _linear(f"vae.encoder.mid_block.attentions.0.{part}", 64, 64)


def _transformer(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    inner = f"{name}.transformer_blocks.0"
    for part in ("norm", "transformer_blocks.0.norm1", "transformer_blocks.0.norm2", "transformer_blocks.0.norm3"):
        yield f"{name}.{part}.weight", (width,)
        yield f"{name}.{part}.bias", (width,)
    for part in ("proj_in", "proj_out"):
        yield f"{name}.{part}.weight", (width, width, 1, 1)
        yield f"{name}.{part}.bias", (width,)
    for attention, text in (("attn1", width), ("attn2", TEXT_WIDTH)):
        yield from _linear(f"{inner}.{attention}.to_q", width, width, bias=False)
        yield from _linear(f"{inner}.{attention}.to_k", width, text, bias=False)
        yield from _linear(f"{inner}.{attention}.to_v", width, text, bias=False)
        yield from _linear(f"{inner}.{attention}.to_out.0", width, width)
    yield from _linear(f"{inner}.ff.net.0.proj", 8 * width, width)
    yield from _linear(f"{inner}.ff.net.2", width, 4 * width)


def _linear(name: str, out: int, inputs: int, *, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, inputs)
    if bias:
        yield f"{name}.bias", (out,)


def _random(name: str, shape: tuple[int, ...], seed: int) -> Piece:
    def produce() -> Iterator[Any]:
        yield tensor_bytes(_values(name, shape, seed))

    return computed(name, "F32", shape, produce)


def _values(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    import torch

    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed)
    values: Tensor = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    return values
