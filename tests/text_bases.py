"""Tiny language models with random weights and a tokenizer of a few words, as folders that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = (
    "the", "a", "cat", "dog", "bird", "sleeps", "runs", "sings", "on", "under", "mat", "tree", "good", "bad", "fine",
    "dull", "film", "it", "is", "was", "very", "not",
)  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 40,
}  # fmt: skip
ONE = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": None}  # as GPT-2 and LLaMA: no token to fill up with
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": {**SMALL, "max_position_embeddings": 42},
    "deberta-v2": {
        **SMALL, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
        "pad_token_id": 0,
    },
    "llama": {**SMALL, **ONE, "num_key_value_heads": 1},
    "mistral": {**SMALL, **ONE, "num_key_value_heads": 1, "sliding_window": None},
    "qwen2": {**SMALL, **ONE, "num_key_value_heads": 1},
    "gpt2": {**ONE, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
}  # fmt: skip
__all__ = ["FAMILIES", "WORDS", "config_of", "save_base", "save_tokenizer"]


def config_of(kind: str, **changes: Any) -> Any:
    """A tiny configuration of a kind, without dropout unless a change says so."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, vocab_size=len(WORDS) + 5, **{**FAMILIES[kind], **changes})
    for name in vars(config):
        if ("dropout" in name or name.endswith("pdrop")) and name not in changes and "classifier" not in name:
            setattr(config, name, 0.0)
    return config


def save_tokenizer(folder: Path) -> None:
    """One token a word; the five special ones of BERT come first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = {word: number for number, word in enumerate((*special, *WORDS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    tokens = {f"{name}_token": token for name, token in names.items()}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **tokens).save_pretrained(folder)


def save_base(folder: Path, kind: str = "bert", loader: str = "AutoModel", **changes: Any) -> Path:
    """A folder with random weights from a fixed seed, and the tokenizer."""
    import transformers

    torch.manual_seed(0)
    getattr(transformers, loader).from_config(config_of(kind, **changes)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
