"""The names of Stable Diffusion 1.x: block tables, and the LDM <-> diffusers translation that follows from them.

A row says which block of the diffusers models is which block of the LDM file, and a parts table how the layers inside
are called on either side. Everything else (1,130 names) is expanded from these rows; nothing is matched by regular
expressions. *Canonical* means the diffusers name with its component in front: `unet.conv_in`, `vae.encoder.conv_in`,
`text_encoder.text_model.final_layer_norm`. Which names a given checkpoint uses is the business of `layouts.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product

__all__ = [
    "COMPONENTS",
    "LDM_ONLY",
    "canonical_shape",
    "canonical_to_ldm",
    "ema_name",
    "ldm_shape",
    "ldm_to_canonical",
    "sd15_layers",
    "sd15_tensors",
]

# Component prefix -> what the LDM file puts in front of the same module.
COMPONENTS = {
    "unet.": "model.diffusion_model.",
    "vae.": "first_stage_model.",
    "text_encoder.": "cond_stage_model.transformer.",
}

_SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip

# The 15 tensors of an LDM file that no diffusers model holds: name -> (dtype, shape).
LDM_ONLY: dict[str, tuple[str, tuple[int, ...]]] = {
    **{name: ("F32", (1000,)) for name in _SCHEDULE},
    "model_ema.decay": ("F32", ()),
    "model_ema.num_updates": ("I32", ()),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": ("I64", (1, 77)),
}

# Parts tables: canonical name inside a block -> LDM name inside the same block.
Parts = Mapping[str, str]


def _same(names: str) -> Parts:
    return {name: name for name in names.split()}


_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
_UNET_SHORTCUT = {"conv_shortcut": "skip_connection"}  # where a resnet changes the number of channels
_TRANSFORMER_BLOCK = (
    "norm1", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2",
    "norm2", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "norm3",
)  # fmt: skip
_TRANSFORMER = {
    **_same("norm proj_in"),
    **{f"transformer_blocks.0.{part}": f"transformer_blocks.0.{part}" for part in _TRANSFORMER_BLOCK},
    **_same("proj_out"),
}
_VAE_RESNET = _same("norm1 conv1 norm2 conv2")
_VAE_SHORTCUT = {"conv_shortcut": "nin_shortcut"}
# The four projections are 1x1 convs in LDM and Linear in diffusers: the same bytes under another shape.
_VAE_PROJECTIONS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_ATTENTION = {"group_norm": "norm", **_VAE_PROJECTIONS}
_CLIP_LAYER = _same(
    "layer_norm1 self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj layer_norm2 mlp.fc1 mlp.fc2"
)

Row = tuple[str, str, Parts]  # canonical block, LDM block ("" = the component itself), its parts


def _unet() -> Iterator[Row]:
    yield "time_embedding", "time_embed", {"linear_1": "0", "linear_2": "2"}
    yield "", "", {"conv_in": "input_blocks.0.0"}
    for i, j in product(range(4), range(2)):
        n = 3 * i + j + 1
        shortcut = _UNET_SHORTCUT if i in (1, 2) and j == 0 else {}
        yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0", {**_UNET_RESNET, **shortcut}
        if i < 3:
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1", _TRANSFORMER
            if j == 1:
                yield f"down_blocks.{i}.downsamplers.0", f"input_blocks.{n + 1}.0", {"conv": "op"}
    yield "mid_block.resnets.0", "middle_block.0", _UNET_RESNET
    yield "mid_block.attentions.0", "middle_block.1", _TRANSFORMER
    yield "mid_block.resnets.1", "middle_block.2", _UNET_RESNET
    for i, j in product(range(4), range(3)):
        n = 3 * i + j
        yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0", {**_UNET_RESNET, **_UNET_SHORTCUT}
        if i > 0:
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1", _TRANSFORMER
        if i < 3 and j == 2:
            yield f"up_blocks.{i}.upsamplers.0", f"output_blocks.{n}.{1 if i == 0 else 2}", {"conv": "conv"}
    yield "", "", {"conv_norm_out": "out.0", "conv_out": "out.2"}


def _vae() -> Iterator[Row]:
    for i, j in product(range(4), range(2)):
        shortcut = _VAE_SHORTCUT if i in (1, 2) and j == 0 else {}
        yield f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}", {**_VAE_RESNET, **shortcut}
        if i < 3 and j == 1:
            yield f"encoder.down_blocks.{i}.downsamplers.0", f"encoder.down.{i}.downsample", _same("conv")
    for i, j in product(range(4), range(3)):  # LDM counts the decoder's blocks from the image, diffusers from the code
        shortcut = _VAE_SHORTCUT if i in (2, 3) and j == 0 else {}
        yield f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{3 - i}.block.{j}", {**_VAE_RESNET, **shortcut}
        if i < 3 and j == 2:
            yield f"decoder.up_blocks.{i}.upsamplers.0", f"decoder.up.{3 - i}.upsample", _same("conv")
    for side in ("encoder", "decoder"):
        yield f"{side}.mid_block.resnets.0", f"{side}.mid.block_1", _VAE_RESNET
        yield f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", _VAE_ATTENTION
        yield f"{side}.mid_block.resnets.1", f"{side}.mid.block_2", _VAE_RESNET
        yield side, side, {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
    yield "", "", _same("quant_conv post_quant_conv")


def _text_encoder() -> Iterator[Row]:
    yield "text_model.embeddings", "text_model.embeddings", _same("token_embedding position_embedding")
    for i in range(12):
        yield f"text_model.encoder.layers.{i}", f"text_model.encoder.layers.{i}", _CLIP_LAYER
    yield "text_model", "text_model", _same("final_layer_norm")


_ROWS = {"unet.": _unet, "vae.": _vae, "text_encoder.": _text_encoder}


@cache
def _ldm_layers() -> dict[str, str]:
    """Every canonical layer -> its LDM layer, in the order of the tables."""

    def join(prefix: str, block: str, part: str) -> str:
        return f"{prefix}{block}.{part}" if block else prefix + part

    return {
        join(prefix, block, part): join(COMPONENTS[prefix], ldm_block, ldm_part)
        for prefix, rows in _ROWS.items()
        for block, ldm_block, parts in rows()
        for part, ldm_part in parts.items()
    }


@cache
def _canonical_layers() -> dict[str, str]:
    """Every LDM layer -> its canonical layer; CLIP also without `text_model.`, as some files have it."""
    layers = {ldm: canonical for canonical, ldm in _ldm_layers().items()}
    clip = COMPONENTS["text_encoder."]
    flat = {ldm.replace(clip + "text_model.", clip): canonical for ldm, canonical in layers.items()}
    return {**flat, **layers}


def _translate(name: str, layers: Mapping[str, str]) -> str | None:
    """`name` with its layer looked up in `layers`; what stands behind the layer (`.weight`, `.hra_u`) goes along."""
    layer = name
    while layer:
        if layer in layers:
            return layers[layer] + name[len(layer) :]
        layer = layer.rpartition(".")[0]
    return None


def ldm_to_canonical(name: str) -> str | None:
    """Translate a tensor or layer name of an SD1.x LDM file; None for what diffusers does not have.

    One to one on the 1,130 shared tensors. Text encoders saved without `text_model.` are understood too.

    >>> ldm_to_canonical("model.diffusion_model.input_blocks.1.1.proj_in.weight")
    'unet.down_blocks.0.attentions.0.proj_in.weight'
    """
    return _translate(name, _canonical_layers())


def canonical_to_ldm(name: str) -> str | None:
    """Translate a canonical tensor or layer name into the LDM file's; None where it has no such layer.

    >>> canonical_to_ldm("vae.decoder.up_blocks.0.resnets.0.conv1")
    'first_stage_model.decoder.up.3.block.0.conv1'
    """
    return _translate(name, _ldm_layers())


@cache
def _vae_projections() -> frozenset[str]:
    layers = [f"vae.{side}.mid_block.attentions.0.{p}" for side in ("encoder", "decoder") for p in _VAE_PROJECTIONS]
    return frozenset(layer + end for layer in layers for end in ("", ".weight", ".fixed_linear.weight"))


def ldm_shape(canonical: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape an LDM file gives the weight that diffusers stores as `shape`; the bytes are the same.

    >>> ldm_shape("vae.encoder.mid_block.attentions.0.to_q.weight", (512, 512))
    (512, 512, 1, 1)
    """
    return (*shape, 1, 1) if len(shape) == 2 and canonical in _vae_projections() else shape


