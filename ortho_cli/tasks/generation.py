"""Greedy answers to prompts, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import RecipeError

__all__ = ["bare_model", "greedy_answers", "left_padded"]


def bare_model(model: nn.Module) -> Any:
    """The module inside of `torch.compile`'s and DDP's wrappers."""
    found: Any = getattr(model, "_orig_mod", model)
    return getattr(found, "module", found)


def greedy_answers(
    model: Any, prompts: Sequence[str], *, new_tokens: int, stop: Sequence[str] = (), special: bool = True
) -> list[str]:
    """The likeliest next token again and again, for a batch of prompts at once.

    Args:
        model: a `CausalLM`, whose tokenizer is used.
        prompts: of any lengths; the shorter ones are padded on the left and see none of it.
        new_tokens: at most.
        stop: texts at which an answer ends; they are not part of it.
        special: whether the tokenizer puts its own token at the beginning.

    Returns:
        What follows each prompt.

    Raises:
        RecipeError: the weights are shared out over processes (FSDP), where no single one can generate.
    """
    if not prompts:
        return []
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise RecipeError(
            "answers cannot be generated from weights that are shared out over processes",
            hint="train with task.grader: none, then: ortho evaluate RUN --set task.grader=math",
        )
    import transformers

    make_config: Any = transformers.GenerationConfig
    tokenizer = model.tokenizer
    encoded = tokenizer(list(prompts), add_special_tokens=special).input_ids
    device = next(model.parameters()).device
    ids, mask = (tensor.to(device) for tensor in left_padded(encoded, tokenizer.pad_token_id))
    config = make_config(
        do_sample=False, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, stop_strings=list(stop) or None,
    )  # fmt: skip
    options = {"tokenizer": tokenizer} if stop else {}
    with torch.no_grad():
        found = model.model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **options)
    texts = tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
    return [_until(text, stop) for text in texts]


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, `(B, L)` int64, each row at the right end.

    >>> left_padded([[5], [6, 7]], 0)[0].tolist()
    [[0, 5], [6, 7]]
    """
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _until(text: str, stop: Sequence[str]) -> str:
    ends = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(ends, default=len(text))]
