"""Time a training step through one HRA layer, beside LoRA and PEFT's own HRA on the same frozen weight."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import NumericsError, UsageError

from .hra_layer import HRALayer
from .lora_layer import LoRALayer
from .side_by_side import Timing, check_device, kept_bytes, peak_bytes, shuffled_rounds

__all__ = ["DIMS", "DTYPES", "RANKS", "TOKENS", "Case", "Step", "measure_hra", "missing_peers", "summary"]

DIMS, TOKENS, RANKS = (320, 768, 1280, 2048, 4096), (512, 4096), (8, 32)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS, OUR_LORA, FLOOR = "HRA (ortho)", "LoRA (ortho)", "no adapter"
LORA, LORA_WIDE, THEIR_HRA = "LoRA (PEFT)", "LoRA (PEFT, fp32 adapter)", "HRA (PEFT)"
WARM_UP = 2
# Outputs and gradients agree with PEFT's HRA to these, relative to the largest; bfloat16 has 3 digits.
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (3e-2, 6e-2)}

Run = Callable[[], tuple[Tensor, tuple[Tensor, ...]]]


@dataclass
class Step(Timing):
    """Forward and backward of one kind of layer.

    Attributes:
        kept_bytes: what forward keeps for backward, parameters and the frozen weight excluded.
        peak_bytes: the most memory a step takes beyond what was there before; None on a CPU.
    """

    kept_bytes: int = 0
    peak_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return super().as_dict() | {"kept_bytes": self.kept_bytes, "peak_bytes": self.peak_bytes}


@dataclass
class Case:
    """One size of layer and batch; `steps` has the kinds of layers by name, ours first, the bare frozen layer last."""

    dim: int
    tokens: int
    rank: int
    steps: dict[str, Step] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """What our HRA is held against: PEFT's LoRA, or ours where there is no PEFT."""
        return LORA if LORA in self.steps else OUR_LORA

    def ratios(self) -> dict[str, float]:
        """Our step over each other's, in time; `kept` and `peak`: over the reference's, in bytes."""
        ours, reference = self.steps[OURS], self.steps[self.reference]
        found = {name: ours.median / step.median for name, step in self.steps.items() if name != OURS}
        found["kept"] = ours.kept_bytes / reference.kept_bytes
        if ours.peak_bytes is not None and reference.peak_bytes:
            found["peak"] = ours.peak_bytes / reference.peak_bytes
        return found

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        steps = [step.as_dict() for step in self.steps.values()]
        return {"dim": self.dim, "tokens": self.tokens, "rank": self.rank, "ratios": self.ratios(), "steps": steps}


def measure_hra(
    dims: Sequence[int] = DIMS,
    tokens: Sequence[int] = TOKENS,
    ranks: Sequence[int] = RANKS,
    *,
    dtype: str = "fp32",
    rounds: int = 50,
    seconds: float = 10.0,
    input_grad: bool = True,
    device: str = "cpu",
) -> Iterator[Case]:
    """Time one step of an adapted square layer for every size, each kind of layer once a round in shuffled order.

    Args:
        dims: widths of the frozen `dim x dim` layer.
        tokens: rows of its input.
        ranks: reflections, and the rank of the LoRAs.
        dtype: "fp32" or "bf16", of the frozen weight and the input; HRA's vectors are float32 in both.
        rounds: how often at most.
        seconds: after which a size has been timed enough, once there were a few rounds.
        input_grad: whether the input needs a gradient, as inside a network, or not, as in its first layer.
        device: where.

    Yields:
        A case for each size, as it is measured.

    Raises:
        UsageError: no such device here, or a rank above the width or odd.
        NumericsError: PEFT's HRA gives other outputs or gradients from the same vectors.
    """
    check_device(device)
    for dim, rank in product(dims, ranks):
        if rank % 2 or rank > dim:
            raise UsageError(f"rank {rank} with dim {dim}", hint="ranks are even and at most the width")
    for dim, count, rank in product(dims, tokens, ranks):
        yield _measure(Case(dim, count, rank), dtype, rounds, seconds, input_grad, device)


