"""kohya's sd-scripts and LyCORIS: layer names flattened to one word, a dot, the tensor's role.

`_` for `.` cannot be undone by rule, only by looking names up in the table of SD1.5's layers. What kind a layer is
follows from its roles; the stored `alpha` is read when its operator is built.

    LoRA, LoCon   lora_down.weight lora_up.weight [lora_mid.weight]      diag-OFT  oft_blocks (3-D) [rescale]
    LoHa          hada_w1_a hada_w1_b hada_w2_a hada_w2_b [hada_t1 _t2]  full      diff diff_b: added to weight and bias
    LoKr          lokr_w1[_a _b] lokr_w2[_a _b] [lokr_t2]                norm      w_norm b_norm: added likewise
    each          alpha, and for the first column dora_scale
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod

from ortho_cli.checkpoints.adapters import AdapterLayer, Addition
from ortho_cli.checkpoints.header import printable
from ortho_cli.checkpoints.layouts import canonical_to_ldm, kohya_layers, sd15_layers
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.errors import CheckpointError

from .contents import Contents, Dialect, nearest, unclaimed
from .kinds import check_layer

__all__ = ["DIALECT", "PREFIXES", "canonical_layer", "read_kohya"]

PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "oft_unet_", "lycoris_")
ROLES: dict[str, tuple[str, str]] = {
    **{f"lora_{role}.weight": ("lora", role) for role in ("down", "up", "mid")},
    **{f"hada_{role}": ("loha", role) for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{role}": ("lokr", role) for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "oft_blocks": ("diag-oft", "blocks"),
    "rescale": ("diag-oft", "rescale"),
    "alpha": ("", "alpha"),
    "dora_scale": ("", "magnitude"),
}
ADDED = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}
# Formats that are known and not read: a role of theirs -> what to call them.
REFUSED = {
    "oft_diag": "diag-OFT of LyCORIS before 2.0",
    "a1.weight": "GLoRA",
    "on_input": "IA3",
    "bias_indices": "LoCon with sparse biases",
    "reshape_weight": "a LoRA for a widened layer",
}
# Prefix -> what may stand for it in the table; transformers since 5.6 leaves `text_model` out of CLIP's names.
_TEXT = ("lora_te_", "lora_te_text_model_")
_FORMS = {
    "lora_unet_": ("lora_unet_",),
    "oft_unet_": ("lora_unet_",),
    "lora_te_": _TEXT,
    "lycoris_": ("lora_unet_", *_TEXT),
}
_NORMS = ("norm", "norm1", "norm2", "norm3", "conv_norm_out", "layer_norm1", "layer_norm2", "final_layer_norm")


@cache
def _table() -> dict[str, str]:
    """kohya name -> canonical layer, for the layers of SD1.5 and their norms."""
    layers = sd15_layers()
    parents = {layer[: -len(tail)] for layer in layers for tail in _tails(layer)}
    norms = [parent + norm for parent in parents for norm in _NORMS if canonical_to_ldm(parent + norm)]
    return kohya_layers([*layers, *norms])


def _tails(layer: str) -> list[str]:
    """The ends of a layer name at each of its dots, so that what stands before is a module that contains it."""
    parts = layer.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def canonical_layer(flat: str) -> str | None:
    """The canonical layer of a flattened name with any of the prefixes, None where SD1.5 has no such layer.

    >>> canonical_layer("lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0")
    'unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0'
    """
    for prefix, forms in _FORMS.items():
        if flat.startswith(prefix):
            return next((layer for form in forms if (layer := _table().get(form + flat[len(prefix) :]))), None)
    return None


def read_kohya(tensors: Mapping[str, TensorInfo], where: str) -> Contents:
    """Read a file of kohya's or LyCORIS's.

    Raises:
        CheckpointError: a layer that SD1.5 does not have, a role or format that is not read, factors that do not fit.
    """
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        flat, _, role = name.partition(".")
        found.setdefault(flat, {})[role] = info
    contents = Contents()
    for flat, parts in found.items():
        layer = canonical_layer(flat)
        if layer is None:
            raise _unknown(flat, len(found), where)
        for role in parts.keys() & ADDED.keys():
            name = f"{layer}.{ADDED[role]}"
            if name in contents.additions:
                raise CheckpointError(f"{printable(flat)}.{role} is a second difference for {name!r}", where=where)
            contents.additions[name] = Addition(parts.pop(role))
        made = _layer(flat, layer, parts, where)
        if made is not None:
            contents.add_layer(layer, made, where)
    return contents


def _layer(flat: str, layer: str, parts: dict[str, TensorInfo], where: str) -> AdapterLayer | None:
    """The layer that the remaining tensors of a name make, None where there are none."""
    if not parts:
        return None
    for role, called in REFUSED.items():
        if role in parts:
            raise CheckpointError(f"{called} is not read (tensor {flat}.{role})", where=where)
    strange = [f"{flat}.{role}" for role in parts if role not in ROLES]
    kinds = {ROLES[role][0] for role in parts if role in ROLES} - {""}
    alone = not kinds and not strange
    if strange or alone or ("dora_scale" in parts and "diag-oft" in kinds):
        names = strange or [f"{flat}.{role}" for role in parts if not ROLES[role][0]]
        raise unclaimed(names, [f"{flat}.{role}" for role in (*ROLES, *ADDED)], where)
    if len(kinds) > 1:
        raise CheckpointError(f"{flat} has tensors of two kinds: {' and '.join(sorted(kinds))}", where=where)
    kind = kinds.pop()
    options: dict[str, object] = {}
    if kind == "diag-oft":
        if len(parts.get("oft_blocks", parts[next(iter(parts))]).shape) == 4:
            raise CheckpointError(f"LyCORIS BOFT (4-D oft_blocks, {flat}) is not read", where=where)
        options["clamp"] = "always" if flat.startswith("oft_unet_") else "positive"
        if options["clamp"] == "always" and "alpha" not in parts:
            raise CheckpointError(f"{flat} has no alpha, which bounds kohya's OFT", where=where)
    if "dora_scale" in parts:
        shape = parts["dora_scale"].shape
        by_input = len(shape) > 1 and shape[0] == 1 and prod(shape) > 1
        options |= {"dora": True, "dora_axis": "input" if by_input else "output"}
    made = AdapterLayer(kind, {ROLES[role][1]: info for role, info in parts.items()}, options)
    return check_layer(layer, made)


def _unknown(flat: str, total: int, where: str) -> CheckpointError:
    close = nearest(flat, _table())
    sdxl = "names of SDXL (lora_te1_, lora_te2_) are not read" if flat.startswith(("lora_te1_", "lora_te2_")) else ""
    return CheckpointError(
        f"{printable(flat)!r} (of {total} names) is no layer of Stable Diffusion 1.x",
        hint=sdxl or close or "only adapters for SD1.x are read in kohya's naming; convert it to PEFT's first",
        where=where,
    )


DIALECT = Dialect(
    claims=lambda names, config, metadata: any(name.startswith(PREFIXES) for name in names),
    read=lambda tensors, config, metadata, where: ("kohya", read_kohya(tensors, where), {}),
)
