"""Time a training step of a whole language model with each adapter: HRA and LoRA, ours and PEFT's, and PEFT's OFT.

All stand on the same frozen weights, which are in memory once.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import NumericsError, UsageError
from ortho_cli.methods.adapter_layer import adapter_layers
from ortho_cli.methods.add import insert_hra, insert_lora
from ortho_cli.methods.inject import choose
from ortho_cli.methods.side_by_side import Timing, check_device, kept_bytes, peak_bytes, shuffled_rounds, threads_of
from ortho_cli.models.causal_lm import FAMILY
from ortho_cli.models.hf_base import Pretrained, load_pretrained, read_config, transformers_library

__all__ = ["DTYPES", "HRA", "LORA", "PEERS", "SMALL", "LLMTiming", "measure_llm", "missing_peers"]

HRA, LORA = "HRA (ortho)", "LoRA (ortho)"
PEERS = THEIR_LORA, THEIR_HRA, THEIR_OFT = "LoRA (PEFT)", "HRA (PEFT)", "OFT (PEFT)"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL: dict[str, int] = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 4096,
}  # fmt: skip
OFT_BLOCK = 32  # PEFT's default, where the widths allow it
LR = 1e-4
SPREAD = 0.1  # how far the two HRAs are from their start when they are compared
TOLERANCES = {"fp32": 1e-4, "bf16": 6e-2}  # of logits, relative to the largest; bfloat16 has 3 digits


@dataclass
class LLMTiming(Timing):
    """Seconds of every training step with one adapter.

    Attributes:
        tokens: of a step.
        ratio: tokens a second over those of the reference, PEFT's LoRA, or ours where there is no PEFT.
        kept_bytes: what forward keeps for backward, weights excluded.
        kept_ratio: the same over the reference's.
        peak_bytes: the most memory a step takes beyond what was there before; None on a CPU.
        trained: parameters that train.
    """

    tokens: int = 0
    ratio: float = 1.0
    kept_bytes: int = 0
    kept_ratio: float = 1.0
    peak_bytes: int | None = None
    trained: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return super().as_dict() | {
            "tokens_per_second": self.tokens / self.median, "ratio": self.ratio, "kept_bytes": self.kept_bytes,
            "kept_ratio": self.kept_ratio, "peak_bytes": self.peak_bytes, "trained": self.trained,
        }  # fmt: skip


def measure_llm(
    base: str | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    rank: int = 8,
    targets: Sequence[str] = ("auto",),
    batch: int = 2,
    length: int = 256,
    dtype: str = "fp32",
    checkpointing: bool = False,
    rounds: int = 7,
    threads: int | None = None,
    device: str = "cpu",
) -> list[LLMTiming]:
    """Time forward, backward and an AdamW step of the next-token loss with each adapter, in shuffled rounds.

    Args:
        base: a folder or hub id; None: a LLaMA of random weights.
        sizes: of the random model, by LlamaConfig's names, over those of `SMALL`.
        rank: of HRA and LoRA; even.
        targets: the layers that have adapters.
        batch: rows of tokens.
        length: tokens of a row, random ones.
        dtype: of the frozen weights.
        checkpointing: recompute activations in backward.
        rounds: how often each runs.
        threads: of the CPU; None: torch's choice.
        device: where.

    Returns:
        One timing for each adapter: ours first, then the reference's.

    Raises:
        UsageError: no such device, an odd rank, or sizes of a model that has its own.
        NumericsError: PEFT's HRA gives other logits from the same vectors.

    Cost: the frozen weights once, and all adapters with their moments at the same time.
    """
    check_device(device)
    if rank % 2:
        raise UsageError(f"rank {rank} is odd: such a chain is no rotation", hint=f"use {rank + 1}")
    if base is not None and sizes:
        raise UsageError(f"{base} has sizes of its own", hint="leave out the model, or the sizes")
    with threads_of(threads):
        model = _model(base, sizes or {}, DTYPES[dtype]).to(device)
        if checkpointing:
            Pretrained(model).gradient_checkpointing_enable()
        generator = torch.Generator().manual_seed(0)
        vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        ids = torch.randint(vocabulary, (batch, length), generator=generator).to(device)
        adapted = _adapted(model, rank, choose(model, list(targets)))
        if THEIR_HRA in adapted:
            _check_equal(adapted[HRA], adapted[THEIR_HRA], ids, TOLERANCES[dtype])
        steps = {name: _step(each, ids) for name, each in adapted.items()}
        for step in steps.values():
            step()  # warm, and with moments
        timed = shuffled_rounds(steps, rounds, device, slow=(THEIR_HRA,))
        kept = {name: kept_bytes(partial(_loss, each, ids), each.parameters()) for name, each in adapted.items()}
        reference = THEIR_LORA if THEIR_LORA in adapted else LORA
        return [
            LLMTiming(
                name, timed[name].seconds, ids.numel(), timed[reference].median / timed[name].median, kept[name],
                kept[name] / kept[reference], peak_bytes(steps[name], device), _trained(each),
            )
            for name, each in adapted.items()
        ]  # fmt: skip


def missing_peers() -> list[str]:
    """What is not compared with because it is not installed, and how to install it."""
    return [] if find_spec("peft") else [f"{', '.join(PEERS)} are left out: pip install peft"]


def _model(base: str | None, sizes: Mapping[str, int], dtype: torch.dtype) -> nn.Module:
    if base is not None:
        model, _ = load_pretrained(FAMILY, base, read_config(FAMILY, base), dtype=dtype)
    else:
        library = transformers_library(FAMILY)
        known = vars(library.LlamaConfig())
        unknown = [name for name in sizes if name not in known]
        if unknown:
            raise UsageError(f"LlamaConfig has no {unknown[0]!r}", hint=f"e.g. {', '.join(SMALL)}")
        from huggingface_hub.errors import StrictDataclassError

        try:
            config = library.LlamaConfig(**{**SMALL, **sizes})
        except (ValueError, StrictDataclassError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise UsageError(f"no LLaMA has such sizes: {reason}", hint="its heads share hidden_size evenly") from error
        torch.manual_seed(0)
        model = library.AutoModelForCausalLM.from_config(config).to(dtype)
    model.config.use_cache = False  # type: ignore[union-attr]
    return model.requires_grad_(False).train()


def _adapted(model: nn.Module, rank: int, names: list[str]) -> dict[str, nn.Module]:
    """The model with each adapter in turn, on the same weights, as it starts."""
    found: dict[str, nn.Module] = {}
    for name, insert in ((HRA, insert_hra), (LORA, insert_lora)):
        found[name] = _on_same_weights(model)
        insert(found[name], rank, names)
    if missing_peers():
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT's imports look for
        import peft

        block = gcd(OFT_BLOCK, *(layer.geometry.width for layer in adapter_layers(found[HRA]).values()))
        configs = {
            THEIR_LORA: peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names),
            THEIR_HRA: peft.HRAConfig(r=rank, target_modules=names),
            THEIR_OFT: peft.OFTConfig(r=0, oft_block_size=block, target_modules=names),
        }
        for name, config in configs.items():
            found[name] = peft.get_peft_model(_on_same_weights(model), config)
    return found


def _on_same_weights(model: nn.Module) -> nn.Module:
    """Another model of the same tensors, which may be taken apart."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _check_equal(ours: nn.Module, theirs: Any, ids: Tensor, limit: float) -> None:
    """A faster adapter that computes something else is no result: both from the same vectors, away from their start."""
    generator = torch.Generator().manual_seed(1)
    start = {}
    for name, layer in adapter_layers(ours).items():
        for vectors in layer.adapter_parameters():
            start[vectors] = vectors.detach().clone()
            noise = SPREAD * torch.randn(vectors.shape, generator=generator)
            peer = theirs.base_model.model.get_submodule(name).hra_u["default"]
            with torch.no_grad():
                vectors.add_(noise.to(vectors))
                start[peer] = peer.clone()
                peer.copy_(vectors)
    with torch.no_grad():
        found, wanted = ours(input_ids=ids).logits.float(), theirs(input_ids=ids).logits.float()
        for vectors, before in start.items():
            vectors.copy_(before)
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if not error <= limit:
        raise NumericsError(f"logits of our HRA and of PEFT's differ by {error:.1e}, more than {limit:g}")


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def _step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], LR)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(_loss(model, ids))
        optimizer.step()

    return step


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
