"""The configurations of bases that shipped recipes name: a dry run then needs neither network nor a licence accepted.

Only what differs from the library's defaults for the kind. A real run reads the base's own configuration.
"""

from __future__ import annotations

from typing import Any

__all__ = ["KNOWN"]

KNOWN: dict[str, dict[str, Any]] = {
    "microsoft/deberta-v3-base": {
        "model_type": "deberta-v2", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "vocab_size": 128_100, "type_vocab_size": 0, "relative_attention": True,
        "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False, "max_relative_positions": -1, "layer_norm_eps": 1e-7,
    },
    "sentence-transformers/all-MiniLM-L6-v2": {
        "model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
        "intermediate_size": 1536, "vocab_size": 30_522,
    },
    "meta-llama/Llama-2-7b-hf": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 11_008, "vocab_size": 32_000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    },
    "meta-llama/Llama-3.2-3B": {
        "model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "vocab_size": 128_256,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""By hub id."""
