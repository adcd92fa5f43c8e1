"""Values of an `adapter_config.json`, checked as they are taken out: the file comes from a stranger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortho_cli.checkpoints.header import printable
from ortho_cli.errors import CheckpointError

from .layer_patterns import compiled, is_plain, names_end

__all__ = ["layer_value", "number", "refuse_unsupported"]

LIMIT = 1e18  # no rank, alpha or eps is near it; a longer integer does not even become a float
MAX_EXPRESSIONS = 64  # each is tried on each layer
# LoRA options under which B A is not what is added to the weight; value: why such an adapter cannot be merged.
UNSUPPORTED = {
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "BD-LoRA stores block-diagonal factors",
    "arrow_config": "Arrow routes between adapters by input",
    "kasa_config": "KaSA truncates the base weight",
    "target_parameters": "it adapts bare parameters (experts), not layers",
    "layer_replication": "it repeats layers of the base",
}


def refuse_unsupported(peft_type: str, config: Mapping[str, Any], where: str) -> None:
    """Refuse LoRA variants that are not `scale * B A`, by name.

    Raises:
        CheckpointError: the option and the reason.
    """
    if peft_type != "LORA":
        return
    for option, reason in UNSUPPORTED.items():
        if config.get(option):
            raise CheckpointError(f"a LoRA with {option} cannot be read as a change of weights: {reason}", where=where)


def number(config: Mapping[str, Any], key: str, default: float, where: str, *, least: float = -LIMIT) -> float:
    """A number of the configuration, `default` where it is absent, at least `least`.

    >>> number({"r": 4}, "r", 8, "adapter_config.json")
    4
    """
    return _as_number(config.get(key, default), key, where, least)


def layer_value(config: Mapping[str, Any], key: str, layer: str, default: float, where: str) -> float:
    """A per-layer number (`rank_pattern`, `alpha_pattern`), found as PEFT does.

    The first key of the pattern that, as a regular expression, matches the layer's name or its end after a dot.

    Raises:
        CheckpointError: no number, or a key that is no regular expression, or one that could take for ever.

    >>> layer_value({"rank_pattern": {"attn.*to_q": 16}}, "rank_pattern", "blocks.0.attn1.to_q", 8, "")
    16
    """
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{key} is not a map from layers to numbers", where=where)
    expressions = 0
    for pattern, value in patterns.items():
        if is_plain(pattern):
            matched = names_end(layer, pattern)
        else:
            expressions += 1
            if expressions > MAX_EXPRESSIONS:
                raise CheckpointError(f"{key} holds over {MAX_EXPRESSIONS} regular expressions", where=where)
            matched = compiled(pattern, key, layer, where).match(layer) is not None
        if matched:
            return _as_number(value, key, where)
    return default


def _as_number(value: Any, key: str, where: str, least: float = -LIMIT) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= LIMIT:
        raise CheckpointError(
            f"configuration field {key} is {printable(str(value))!r}, a number was expected", where=where
        )
    return value
