"""PEFT adapters: `adapter_config.json` says how the tensors act, their names say on which layer.

Names are `base_model.model.<layer>.<role>`, in a state dict of a live model with the adapter's name in between. What
is no factor of a layer (saved modules, biases, token rows) goes to `peft_extras`. Rules as of PEFT 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ortho_cli.checkpoints.adapters import AdapterLayer, Addition
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.errors import CheckpointError

from . import peft_extras
from .contents import Contents, Dialect, unclaimed
from .kinds import check_layer, rank_of
from .peft_config import layer_value, number, refuse_unsupported

__all__ = ["DIALECT", "PREFIX", "read_peft"]

PREFIX = "base_model.model."
# Suffix of a tensor name -> role, for each type that is read; the type's kind stands first.
TYPES: dict[str, tuple[str, dict[str, str]]] = {
    "HRA": ("hra", {"hra_u": "vectors"}),
    "LORA": (
        "lora",
        {
            "lora_A.weight": "down", "lora_B.weight": "up", "lora_B.bias": "bias",
            "lora_embedding_A": "down", "lora_embedding_B": "up",
            "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
            "alpha": "alpha",  # never in a PEFT folder; some single files of diffusers have it
        },
    ),
    "LOHA": ("loha", {f"hada_{role}": role for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}),
    "LOKR": ("lokr", {f"lokr_{role}": role for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}),
    "OFT": ("oft", {"oft_R.weight": "skew", "oft_embedding_R.weight": "skew", "oft_r": "vectors"}),
    "BOFT": ("boft", {"boft_R": "blocks", "boft_s": "scale"}),
}  # fmt: skip
LLAMA_EPS = 1e-4  # what the HRA authors' LLaMA scripts train with, where their config does not say


def read_peft(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], where: str) -> tuple[str, Contents]:
    """Read a PEFT adapter: the dialect (`peft`, or `hra-llama`) and its contents.

    Raises:
        CheckpointError: a type or an option that is not read, a name that no rule claims, or factors that do not
            fit the configuration.
    """
    peft_type = str(config.get("peft_type", "")).upper()
    if peft_type not in TYPES:
        raise CheckpointError(
            f"PEFT adapters of type {peft_type or 'none'} are not read",
            hint=f"read are {', '.join(TYPES)}",
            where=where,
        )
    kind, roles = TYPES[peft_type]
    refuse_unsupported(peft_type, config, where)
    found: dict[str, dict[str, TensorInfo]] = {}
    embeddings: set[str] = set()
    rest: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        key = name.removeprefix(PREFIX)
        layer, suffix = _split(key, roles)
        if not suffix:
            rest[key] = info
            continue
        if found.setdefault(layer, {}).setdefault(roles[suffix], info) is not info:
            raise CheckpointError(f"{name!r} and {found[layer][roles[suffix]].name!r} are the same factor", where=where)
        if "embedding" in suffix:
            embeddings.add(layer)
    dialect = "peft"
    if peft_type == "OFT" and any("vectors" in parts for parts in found.values()):
        dialect, kind = "hra-llama", "hra"
    contents = Contents()
    for layer, parts in found.items():
        bias = parts.pop("bias", None)
        made = check_layer(layer, AdapterLayer(kind, parts, _options(dialect, kind, parts, config, layer, where)))
        made = _with_embedding(made, layer in embeddings)
        contents.layers[layer] = made
        if bias is not None:
            contents.additions[f"{layer}.bias"] = Addition(bias, float(str(made.options["scale"])))
    left = peft_extras.read_extras(rest, config, contents, where)
    if left:
        known = [info.name for parts in found.values() for info in parts.values()]
        raise unclaimed([info.name for info in left.values()], known or [f"layer.{role}" for role in roles], where)
    _note(dialect, peft_type, config, contents)
    return dialect, contents


def _split(key: str, roles: Mapping[str, str]) -> tuple[str, str]:
    """Layer and suffix of a tensor name, ("", "") where it ends in none of the type's suffixes."""
    for form in (key, re.sub(r"\.default(?=\.weight$|\.bias$|$)", "", key)):
        for suffix in roles:
            if form.endswith(f".{suffix}"):
                return form[: -len(suffix) - 1], suffix
    return "", ""