def canonical_shape(canonical: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape diffusers gives the weight that an LDM file stores as `shape`; undoes :func:`ldm_shape`."""
    return shape[:2] if shape[2:] == (1, 1) and canonical in _vae_projections() else shape


def ema_name(ldm_name: str) -> str:
    """The name of the averaged copy of a UNet tensor in an LDM file, dots removed as LDM's `LitEma` does.

    >>> ema_name("model.diffusion_model.input_blocks.0.0.weight")
    'model_ema.diffusion_modelinput_blocks00weight'
    """
    if not ldm_name.startswith(COMPONENTS["unet."]):
        raise ValueError(f"only tensors of the UNet have an averaged copy, not {ldm_name!r}")
    return "model_ema." + ldm_name.removeprefix("model.").replace(".", "")


@cache
def sd15_layers() -> tuple[str, ...]:
    """The canonical names of all SD1.5 layers whose weight has two or more dimensions, in the order of the tables.

    What an adapter without a base at hand is resolved against. Norms are the only layers with one-dimensional weights.
    """
    return tuple(layer for layer in _ldm_layers() if "norm" not in layer.rpartition(".")[2])


@cache
def sd15_tensors() -> tuple[str, ...]:
    """The canonical names of all 1,130 tensors that an SD1.5 file shares with the diffusers models."""
    # Without a bias: embeddings, and the UNet's q, k and v (the autoencoder's have one).
    bare = (".token_embedding", ".position_embedding", *(f".attn{i}.to_{x}" for i in (1, 2) for x in "qkv"))
    kinds = {layer: ("weight",) if layer.endswith(bare) else ("weight", "bias") for layer in _ldm_layers()}
    return tuple(f"{layer}.{kind}" for layer, found in kinds.items() for kind in found)
