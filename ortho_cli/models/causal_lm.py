"""Any causal language model of `transformers`, by hub id or folder; and a tiny one of random weights that reads bytes.

The wrapper only translates: token ids in, logits out, and of rows with several samples the mask that keeps these apart.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import CheckpointError, UsageError

from .hf_base import Family, Pretrained, load_pretrained, on_meta, read_config, transformers_library

if TYPE_CHECKING:
    from ortho_cli.recipe.instruct import CausalLM as CausalLMConfig
    from ortho_cli.recipe.instruct import TinyLM

__all__ = ["CausalLM", "build", "build_tiny", "byte_tokenizer", "packed_mask"]

FAMILY = Family("AutoModelForCausalLM", "a causal language model", "causal-lm", "text", "meta-llama/Llama-3.2-3B")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEAST = torch.finfo(torch.bfloat16).min  # added where nothing is to be seen; finite in every dtype but float16
LONGEST = 2048  # tokens that the tiny model has positions for
SPECIAL = ("<pad>", "<s>", "</s>")


class CausalLM(Pretrained):
    """A language model that is called like every other model here.

    Args:
        model: what `AutoModelForCausalLM` gives.
        base: where its tokenizer is; None: it reads bytes.
        notes: what the user should know about how it was loaded.

    Shapes: ids `(B, L)` to logits `(B, L, vocabulary)`.
    """

    def __init__(self, model: nn.Module, base: str | None, notes: list[str] | None = None) -> None:
        super().__init__(model, notes)
        self._base = base
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, read when it is first asked for; a model without a padding token pads with its last one.

        Raises:
            CheckpointError: the base has none.
        """
        if self._tokenizer is None:
            self._tokenizer = byte_tokenizer() if self._base is None else _read_tokenizer(self._base)
        return self._tokenizer

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Logits; `position_ids` are given where rows hold several samples, each counted from 0."""
        mask = None if position_ids is None else self._mask(position_ids)
        found: Tensor = self.model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
        ).logits
        return found

    def _mask(self, position_ids: Tensor) -> Tensor | None:
        """The mask as the model's attention takes it: as it is, to be added, or (flash) from the positions alone."""
        kind = str(getattr(self.model.config, "_attn_implementation", "eager"))
        if "flash" in kind:
            return None
        mask = packed_mask(position_ids)
        return mask if kind == "sdpa" else torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, LEAST)


def packed_mask(position_ids: Tensor) -> Tensor:
    """Who may see whom in rows of several samples: `(B, 1, L, L)`, True where a token (row) sees another (column).

    Args:
        position_ids: `(B, L)` counted from 0 in each sample; padding is all zeros, each such token on its own.

    >>> packed_mask(torch.tensor([[0, 1, 0]]))[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    sample = (position_ids == 0).cumsum(1)
    length = position_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
    return ((sample[:, :, None] == sample[:, None, :]) & causal)[:, None]


def build(config: CausalLMConfig) -> nn.Module:
    """The pretrained model of a recipe's `model.base`, or, on the meta device, its architecture alone.

    Raises:
        UsageError: transformers, or what holds weights in fewer bits, is not installed.
        CheckpointError: the base is not found, is no causal language model, or lacks weights.
    """
    found = read_config(FAMILY, config.base)
    options: dict[str, Any] = {"dtype": DTYPES[config.dtype]}
    if config.quantize is not None and not on_meta():
        options["quantization_config"] = _quantization(config.quantize, DTYPES[config.dtype])
    dtype = None if config.quantize is not None and not on_meta() else DTYPES[config.dtype]
    model, notes = load_pretrained(FAMILY, config.base, found, dtype=dtype, options=options)
    if config.quantize is not None:
        model.requires_grad_(False)
    if config.dtype == "bf16":
        notes = [note for note in notes if not note.endswith("to train in")]
    return CausalLM(model, config.base, notes)


def build_tiny(config: TinyLM) -> nn.Module:
    """A LLaMA of the recipe's size with random weights, from torch's global seed.

    Raises:
        UsageError: transformers is not installed.
    """
    library = transformers_library(Family("LlamaForCausalLM", "a LLaMA", "tiny-lm", "text", ""))
    sizes = library.LlamaConfig(
        vocab_size=len(byte_tokenizer()), hidden_size=config.dim,
        intermediate_size=round(config.dim * config.mlp_ratio),
        num_hidden_layers=config.depth, num_attention_heads=config.heads, max_position_embeddings=LONGEST,
        **{f"{name}_token_id": place for place, name in enumerate(("pad", "bos", "eos"))},
    )  # fmt: skip
    return CausalLM(library.LlamaForCausalLM(sizes), None)


def byte_tokenizer() -> Any:
    r"""A tokenizer whose tokens are the 256 bytes, behind those for padding, beginning and end.

    >>> byte_tokenizer()("1é").input_ids
    [1, 19, 130, 105]
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    fast: Any = transformers.PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate((*SPECIAL, *letters))}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    pad, begin, end = SPECIAL
    return fast(
        tokenizer_object=inner, pad_token=pad, bos_token=begin, eos_token=end, clean_up_tokenization_spaces=False
    )


def _read_tokenizer(base: str) -> Any:
    import transformers

    try:
        found = transformers.AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"model.base {base!r} has no tokenizer that opens: {reason}",
            hint="a folder as save_pretrained writes it holds tokenizer.json beside config.json",
        ) from error
    if found.pad_token is None:  # nothing is learnt from padding, and nothing sees it
        found.pad_token = found.eos_token
    return found


def _quantization(bits: str, dtype: torch.dtype) -> Any:
    """How weights are held in fewer bits; the adapter multiplies by them only, so that it need not know."""
    import transformers

    if importlib.util.find_spec("bitsandbytes") is None:  # transformers would say so much later, with a traceback
        raise UsageError(f"model.quantize {bits} needs bitsandbytes", hint="pip install bitsandbytes")
    make: Any = transformers.BitsAndBytesConfig
    if bits == "8bit":
        return make(load_in_8bit=True)
    return make(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