def _options(
    dialect: str, kind: str, parts: Mapping[str, TensorInfo], config: Mapping[str, Any], layer: str, where: str
) -> dict[str, object]:
    """How one layer acts, from the configuration."""
    if dialect == "hra-llama":
        vectors = parts.get("vectors")
        if vectors is not None and len(vectors.shape) != 2:
            raise CheckpointError(
                f"layer {layer!r}: an OFT adapter of PEFT before 0.16 (oft_r {vectors.shape}) is not read",
                hint="its blocks act otherwise than today's; load it with that PEFT, merge, and use the merged model",
                where=where,
            )
        return {
            "side": "output",
            "eps": 0.0 if config.get("apply_GS") else number(config, "eps", LLAMA_EPS, where, least=0.0),
            "gram_schmidt": bool(config.get("apply_GS")),
        }
    if kind == "hra":
        _check_rank(parts.get("vectors"), 1, number(config, "r", 8, where), layer, where)
        return {"side": "input", "eps": 0.0, "gram_schmidt": bool(config.get("apply_GS"))}
    if kind == "oft":
        return _oft_options(config, where)
    if kind == "boft":
        return {}
    r, given = config.get("r", 8), "lora_alpha" if kind == "lora" else "alpha"
    # None: a file without configuration, whose tensors say the rank, and whose alpha is the rank
    rank = rank_of(AdapterLayer(kind, parts)) or 1 if r is None else number(config, "r", 8, where)
    rank = layer_value(config, "rank_pattern", layer, rank, where)
    if rank <= 0:
        raise CheckpointError(f"layer {layer!r}: its configuration says rank {rank:g}", where=where)
    alpha = rank if config.get(given, 8) is None else number(config, given, 8, where)
    alpha = layer_value(config, "alpha_pattern", layer, alpha, where)
    options: dict[str, object] = {}
    if "alpha" not in parts:
        options["scale"] = alpha / (math.sqrt(rank) if kind == "lora" and config.get("use_rslora") else rank)
    if kind == "lora":
        _check_rank(parts.get("down"), 0, rank, layer, where)
        if config.get("fan_in_fan_out") and "down" in parts and len(parts["down"].shape) == 2:
            options["transposed"] = True
        if "magnitude" in parts:
            options |= {"dora": True, "dora_axis": "output"}
        elif config.get("use_dora"):
            raise CheckpointError(f"layer {layer!r} of a DoRA adapter has no lora_magnitude_vector", where=where)
    return options


def _oft_options(config: Mapping[str, Any], where: str) -> dict[str, object]:
    options: dict[str, object] = {"cayley": "exact", "block_share": bool(config.get("block_share"))}
    if config.get("use_cayley_neumann", True):
        version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or "0.0"))
        recent = version is not None and (int(version[1]), int(version[2])) >= (0, 18)
        options["cayley"] = "neumann" if recent else "neumann-0.17"
        options["terms"] = int(number(config, "num_cayley_neumann_terms", 5, where, least=1))
    if config.get("coft"):
        # PEFT projects onto this ball before each use; the last optimizer step may have left it.
        options["coft_eps"] = number(config, "eps", 6e-5, where, least=0.0)
    return options


def _with_embedding(layer: AdapterLayer, embedding: bool) -> AdapterLayer:
    """Embeddings hold the transpose of what a Linear holds: (tokens, width)."""
    if not embedding:
        return layer
    option = {"transposed": True} if layer.kind == "lora" else {"embedding": True}
    return AdapterLayer(layer.kind, layer.tensors, {**layer.options, **option})


def _check_rank(info: TensorInfo | None, axis: int, rank: float, layer: str, where: str) -> None:
    if info is not None and info.shape and info.shape[min(axis, len(info.shape) - 1)] != rank:
        raise CheckpointError(
            f"layer {layer!r} has shape {info.shape}, its configuration says rank {rank:g}",
            hint="adapter_config.json and the weights are of different adapters, or rank_pattern misses the layer",
            where=where,
        )


def _note(dialect: str, peft_type: str, config: Mapping[str, Any], contents: Contents) -> None:
    """What a report should say of this adapter as a whole."""
    if dialect == "hra-llama":
        contents.notes.append(
            "hra-llama: reflections on the output side; the file does not say whether they were trained with "
            'Gram-Schmidt (layer_GS_HRA.py): put "apply_GS": true into adapter_config.json if so'
        )
    start = str(config.get("init_lora_weights", "")).lower()
    if peft_type == "LORA" and start.startswith(peft_extras.MUTATING):
        contents.bound = True
        contents.notes.append(f"initialised by {start}, which took a part out of the base: right only on that residual")
    if any(layer.options.get("cayley") == "neumann-0.17" for layer in contents.layers.values()):
        contents.notes.append(
            "OFT of PEFT 0.16 or 0.17: its Cayley-Neumann series, whose last term is doubled, is used"
        )
    if (
        dialect == "peft"
        and peft_type == "HRA"
        and any((rank_of(layer) or 0) % 2 for layer in contents.layers.values())
    ):
        contents.notes.append("odd number of reflections: the adapter has determinant -1 and cannot be the identity")


def _read(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], metadata: Mapping[str, str], where: str
) -> tuple[str, Contents, dict[str, Any]]:
    dialect, contents = read_peft(tensors, config, where)
    return dialect, contents, dict(config)


DIALECT = Dialect(claims=lambda names, config, metadata: "peft_type" in config, read=_read)
