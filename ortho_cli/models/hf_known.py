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
}  # fmt: skip
"""By hub id."""