def missing_peers() -> list[str]:
    """What is not compared with because it is not installed, and how to install it."""
    return [] if find_spec("peft") else [f"{LORA} and {THEIR_HRA} are left out: pip install peft"]


def summary(cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """The median, lowest and highest of each ratio over all cases.

    >>> steps = {OURS: Step(OURS, [1.0], 6), OUR_LORA: Step(OUR_LORA, [2.0], 6)}
    >>> summary([Case(8, 4, 2, steps)])["LoRA (ortho)"]
    {'median': 0.5, 'lowest': 0.5, 'highest': 0.5}
    """
    found: dict[str, list[float]] = {}
    for case in cases:
        for name, ratio in case.ratios().items():
            found.setdefault(name, []).append(ratio)
    return {
        name: {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
        for name, values in found.items()
    }


def _measure(case: Case, dtype: str, rounds: int, seconds: float, input_grad: bool, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(case.dim, case.dim, device=device, dtype=DTYPES[dtype]).requires_grad_(False)
    vectors = torch.randn(case.dim, case.rank, generator=generator)
    x, grad = (torch.randn(case.tokens, case.dim, generator=generator).to(device, DTYPES[dtype]) for _ in range(2))
    x.requires_grad_(input_grad)
    layers = _layers(base, vectors, dtype) | ({FLOOR: base} if input_grad else {})
    runs = {name: _run(layer, x, grad) for name, layer in layers.items()}
    if THEIR_HRA in runs:
        _check_equal(runs[OURS], runs[THEIR_HRA], dtype)
    for name, run in runs.items():
        for _ in range(WARM_UP if name != THEIR_HRA else 0):
            run()
    timed = shuffled_rounds(runs, rounds, device, limit=seconds, slow=(THEIR_HRA,))
    for name, layer in layers.items():
        kept = kept_bytes(partial(layer, x), layer.parameters())
        case.steps[name] = Step(name, timed[name].seconds, kept, peak_bytes(runs[name], device))
    return case


def _layers(base: nn.Linear, vectors: Tensor, dtype: str) -> dict[str, nn.Module]:
    """Every kind of layer around one frozen layer, away from its start; the HRAs with the same vectors."""
    width, rank = vectors.shape
    found: dict[str, nn.Module] = {OURS: HRALayer(base, vectors)}
    found[OUR_LORA] = LoRALayer(base, torch.randn(width, rank), torch.randn(rank, width)).to(base.weight.dtype)
    if missing_peers():
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT's imports look for
        import peft
    put: Any = peft.get_peft_model
    lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"], init_lora_weights=False)
    hra = peft.HRAConfig(r=rank, target_modules=["layer"])
    found[LORA] = _peft_layer(put(nn.ModuleDict({"layer": base}), lora, autocast_adapter_dtype=False))
    if dtype != "fp32":
        found[LORA_WIDE] = _peft_layer(put(nn.ModuleDict({"layer": base}), lora))
    found[THEIR_HRA] = theirs = _peft_layer(put(nn.ModuleDict({"layer": base}), hra))
    with torch.no_grad():
        next(p for p in theirs.parameters() if p.requires_grad).copy_(vectors)
    return found


def _peft_layer(model: Any) -> nn.Module:
    found: nn.Module = model.base_model.model["layer"]
    return found


def _run(layer: nn.Module, x: Tensor, grad: Tensor) -> Run:
    trained = [p for p in layer.parameters() if p.requires_grad] + ([x] if x.requires_grad else [])

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        output = layer(x)
        return output, torch.autograd.grad(output, trained, grad)

    return run


def _check_equal(ours: Run, theirs: Run, dtype: str) -> None:
    """A faster layer that computes something else is no result."""
    (output, gradients), (wanted, wanted_gradients) = ours(), theirs()
    allowed, allowed_gradient = TOLERANCES[dtype]
    limits = [allowed] + [allowed_gradient] * len(gradients)
    for found, peer, limit in zip((output, *gradients), (wanted, *wanted_gradients), limits, strict=True):
        error = float((found - peer).detach().abs().max() / peer.detach().abs().max())
        if not error <= limit:
            raise NumericsError(f"our HRA and PEFT's differ by {error:.1e}, more than {limit:g}")
