"""Layer names and weight shapes of language models, generated as the hub's files have them."""

from __future__ import annotations

from sd15_shapes import Shapes


def deberta(layers: int = 12, width: int = 768) -> Shapes:
    """DeBERTaV3-base as the hub has it: encoder, both pretraining heads, pooler and classifier of a fine-tune."""
    names: Shapes = {"deberta.embeddings.word_embeddings": (128100, width)}
    for i in range(layers):
        block = f"deberta.encoder.layer.{i}."
        for part in ("query_proj", "key_proj", "value_proj"):
            names[f"{block}attention.self.{part}"] = (width, width)
        names[block + "attention.output.dense"] = (width, width)
        names[block + "intermediate.dense"] = (4 * width, width)
        names[block + "output.dense"] = (width, 4 * width)
    return {
        **names,
        "deberta.encoder.rel_embeddings": (512, width),
        "lm_predictions.lm_head.dense": (width, width),
        "mask_predictions.dense": (width, width),
        "pooler.dense": (width, width),
        "classifier": (3, width),
    }


def llama(layers: int = 32, width: int = 4096) -> Shapes:
    names: Shapes = {"model.embed_tokens": (32000, width)}
    for i in range(layers):
        names |= {f"model.layers.{i}.self_attn.{part}_proj": (width, width) for part in "qkvo"}
        names |= {f"model.layers.{i}.mlp.{part}_proj": (11008, width) for part in ("gate", "up")}
        names[f"model.layers.{i}.mlp.down_proj"] = (width, 11008)
    return {**names, "lm_head": (32000, width)}


def minilm() -> Shapes:
    names: Shapes = {f"embeddings.{kind}_embeddings": (30, 384) for kind in ("word", "position", "token_type")}
    for i in range(6):
        block = f"encoder.layer.{i}."
        names |= {f"{block}attention.self.{part}": (384, 384) for part in ("query", "key", "value")}
        names |= {block + "attention.output.dense": (384, 384), block + "intermediate.dense": (1536, 384)}
        names[block + "output.dense"] = (384, 1536)
    return {**names, "pooler.dense": (384, 384)}
